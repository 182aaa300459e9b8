"""Interactions out of nothing: heavy-tailed, seeded, any number of them in the memory of one chunk.

Users are 1 in 100 rows, so that a user's mean activity stays the same as the rows grow; items grow with the square root of
the rows, as catalogues do (100,000 at 50 million rows). Users and items are drawn independently, each by a power law of rank,
so active users meet popular items again: these are the duplicates. One item, in a class of its own, has half a percent of all
rows.

    python -m benchmarks.etl.synthetic FOLDER ROWS RESULT
"""

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from benchmarks.etl.measuring import write_result
from benchmarks.etl.task import FEATURES

FILES = 10
CHUNK = 1_000_000
SUMMARY = "source.json"
HEADER = b"user_id\titem_id\trating\ttime\n"
TEXT = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")

TOP_ITEM_SHARE = 0.005
RATINGS = pa.array(["1", "2", "3", "4", "5"])
RATING_SHARES = (0.05, 0.10, 0.25, 0.35, 0.25)
FIRST_TIME, SPAN, DELAY = 1_577_836_800, 4 * 365 * 86_400, 86_400
"""Seconds: when the first row happened, over how long, and how late a row may arrive."""

# Reason -> its share of the rows, the column that is spoilt and what stands there instead.
UNUSABLE = {
    "no user id": (0.0002, "user_id", ""),
    "no item id": (0.0002, "item_id", ""),
    "rating is not a finite number": (0.0003, "rating", "n/a"),
    "time cannot be read": (0.0001, "time", "yesterday"),
}
SHORT, SHORT_SHARE = "wrong number of fields", 0.0002
"""Rows that end after the item."""

# Streams of random numbers, so that no two purposes share one.
NAMES, ROWS, USERS, ITEMS = range(4)
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """Who interacts with what, and how often: external ids and cumulative shares, both by rank."""

    users: pa.StringArray
    items: pa.StringArray
    activity: Floats
    popularity: Floats

    @classmethod
    def of(cls, rows: int, seed: int) -> "Population":
        """The users and items of so many rows."""
        users, items = num_users(rows), num_items(rows)
        rng = np.random.default_rng([seed, NAMES])
        popularity = shares(items, shift=100, exponent=0.8)
        popularity[0] = 0
        popularity *= (1 - TOP_ITEM_SHARE) / popularity.sum()
        popularity[0] = TOP_ITEM_SHARE
        return cls(
            _names("u", rng.permutation(users)),
            _names("i", rng.permutation(items)),
            shares(users, shift=users / 30, exponent=2).cumsum(),
            popularity.cumsum(),
        )


