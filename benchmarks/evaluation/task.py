"""The task of all contenders: embeddings of users and items, and what is relevant to each user. Needs NumPy alone."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.contender import contender, peak_rss, rates

SIZE = 64
"""Dimensions of an embedding."""
LONGEST = 100
"""Of the lists that are ranked."""
CUTOFFS = (10, 20, 50, LONGEST)
MOST_RELEVANT = 20
DRAWN = 400
"""Items of which the best are relevant to a user."""
TILE = 256
"""Users ranked at once."""
FEW, SOME = TILE, 20 * TILE
"""Users of contenders that take long."""
SEED = 0

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class Task(NamedTuple):
    """What there is to rank."""

    users: Floats
    """[U, SIZE]; the score of an item is the scalar product"""
    items: Floats
    """[I, SIZE]"""
    offsets: Integers
    """[U + 1]: what is relevant to user u is `relevant[offsets[u] : offsets[u + 1]]`, ascending"""
    relevant: Integers

    def first(self, count: int) -> "Task":
        """The same for the first users alone."""
        return Task(self.users[:count], self.items, self.offsets[: count + 1], self.relevant[: self.offsets[count]])

    def tiles(self) -> Iterator[tuple[slice, Integers, Integers]]:
        """Tiles of users, with the pairs (row in the tile, item) of what is relevant."""
        for start in range(0, len(self.users), TILE):
            rows = slice(start, min(start + TILE, len(self.users)))
            offsets = self.offsets[rows.start : rows.stop + 1]
            owners = np.repeat(np.arange(rows.stop - rows.start), np.diff(offsets))
            yield rows, owners, self.relevant[offsets[0] : offsets[-1]]


def write(folder: Path, num_users: int, num_items: int) -> Path:
    """Draw a task, unless it is in the folder already; returns the file it is in.

    1 to 20 items are relevant to a user: of 400 that are drawn, those with the best scores, so that some are found.
    """
    path = folder / f"{num_users}x{num_items}.npz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(SEED)
        users = generator.standard_normal((num_users, SIZE), np.float32)
        items = generator.standard_normal((num_items, SIZE), np.float32)
        lists = [_relevant(generator, user, items) for user in users]
        offsets = np.cumsum([0, *map(len, lists)])
        scratch = path.with_suffix(".part.npz")
        np.savez(scratch, **Task(users, items, offsets, np.concatenate(lists))._asdict())
        scratch.rename(path)
    return path


def _relevant(generator: np.random.Generator, user: Floats, items: Floats) -> Integers:
    drawn = np.unique(generator.integers(0, len(items), DRAWN))
    wanted = generator.integers(1, MOST_RELEVANT + 1)
    return np.sort(drawn[np.argsort(items[drawn] @ user)[-wanted:]])


class Clock:
    """Seconds from scores to numbers: what it takes to make the scores is counted apart."""

    def __init__(self) -> None:
        """Begin to count."""
        self._began = _now()
        self._scoring = (0.0, 0.0)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Scores are being made in this block."""
        before = _now()
        yield
        after = _now()
        self._scoring = (self._scoring[0] + after[0] - before[0], self._scoring[1] + after[1] - before[1])

    def result(self, users: int) -> dict[str, Any]:
        """What so many users took until now."""
        wall, processor = (now - began for now, began in zip(_now(), self._began, strict=True))
        told = rates("users", users, wall - self._scoring[0], processor - self._scoring[1])
        return told | {"users": users, "seconds": wall, "scoring_seconds": self._scoring[0]}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def parse(description: str | None, *choices: str) -> tuple[argparse.Namespace, Task]:
    """The arguments of a contender, with `what` it is to do, and the task; `base` is the peak RSS before there is a task."""
    parser = contender(description, timed=False)
    parser.add_argument("what", choices=choices)
    parser.add_argument("task", type=Path)
    parser.add_argument("users", type=int, help="rank the first so many")
    arguments = parser.parse_args()
    arguments.base = peak_rss()
    with np.load(arguments.task) as file:
        return arguments, Task(**file).first(arguments.users)


def told(arguments: argparse.Namespace, found: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """What a contender tells: figures and metrics, and how much memory it took beyond what it needs without a task."""
    grown = found["peak_rss_mebibytes"] - arguments.base
    return {**found, "grown_mebibytes": grown, "metrics": {name: float(value) for name, value in metrics.items()}}


def at(names: Sequence[str]) -> list[str]:
    """Each at every cutoff."""
    return [f"{name}@{cutoff}" for name in names for cutoff in CUTOFFS]
