"""Speed and memory of training beside plain PyTorch and other libraries, time to quality, and two workers beside one.

    python -m benchmarks.training --data DIR [--work DIR] [--only PART ...] [--again] [--threads N] [--record]
    python -m benchmarks.training --show

DIR holds what the recipe `ml-1m` reads. Datasets, environments and figures go to the work folder; what is there already is not
made or measured again, so an interrupted benchmark goes on. `--record` writes all figures of the work folder to this one, to
`results.json` and, as tables, `results.md`; `--show` prints them.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sibra_dist
from benchmarks.training.bench import Ledger, measure
from benchmarks.training.parts import PARTS, Workshop
from benchmarks.training.report import markdown
from sibra_dist.data.storage import write_atomically

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
        # Without the place of the work folder, which is this machine's alone.
        text = json.dumps(ledger.parts, indent=1).replace(f"{shop.work}/", "")
        write_atomically(RECORDED, text.encode() + b"\n")
        write_atomically(RECORDED.with_suffix(".md"), markdown(ledger.parts).encode())
    print(markdown({name: ledger.parts[name] for name in arguments.only}))


def machine() -> dict[str, Any]:
    """What figures depend on."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sibra-dist": sibra_dist.__version__,
    }


if __name__ == "__main__":
    main()
