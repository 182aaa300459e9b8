"""`sibra-dist recommend` for a million users and 200,000 items: memory, and the same files after a kill.

The model is a matrix factorization of 64 dimensions that was trained for one epoch on few interactions: what it recommends
is of no use, and costs as much as what is.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import sibra_dist
from sibra_dist.recommending.manifest import TABLE, USERS_PER_SHARD

USERS, ITEMS, SIZE, K = 1_000_000, 200_000, 64, 100
INTERACTIONS = 4_000_000
COMPARED = 2
"""So many of the first shards and of the last, from before the kill and after it, are also made without a kill."""
TRAINING = (
    *(f"model.embedding_size={SIZE}", "training.epochs=1", "training.negatives=1", "training.batch_size=262144"),
    "training.device=cpu",
)


def measure(work: Path, users: int, *, again: bool = False) -> dict[str, Any]:
    """Recommend to the first so many users of the million, kill that on the way, go on, and compare.

    Raises:
        SystemExit: a command failed, or the files are not those of an undisturbed command; the message says where to look.
    """
    folder = work / "recommend"
    run = _run(folder)
    whole, straight = folder / f"killed-{users}", folder / f"undisturbed-{users}"
    numbers = range(-(-users // USERS_PER_SHARD))
    compared = sorted({*numbers[:COMPARED], *numbers[-COMPARED:]})
    if again:
        for made in (whole, straight):
            shutil.rmtree(made, ignore_errors=True)
            _told(made).unlink(missing_ok=True)
    if not _told(straight).exists():
        few = [user for shard in compared for user in range(users)[shard * USERS_PER_SHARD :][:USERS_PER_SHARD]]
        taken = sibra_dist("recommend", *_asked(folder, run, few), "--to", str(straight), log=folder / "log")
        _told(straight).write_text(json.dumps({**vars(taken), "users": len(few)}))
    if not _told(whole).exists():
        _told(whole).write_text(json.dumps(_interrupted(_asked(folder, run, range(users)), whole, users, folder / "log")))
    expected, found = _digests(straight), _digests(whole)
    if [found[shard] for shard in compared] != expected:
        raise SystemExit(f"{whole} has other files than {straight}, which was not killed")
    told: dict[str, Any] = json.loads(_told(whole).read_text())
    return told | {
        "items": ITEMS,
        "size": SIZE,
        "k": K,
        "undisturbed": json.loads(_told(straight).read_text()),
        "same_files": len(expected),
        "mebibytes": sum(path.stat().st_size for path in (whole / TABLE).iterdir()) / (1 << 20),
    }


def _told(folder: Path) -> Path:
    """The file that tells what it took to make a folder."""
    return folder.with_name(f"{folder.name}.json")


def _interrupted(asked: list[str], to: Path, users: int, log: Path) -> dict[str, Any]:
    """Recommend, with a kill when half is done."""
    shards = -(-users // USERS_PER_SHARD)
    started = time.perf_counter()
    kept = _killed([*asked, "--to", str(to)], to, max(shards // 2, 1), log)
    seconds = time.perf_counter() - started
    rest = sibra_dist("recommend", *asked, "--to", str(to), log=log)
    left = min((shards - kept) * USERS_PER_SHARD, users)
    return {
        "users": users,
        "shards": shards,
        "kept": kept,
        "killed_after_seconds": seconds,
        "continued": vars(rest),
        "users_per_second": left / rest.seconds,
        "users_per_processor_second": left / rest.processor_seconds,
    }


def _run(folder: Path) -> Path:
    """The run, which is made unless it is there."""
    dataset, run = folder / "dataset", folder / "run"
    log = folder / "log"
    if not (dataset / "manifest.json").exists():
        asked = {"users": USERS, "items": ITEMS, "interactions": INTERACTIONS, "evaluated-users": 1000}
        options = [f"--{name}={value}" for name, value in asked.items()]
        features = ("--user-features=none", "--item-features=none")
        sibra_dist("synthesize", *options, *features, "--to", str(dataset), log=log)
    if not (folder / "trained").exists():
        sibra_dist("train", "mf", f"dataset={dataset}", *TRAINING, "--to", str(run), log=log)
        (folder / "trained").touch()
    return run


def _asked(folder: Path, run: Path, users: Sequence[int]) -> list[str]:
    """What is asked for; where those are not all users, they are listed in a file."""
    asked = [str(run), "-k", str(K)]
    if len(users) == USERS:
        return asked
    listing = folder / f"users-{len(users)}.txt"
    listing.write_text("".join(f"u{number}\n" for number in users))
    return [*asked, "--users", str(listing)]


def _killed(asked: list[str], to: Path, shards: int, log: Path) -> int:
    """Begin to recommend, and kill the process as soon as there are so many shards; returns how many there are.

    Raises:
        SystemExit: it ended by itself.
    """
    with log.open("ab") as output:
        command = [sys.executable, "-m", "sibra_dist.cli", "recommend", *asked]
        with subprocess.Popen(command, stdout=output, stderr=output) as process:
            while len(list((to / TABLE).glob("part-*"))) < shards:
                if process.poll() is not None:
                    raise SystemExit(f"{' '.join(command)} ended with {process.returncode} before it was killed; see {log}")
                time.sleep(0.2)
            process.send_signal(signal.SIGKILL)
    return len(list((to / TABLE).glob("part-*")))


def _digests(folder: Path) -> list[str]:
    """Of the shards, by number."""
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((folder / TABLE).iterdir())]