def num_users(rows: int) -> int:
    """How many users make so many rows."""
    return max(50, rows // 100)


def num_items(rows: int) -> int:
    """How many items there are for so many rows."""
    return max(50, round(100_000 * math.sqrt(rows / 50_000_000)))


def shares(count: int, shift: float, exponent: float) -> Floats:
    """The share of each rank by the law of Zipf and Mandelbrot: proportional to (rank + shift) ** -exponent."""
    weights: Floats = (np.arange(1, count + 1, dtype=np.float64) + shift) ** -exponent
    weights /= weights.sum()
    return weights


def generate(folder: Path, rows: int, seed: int = 0, chunk: int = CHUNK) -> dict[str, int]:
    """Write `rows` interactions in the order of their arrival, and side information of every user and item, into `folder`.

    The bytes hang on `rows`, `seed` and `chunk` alone. What is there already is replaced; the folder appears when it is whole.

    Returns:
        How many rows cannot be used, by reason.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    population = Population.of(rows, seed)
    unusable: Counter[str] = Counter()
    bounds = [rows * place // FILES for place in range(FILES + 1)]
    for place in range(FILES):
        with (aside / f"interactions-{place:02}.tsv").open("wb") as file:
            file.write(HEADER)
            for first in range(bounds[place], bounds[place + 1], chunk):
                last = min(first + chunk, bounds[place + 1])
                unusable.update(_write_rows(file, population, rows, first, last, np.random.default_rng([seed, ROWS, first])))
    _write_users(aside, population.users, np.random.default_rng([seed, USERS]))
    _write_items(aside, population.items, np.random.default_rng([seed, ITEMS]))
    (aside / SUMMARY).write_text(json.dumps({"rows": rows, "seed": seed, "unusable": dict(unusable)}) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return dict(unusable)


def _write_rows(
    file: BinaryIO, population: Population, rows: int, first: int, last: int, rng: np.random.Generator
) -> dict[str, int]:
    """Write the rows from `first` up to `last` of all `rows`; returns how many cannot be used, by reason."""
    count = last - first
    happened = FIRST_TIME + SPAN * np.arange(first, last) // rows - rng.integers(0, DELAY, count)
    columns = {
        "user_id": population.users.take(_drawn(population.activity, count, rng)),
        "item_id": population.items.take(_drawn(population.popularity, count, rng)),
        "rating": RATINGS.take(_drawn(np.cumsum(RATING_SHARES), count, rng)),
        "time": pa.array(happened).cast(pa.string()),
    }
    # One draw decides on every row, so no row is spoilt twice.
    draw, unusable, low = rng.random(count), {}, 0.0
    for reason, (share, column, instead) in UNUSABLE.items():
        spoilt = (low <= draw) & (draw < low + share)
        columns[column] = pc.if_else(pa.array(spoilt), instead, columns[column])
        unusable[reason], low = int(spoilt.sum()), low + share
    short = pa.array((low <= draw) & (draw < low + SHORT_SHARE))
    table = pa.table(columns)
    pa.csv.write_csv(table.filter(pc.invert(short)), file, TEXT)
    ended = table.filter(short).select(["user_id", "item_id"])
    pa.csv.write_csv(ended, file, TEXT)
    return unusable | {SHORT: ended.num_rows}


def _write_users(folder: Path, ids: pa.StringArray, rng: np.random.Generator) -> None:
    countries = _names("country-", np.arange(60), digits=2).take(_drawn(shares(60, 2, 1).cumsum(), len(ids), rng))
    ages = pa.array(rng.integers(13, 90, len(ids))).cast(pa.string())
    _write_entities(folder, "users", [ids, _with_gaps(countries, 0.05, rng), _with_gaps(ages, 0.10, rng)])


def _write_items(folder: Path, ids: pa.StringArray, rng: np.random.Generator) -> None:
    categories = _names("category-", np.arange(50), digits=2).take(_drawn(shares(50, 2, 1).cumsum(), len(ids), rng))
    lengths = rng.integers(1, 7, len(ids))
    single = _names("tag-", np.arange(200), digits=3).take(_drawn(shares(200, 5, 1).cumsum(), lengths.sum(), rng))
    lists = pa.ListArray.from_arrays(pa.array(np.append(0, lengths.cumsum()), pa.int32()), single)
    tags = pc.binary_join(lists, "|")
    years = pa.array(rng.integers(1950, 2025, len(ids))).cast(pa.string())
    _write_entities(
        folder, "items", [ids, _with_gaps(categories, 0.02, rng), _with_gaps(tags, 0.05, rng), _with_gaps(years, 0.03, rng)]
    )


def _write_entities(folder: Path, side: str, columns: Sequence[pa.Array]) -> None:
    name, features = FEATURES[side]
    with (folder / name).open("wb") as file:
        file.write("\t".join([f"{side[:-1]}_id", *features]).encode() + b"\n")
        pa.csv.write_csv(pa.table(list(columns), names=["id", *features]), file, TEXT)


def _drawn(cumulative: Floats, count: int, rng: np.random.Generator) -> pa.Array:
    """`count` places, by cumulative shares."""
    places: Integers = np.searchsorted(cumulative, rng.random(count), side="right")
    return pa.array(places.clip(max=len(cumulative) - 1))


def _names(prefix: str, numbers: Integers, digits: int = 7) -> pa.StringArray:
    padded = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), digits, padding="0")
    return pc.binary_join_element_wise(prefix, padded, "")


def _with_gaps(values: pa.StringArray, share: float, rng: np.random.Generator) -> pa.StringArray:
    """The values, a share of them replaced by nothing."""
    return pc.if_else(pa.array(rng.random(len(values)) < share), "", values)


def main() -> None:
    """Generate as the command line says, and tell what cannot be used."""
    folder, rows, result = sys.argv[1:]
    write_result(Path(result), {"unusable": generate(Path(folder), int(rows))})


if __name__ == "__main__":
    main()
