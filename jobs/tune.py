"""What `ray job submit ... -- python jobs/tune.py` runs: `sibra-dist tune` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
