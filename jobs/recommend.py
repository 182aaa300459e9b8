"""What `ray job submit ... -- python jobs/recommend.py` runs: `sibra-dist recommend` with the same arguments."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["recommend", *sys.argv[1:]])
