"""What `ray job submit ... -- python jobs/gap.py` runs: `sibra-dist gap` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["gap", *sys.argv[1:]])
