"""What `ray job submit ... -- python jobs/train.py` runs: `sibra-dist train` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
