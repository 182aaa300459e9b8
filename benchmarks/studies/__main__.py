"""Short studies on MovieLens 1M, each with a table and a plot.

    python -m benchmarks.studies NAME --data DIR [--work DIR] [--jobs N]

missing    how good is SiBraR when a share of the items lacks a modality in training, at inference, or both?
losses     CoBraR with three losses, and NeuMF with two branches or a shared one: accuracy, what is recommended, size
universal  one branch for every modality of users and of items, against SiBraR and CoBraR

DIR holds what the recipe `ml-1m` reads. Datasets and runs go to the work folder, which may be that of
`benchmarks.quality`; what is there already is not made again. The answer is written to this folder, as NAME.md and NAME.svg.
"""

import argparse
from pathlib import Path

from benchmarks.experiment import Laboratory
from benchmarks.studies import losses, missing, universal

STUDIES = {"missing": missing.study, "losses": losses.study, "universal": universal.study}


def main() -> None:
    """Run what has not been run yet, and write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-ml-1m"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each in a process with one thread")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="folder of the answer")
    arguments = parser.parse_args()
    answer = STUDIES[arguments.name](Laboratory(arguments.data, arguments.work), arguments.jobs)
    answer.write(arguments.to, arguments.name)
    print(answer.markdown())


if __name__ == "__main__":
    main()
