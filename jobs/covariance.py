"""Compute covariances: `ray job submit --working-dir . -- python jobs/covariance.py SPEC`.

The same as `editfleet covariance SPEC`.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    main(["covariance", *sys.argv[1:]])
