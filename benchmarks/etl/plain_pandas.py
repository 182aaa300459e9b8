"""The same preparation without Spark: what a competent person would write with pandas, for one machine's memory.

It reads and writes what `sibra-dist prepare` does, by the columns of docs/dataset.md. It leaves out what makes a dataset of
the result: the manifest, checksums, the check for leakage, bytes that do not depend on the order of the records.

    python -m benchmarks.etl.plain_pandas SOURCE TO RESULT
"""

import csv
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.etl.measuring import Stopwatch, write_result
from benchmarks.etl.task import CORE, FEATURES, INTERACTIONS, MIN_RATING, SEED, TEST, VALIDATION

SPLITS = ("train", "validation", "test")
Codes = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pairs:
    """Interactions as positions: of users in `users`, of items in `items`, the sorted ids; and of splits in `SPLITS`."""

    user: Codes
    item: Codes
    users: pd.Index
    items: pd.Index
    split: npt.NDArray[np.int8]


def prepare(source: Path, to: Path, progress: Callable[[str], None]) -> dict[str, int]:
    """Prepare the interactions in `source` and write them to the folder `to`, which is replaced.

    Args:
        source: what `synthetic.generate` wrote.
        to: the folder of the tables.
        progress: called with the name of each stage as it begins.

    Returns:
        The numbers of `task.COUNTS`.
    """
    shutil.rmtree(to, ignore_errors=True)
    progress("read")
    interactions, refused = read_interactions(source)
    rejected_interactions = sum(map(len, refused))
    read = len(interactions) + rejected_interactions
    known = {"users": interactions["user_id"].unique(), "items": interactions["item_id"].unique()}
    side_information = {}
    for side in FEATURES:
        side_information[side], unknown = read_entities(source, side, known[side])
        refused.append(unknown)

    progress("filter")
    interactions = interactions[interactions["rating"] >= MIN_RATING].drop(columns="rating")
    # As integers the ids are compared and grouped many times faster, and take a fraction of the memory.
    user, users = pd.factorize(interactions["user_id"], sort=True)
    item, items = pd.factorize(interactions["item_id"], sort=True)
    interactions = pd.DataFrame(
        {"user": user.astype(np.int32), "item": item.astype(np.int32), "time": interactions["time"].to_numpy()}
    )
    interactions = interactions.sort_values("time", kind="stable").drop_duplicates(["user", "item"], keep="last")
    interactions = k_core(interactions[["user", "item"]], CORE)

    progress("index")
    present_users, user = np.unique(interactions["user"], return_inverse=True)
    present_items, item = np.unique(interactions["item"], return_inverse=True)

    progress("split")
    split = random_split(user, np.random.default_rng(SEED))
    pairs = Pairs(user.astype(np.int32), item.astype(np.int32), users[present_users], items[present_items], split)
    del interactions, user, item

    progress("features")
    entities = {
        side: encode_entities(side_information[side], ids, FEATURES[side][1])
        for side, ids in (("users", pairs.users), ("items", pairs.items))
    }

    progress("write")
    for side, table in entities.items():
        _write(table, to / side)
    training = split == 0
    _write(lists(pairs.user, pairs.item, "items", training, len(pairs.users)), to / "histories/users")
    _write(lists(pairs.item, pairs.user, "users", training, len(pairs.items)), to / "histories/items")
    for number, name in ((1, "validation"), (2, "test")):
        held_out = lists(pairs.user, pairs.item, "items", split == number, len(pairs.users))
        _write(held_out.filter(held_out["items"].is_valid()), to / "held_out" / name)
    _write(pa.Table.from_pandas(pd.concat(refused), preserve_index=False), to / "rejected")
    sizes = np.bincount(split, minlength=len(SPLITS))
    return {
        "read": read,
        "rejected": rejected_interactions,
        "kept": len(split),
        "users": len(pairs.users),
        "items": len(pairs.items),
        **{name: int(size) for name, size in zip(SPLITS, sizes, strict=True)},
    }


def read_interactions(source: Path) -> tuple[pd.DataFrame, list[pd.DataFrame]]:
    """The usable interactions, and those that are not, with the reason, for each file."""
    usable, refused = [], []
    for path in sorted(source.glob(INTERACTIONS)):
        text = _read_text(path)
        rating = pd.to_numeric(text["rating"], errors="coerce").to_numpy(float, na_value=np.nan)
        time = pd.to_numeric(text["time"], errors="coerce").to_numpy(float, na_value=np.nan)
        faults = {
            "wrong number of fields": (text["rating"] == "") & (text["time"] == ""),
            "no user id": text["user_id"] == "",
            "no item id": text["item_id"] == "",
            "rating is not a finite number": ~np.isfinite(rating),
            "time cannot be read": ~np.isfinite(time),
        }
        flags = [np.asarray(fault, dtype=bool) for fault in faults.values()]
        bad = np.logical_or.reduce(flags)
        reasons = np.select([flag[bad] for flag in flags], list(faults), default="")
        refused.append(_refused("interactions", path, reasons, text[bad]))
        text["rating"], text["time"] = rating, time
        usable.append(text[~bad])
    return pd.concat(usable, ignore_index=True), refused


