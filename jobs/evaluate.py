"""What `ray job submit ... -- python jobs/evaluate.py` runs: `sibra-dist evaluate` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
