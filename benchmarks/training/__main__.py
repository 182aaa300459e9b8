"""Speed and memory of training beside plain PyTorch and other libraries, time to quality, and two workers beside one.

    python -m benchmarks.training --data DIR [--work DIR] [--only PART ...] [--again] [--threads N] [--record]
    python -m benchmarks.training --show

DIR holds what the recipe `ml-1m` reads. Datasets, environments and figures go to the work folder; what is there already is not
made or measured again, so an interrupted benchmark goes on. `--record` writes all figures of the work folder to this one, to
`results.json` and, as tables, `results.md`; `--show` prints them.
"""

import argparse
import json
from pathlib import Path

from benchmarks.bench import Ledger, machine, measure, record
from benchmarks.training.parts import PARTS, Workshop
from benchmarks.training.report import markdown

RECORDED = Path(__file__).parent / "results.json"


def main() -> None:
    """Measure what has not been measured yet, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/ml-1m"))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-training"))
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure these parts anew")
    parser.add_argument("--threads", type=int, default=1, help="of every contender but where workers are compared")
    parser.add_argument("--record", action="store_true", help="write the figures to results.json and results.md")
    parser.add_argument("--show", action="store_true", help="print the recorded results, and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        if not RECORDED.exists():
            parser.error(f"nothing is recorded in {RECORDED}: run it with --record")
        print(markdown(json.loads(RECORDED.read_text())))
        return
    shop = Workshop(arguments.data, arguments.work, arguments.threads)
    shop.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(shop.work / "results.json")
    for name in arguments.only:
        if arguments.again:
            ledger.parts.pop(name, None)
        part = PARTS[name](shop)
        measure(name, part, ledger, shop.work)
        ledger.conclude(name, part, machine())
    if arguments.record:
        record(ledger, markdown(ledger.parts), RECORDED, shop.work)
    print(markdown({name: ledger.parts[name] for name in arguments.only}))


if __name__ == "__main__":
    main()
