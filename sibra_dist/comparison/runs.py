"""Reads what evaluated runs achieved for each user, and tests each run against the first."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sibra_dist.comparison.significance import (
    Outcome,
    Values,
    bonferroni,
    bootstrap_interval,
    differences,
    effect_size,
    holm,
    t_test,
    wilcoxon,
)
from sibra_dist.data.dataset import HeldOut
from sibra_dist.errors import CheckpointError, ConfigError, nearest
from sibra_dist.evaluation.metrics import CATALOG_METRICS
from sibra_dist.evaluation.per_user import read_users
from sibra_dist.training.evaluation import PREFIXES, read_result, remedy
from sibra_dist.training.run_folder import RunFolder

ID = "user_id"


@dataclass(frozen=True)
class Corrected:
    """A test's outcome, and its p over all the runs that are compared."""

    outcome: Outcome
    bonferroni: float
    holm: float


@dataclass(frozen=True)
class Against:
    """A run against the first one; differences are the run's values minus the first's, of each user."""

    difference: float
    interval: tuple[float, float]
    """95 %, of the mean difference"""
    effect_size: float
    t_test: Corrected
    wilcoxon: Corrected


@dataclass(frozen=True)
class Line:
    """A run by one metric."""

    metric: str
    run: str
    users: int
    mean: float
    against: Against | None
    """None for the first run."""


def compare_runs(runs: Sequence[str | Path], split: HeldOut, metrics: Sequence[str], resamples: int, seed: int) -> list[Line]:
    """By metric, a line for each run in the given order.

    Args:
        runs: evaluated runs, the first of which the others are compared with.
        split: which evaluation.
        metrics: metrics of users, such as `ndcg@10`.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: there are fewer than two runs, or a metric is not one that all were evaluated by.
        CheckpointError: a run has no evaluation, or the evaluations are not of the same.
    """
    if len(runs) < 2:
        raise ConfigError("give two runs or more: the first is what the others are compared with")
    folders = [RunFolder(path) for path in runs]
    names = [Path(folder.name).name for folder in folders]
    names = [name if names.count(name) == 1 else folder.name for name, folder in zip(names, folders, strict=True)]
    results = [read_result(folder, split) for folder in folders]
    for folder, result in zip(folders[1:], results[1:], strict=True):
        _require_same(folders[0].name, results[0], folder.name, result)
    metrics = list(dict.fromkeys(metrics))
    _require_known(metrics, results, split)
    tables = [
        read_users(folder.evaluation(split), result.get("users"), [ID, *metrics], remedy(folder, split))
        for folder, result in zip(folders, results, strict=True)
    ]
    if len(tables[0]) < 2:
        raise CheckpointError(f"{folders[0].name} was evaluated on {len(tables[0])} users; two or more are needed for a test")
    values = [_aligned(folder, table, tables[0]) for folder, table in zip(folders, tables, strict=True)]
    return [
        line
        for metric in metrics
        for line in _lines(metric, names, [table[metric].to_numpy() for table in values], resamples, seed)
    ]


def _lines(metric: str, names: Sequence[str], values: Sequence[Values], resamples: int, seed: int) -> list[Line]:
    found = [differences(value, values[0]) for value in values[1:]]
    tests = [
        [
            Corrected(*line)
            for line in zip(
                outcomes,
                bonferroni([outcome.p_value for outcome in outcomes]),
                holm([outcome.p_value for outcome in outcomes]),
                strict=True,
            )
        ]
        for outcomes in ([t_test(one) for one in found], [wilcoxon(one) for one in found])
    ]
    against = [
        Against(one.mean, bootstrap_interval(one, resamples, seed), effect_size(one), *both)
        for one, *both in zip(found, *tests, strict=True)
    ]
    return [
        Line(metric, name, len(value), float(np.mean(value)), other)
        for name, value, other in zip(names, values, [None, *against], strict=True)
    ]


def _require_same(first: str, expected: dict[str, Any], other: str, found: dict[str, Any]) -> None:
    """Check that two results are of the same dataset, split, candidates and hidden modalities."""
    pairs = zip(_terms(expected), _terms(found), strict=True)
    if told := [f"{name} {now} and {was}" for (_, was), (name, now) in pairs if was != now]:
        raise CheckpointError(
            f"{other} and {first} were evaluated on what is not the same, so their figures cannot be compared: "
            f"{'; '.join(told)}"
        )


def _terms(result: dict[str, Any]) -> list[tuple[str, object]]:
    # The candidates of a split are all items or a part of them, so as many are the same.
    return [
        ("dataset", str(result.get("dataset"))[:12]),
        ("split", result.get("split")),
        ("hidden", ", ".join(result.get("hidden", ())) or "nothing"),
        ("candidates", result.get("counts", {}).get("candidates")),
    ]


def _require_known(metrics: Sequence[str], results: Sequence[dict[str, Any]], split: HeldOut) -> None:
    columns = [[name.removeprefix(f"{PREFIXES[split]}/") for name in result.get("metrics", {})] for result in results]
    shared = [name for name in columns[0] if _of_users(name) and all(name in others for others in columns)]
    for metric in metrics:
        if metric not in shared:
            raise ConfigError(
                f"--metric {metric}: it is none of users that all of these runs were evaluated by; {nearest(metric, shared)}"
            )


def _of_users(metric: str) -> bool:
    return metric.partition("@")[0] not in CATALOG_METRICS


def _aligned(run: RunFolder, table: pa.Table, first: pa.Table) -> pa.Table:
    """The rows of `table`, in the order of the users of `first`."""
    if table[ID].equals(first[ID]):
        return table
    places = pc.index_in(first[ID].combine_chunks(), table[ID].combine_chunks())
    if places.null_count or len(table) != len(first) or pc.count_distinct(places).as_py() != len(first):
        raise CheckpointError(f"{run.name} was evaluated on other users than the first run, so they cannot be compared")
    return table.take(places)
