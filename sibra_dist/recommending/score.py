"""Scores the recommendations of any system as those of a run are evaluated: same candidates, masks, metrics and files."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sibra_dist.data.dataset import Candidates, Dataset, HeldOut
from sibra_dist.data.publish import writing
from sibra_dist.data.storage import Place
from sibra_dist.errors import CheckpointError, ConfigError, SourceError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.findings import Evaluation, Findings
from sibra_dist.evaluation.metrics import OVER_ALL_CANDIDATES, parse_metric, split_metrics
from sibra_dist.evaluation.per_user import PIECE_BYTES, UserParts
from sibra_dist.evaluation.ranking import NO_CANDIDATE
from sibra_dist.evaluation.truth import Tile, Truth
from sibra_dist.recommending.division import Ids, Records, Rejections, as_read, divide
from sibra_dist.recommending.listings import Numbers
from sibra_dist.recommending.manifest import REJECTED
from sibra_dist.recommending.records import RANK, Source
from sibra_dist.training.evaluation import FILES, prefixed, publish_evaluation
from sibra_dist.training.run_folder import RunFolder

MASKED = "masked for the user"
DUPLICATE = "duplicate"
REMEDY = "Make room there, and for temporary files (TMPDIR), or give another folder with --to"


@dataclass(frozen=True)
class Scored:
    """What is to be scored."""

    source: str
    """A table, or a folder of them: see `Source`."""
    split: HeldOut = "test"
    metrics: tuple[str, ...] = ()
    """Such as `ndcg@10`; by default those of an `EvaluationConfig`."""
    candidates: Candidates = "split"
    """What may be recommended."""

    def names(self) -> list[str]:
        """The metrics, each once.

        Raises:
            ConfigError: one is not known, or needs more than the best of the candidates.
        """
        names = list(dict.fromkeys(self.metrics or EvaluationConfig().names))
        for name in names:
            if parse_metric(name)[0] in OVER_ALL_CANDIDATES:
                raise ConfigError(f"--metric {name}: it compares all candidates, and recommendations hold a few of them")
        return names


def score(scored: Scored, dataset: Dataset, to: RunFolder) -> None:
    """Score recommendations; writes `evaluation/<split>/` with metrics.json, users.parquet and rejected.csv to a folder.

    A result that was there before stays as it is until all of the new one is known.

    Raises:
        SibraError: the recommendations or a metric cannot be used, the folder holds a run, lies in that of the
            recommendations, or cannot be written.
    """
    names = scored.names()
    if to.exists:
        raise CheckpointError(f"{to.name} holds a run with results of its own; give another folder with --to")
    if f"{to.place}/".startswith(f"{Place.at(scored.source)}/"):
        raise ConfigError(f"--to {to.name}: the result would be one of the tables in {scored.source}; give a folder beside it")
    source, truth = Source.of(scored.source), Truth.of(dataset, scored.split, scored.candidates)
    folder, of_users = to.evaluation(scored.split), split_metrics(names)[0]
    users = UserParts(folder, "recommendations.parts", 0, of_users)
    with TemporaryDirectory() as temporary, TemporaryFile() as told, writing(folder, REMEDY):
        rejections = Rejections(scored.source, told)
        try:
            (folder / users.parts).delete_all()
            evaluation, records = _judged(source, truth, names, Path(temporary), rejections, users)
            users.flush()
            if users.error is not None:
                raise users.error
            result: dict[str, Any] = {
                "split": scored.split,
                "candidates": scored.candidates,
                "hidden": [],
                "epoch": None,
                "dataset": dataset.manifest.digest,
                "recommendations": {"source": scored.source, **records, "rejected": dict(sorted(rejections.counts.items()))},
                "counts": evaluation.counts,
                "metrics": prefixed(evaluation.metrics, scored.split),
                "item_groups": evaluation.item_groups,
            }
            told.seek(0)
            if rejections.counts:
                folder.write(REJECTED, iter(lambda: memoryview(told.read(PIECE_BYTES)), b""))
            else:
                folder.delete([REJECTED])
            parts = users.parts, [users.count]
            publish_evaluation(to, FILES, result, parts, dataset, of_users, EvaluationConfig().max_groups)
        finally:
            with suppress(OSError):
                users.delete()


def _judged(
    source: Source, truth: Truth, names: list[str], temporary: Path, rejections: Rejections, users: UserParts
) -> tuple[Evaluation, dict[str, int]]:
    """What is found of recommendations, and how many records there are, and are used."""
    ids = Ids(truth.dataset.ids("users"), truth.dataset.ids("items"))
    cutoffs = sorted({cutoff for _, cutoff in map(parse_metric, names)})
    findings = Findings(truth.dataset, truth.candidates, names, torch.device("cpu"), users.add, cutoffs)
    parts, count = divide(source, truth, ids, temporary, rejections)
    used, empty, short = 0, 0, 0
    for part in parts:
        tile = truth.tile(torch.arange(part.start, part.stop))
        records = part.read()
        records["row"] -= part.start
        records, refused = _usable(records, source, tile, len(truth.candidates), ids)
        for reason, which in refused.items():
            rejections.add(reason, as_read(which, source, tile.users, truth.candidates, ids))
        items = _lists(records, len(tile.users), findings.length)
        findings.add(tile.users, items, tile.relevant, tile.masked[1])
        lengths = (items >= 0).sum(dim=1)[tile.relevant.lengths() > 0]
        empty += int((lengths == 0).sum())
        short += int(((lengths > 0) & (lengths < findings.length)).sum())
        used += len(records)
    counts = {"users_without_recommendations": empty, "users_with_short_lists": short}
    return findings.evaluation(counts), {"records": count, "used": used}


def _usable(records: Records, source: Source, tile: Tile, num_candidates: int, ids: Ids) -> tuple[Records, dict[str, Records]]:
    """The records of a tile that count, each user's best first, and those that do not, by reason.

    Of those that repeat a user and an item the best counts.

    Raises:
        SourceError: two items have the same rank for a user.
    """
    records = records[np.lexsort((records["order"], _keys(records, num_candidates)))]
    keys = _keys(records, num_candidates)
    repeats = np.zeros(len(records), bool)
    repeats[1:] = keys[1:] == keys[:-1]
    duplicates, records = records[repeats], records[~repeats]
    records = records[np.lexsort((records["item"], records["order"], records["row"]))]
    ties = np.flatnonzero((records["row"][1:] == records["row"][:-1]) & (records["order"][1:] == records["order"][:-1]))
    if source.ranked and len(ties):
        tie = records[ties[0]]
        user = ids.users[int(tile.users[tie["row"]])].as_py()
        raise SourceError(
            f"{source.name} gives two items {RANK} {tie['order']:g} for user {user!r}; give each a {RANK} of its own, or scores"
        )
    rows, candidates = (part.numpy() for part in tile.masked)
    masked = np.isin(_keys(records, num_candidates), (rows * num_candidates + candidates)[candidates >= 0])
    return records[~masked], {DUPLICATE: duplicates, MASKED: records[masked]}


def _keys(records: Records, num_candidates: int) -> Numbers:
    """A number for each pair of a user and a candidate."""
    keys: Numbers = records["row"].astype(np.int64) * num_candidates + records["item"]
    return keys


def _lists(records: Records, num_users: int, length: int) -> Tensor:
    """The candidates of each user, int64 [U, length], of records in order; -1 where there are fewer."""
    rows = records["row"]
    counts = np.bincount(rows, minlength=num_users)
    places = np.arange(len(rows)) - (counts.cumsum() - counts)[rows]
    listed = places < length
    items = np.full((num_users, length), NO_CANDIDATE, np.int64)
    items[rows[listed], places[listed]] = records["item"][listed]
    return torch.from_numpy(items)