def read_entities(source: Path, side: str, known: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The side information of `known` users or items, by id, and the records that are about others."""
    path = source / FEATURES[side][0]
    text = _read_text(path)
    unknown = ~text.iloc[:, 0].isin(known)
    refused = _refused(side, path, np.full(unknown.sum(), "unknown id"), text[unknown])
    return text[~unknown].set_index(text.columns[0]), refused


def k_core(pairs: pd.DataFrame, k: int) -> pd.DataFrame:
    """The largest part of distinct pairs in which each user and each item has at least `k`."""
    while True:
        before = len(pairs)
        for key in ("user", "item"):
            counts = np.bincount(pairs[key])
            pairs = pairs[counts[pairs[key]] >= k]
        if len(pairs) == before:
            return pairs


def random_split(user: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """For each interaction its place in `SPLITS`: of a user's n, in random order, ceil(n * share) test and validate."""
    order = np.lexsort((rng.random(len(user)), user))
    counts = np.bincount(user)
    starts = np.cumsum(counts) - counts
    position = np.arange(len(user)) - starts[user[order]]
    # Rounded, as 30 * 0.1 in binary fractions is a little more than 3.
    test, validation = (np.ceil((counts * share).round(9)).astype(int)[user[order]] for share in (TEST, VALIDATION))
    split = np.empty(len(user), np.int8)
    split[order] = np.select([position < test, position < test + validation], [2, 1], default=0)
    return split


def encode_entities(side_information: pd.DataFrame, ids: pd.Index, features: Mapping[str, str]) -> pa.Table:
    """The table of one side: every entity is a training entity, as interactions are what is split."""
    wide = side_information.reindex(ids)
    columns = {
        "index": pa.array(np.arange(len(ids), dtype=np.int32)),
        "id": pa.array(ids.to_numpy(), pa.string()),
        "split": pa.array(np.full(len(ids), "train"), pa.string()),
    }
    for name, kind in features.items():
        values = wide[name].replace("", pd.NA)
        columns[name] = {"category": _category, "tags": _tags, "numeric": _numeric}[kind](values)
    return pa.table(columns)


def lists(key: Codes, other: Codes, name: str, chosen: Flags, count: int) -> pa.Table:
    """Columns `index` and `name`: for each of `count` keys the sorted others it is paired with where `chosen`, or null."""
    key, other = key[chosen], other[chosen]
    return pa.table({"index": pa.array(np.arange(count, dtype=np.int32)), name: _lists(key, other, count)})


def _lists(key: Codes, other: Codes, count: int) -> pa.ListArray:
    order = np.lexsort((other, key))
    lengths = np.bincount(key, minlength=count)
    offsets = pa.array(np.append(0, lengths.cumsum()).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(other[order], pa.int32()), mask=pa.array(lengths == 0))


def _category(values: pd.Series) -> pa.Array:
    codes, _ = pd.factorize(values, sort=True)
    return pa.array(codes.astype(np.int32), mask=codes < 0)


def _tags(values: pd.Series) -> pa.Array:
    single = values.reset_index(drop=True).dropna().str.split("|").explode()
    codes, _ = pd.factorize(single, sort=True)
    pairs = pd.DataFrame({"index": single.index, "code": codes.astype(np.int32)}).drop_duplicates()
    return _lists(pairs["index"].to_numpy(np.int32), pairs["code"].to_numpy(), len(values))


def _numeric(values: pd.Series) -> pa.Array:
    numbers = pd.to_numeric(values).to_numpy(float, na_value=np.nan)
    scaled = (numbers - np.nanmean(numbers)) / np.nanstd(numbers)
    present = np.isfinite(scaled)
    offsets = pa.array(np.append(0, present.cumsum()).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(scaled[present], pa.float32()), mask=pa.array(~present))


def _read_text(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, sep="\t", dtype="string[pyarrow]", quoting=csv.QUOTE_NONE, keep_default_na=False).fillna("")


def _refused(table: str, path: Path, reasons: npt.NDArray[np.str_], text: pd.DataFrame) -> pd.DataFrame:
    records = ["\t".join(record) for record in text.itertuples(index=False)]
    return pd.DataFrame({"table": table, "file": path.name, "reason": reasons, "record": records}, dtype="string[pyarrow]")


def _write(table: pa.Table, folder: Path) -> None:
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part-00000.parquet", compression="zstd")


def main() -> None:
    """Prepare as the command line says, and tell how."""
    source, to, result = map(Path, sys.argv[1:])
    stopwatch = Stopwatch()
    counts = prepare(source, to, stopwatch)
    write_result(result, {"counts": counts, "stages": stopwatch.stop()})


if __name__ == "__main__":
    main()
