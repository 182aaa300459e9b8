"""What a cluster runs to make a dataset: `spark-submit jobs/prepare.py CONFIG.yaml --to DIR [key=value ...]`."""

import sys

from sibra_dist.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
