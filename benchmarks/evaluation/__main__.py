"""Speed and memory of metrics, of the best items and of recommendations, beside other libraries, and whether numbers agree.

    python -m benchmarks.evaluation [--work DIR] [--only PART ...] [--again] [--users N] [--record]
    python -m benchmarks.evaluation --show

Tasks, environments and figures go to the work folder; what is there already is not made or measured again, so an interrupted
benchmark goes on. `--record` writes all figures of the work folder to this one, to `results.json` and, as tables, `results.md`;
`--show` prints them.
"""

import argparse
import json
from pathlib import Path

from benchmarks.bench import Ledger, machine, measure, record
from benchmarks.evaluation import recommend
from benchmarks.evaluation.agreement import differences
from benchmarks.evaluation.parts import CONTESTS, Workshop
from benchmarks.evaluation.report import markdown

RECORDED = Path(__file__).parent / "results.json"
PARTS = (*CONTESTS, "recommend")


def main() -> None:
    """Measure what has not been measured yet, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-evaluation"))
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--again", action="store_true", help="measure these parts anew")
    parser.add_argument("--users", type=int, default=recommend.USERS, help="recommend to the first so many of the million")
    parser.add_argument("--record", action="store_true", help="write the figures to results.json and results.md")
    parser.add_argument("--show", action="store_true", help="print the recorded results, and run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        if not RECORDED.exists():
            parser.error(f"nothing is recorded in {RECORDED}: run it with --record")
        print(markdown(json.loads(RECORDED.read_text())))
        return
    shop = Workshop(arguments.work.resolve())
    shop.work.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(shop.work / "results.json")
    for name in arguments.only:
        if arguments.again:
            ledger.parts.pop(name, None)
        if name == "recommend":
            found = recommend.measure(shop.work, arguments.users, again=arguments.again)
            ledger.parts[name] = {"told": found, "machine": machine()}
            ledger.save()
            continue
        part = CONTESTS[name](shop)
        measure(name, part, ledger, shop.work)
        ledger.parts[name]["agreement"] = differences(ledger.parts[name])
        ledger.conclude(name, part, machine())
    if arguments.record:
        record(ledger, markdown(ledger.parts), RECORDED, shop.work)
    print(markdown({name: ledger.parts[name] for name in arguments.only}))


if __name__ == "__main__":
    main()
