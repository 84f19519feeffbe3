"""Compare editors: `ray job submit --working-dir . -- python jobs/survey.py SPEC`.

The same as `editfleet survey SPEC`, so a survey that is submitted again goes on; arguments after
the spec (`--set field=value`, `--restart`) are the same too.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    main(["survey", *sys.argv[1:]])
