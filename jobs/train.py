"""Train an editor: `ray job submit --working-dir . -- python jobs/train.py SPEC`.

The same as `editfleet train SPEC`, so a training that is submitted again goes on; arguments after
the spec (`--set field=value`, `--restart`) are the same too.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
