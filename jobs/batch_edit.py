"""Edit one batch of facts: `ray job submit --working-dir . -- python jobs/batch_edit.py SPEC`.

The same as `editfleet edit SPEC`, so a job that is submitted again goes on with its run; arguments
after the spec (`--set field=value`, `--restart`) are the same too.
"""

import sys

from pipeline.cli import main

if __name__ == "__main__":
    main(["edit", *sys.argv[1:]])
