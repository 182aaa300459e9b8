"""What `ray job submit ... -- python jobs/export.py` runs: `sibra-dist export` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
