"""Tables that a person reads: a dataset, a training, an evaluation, several runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.data.manifest import Manifest
from sibra_dist.errors import CheckpointError
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import EvaluationRequest, read_evaluation
from sibra_dist.training.run_folder import RunFolder

COMPARED = ("ndcg@10", "recall@10", "precision@10", "map@10", "hit_rate@10", "mrr@10", "coverage@10")


def dataset_table(manifest: Manifest, path: Path) -> Group:
    """What a dataset holds, and what became of the records it was made from."""
    counts, records = manifest.counts, manifest.records
    lines = [
        f"dataset {manifest.name} in {path}: {counts.users:,} users, {counts.items:,} items, "
        f"split {manifest.protocol.name} (seed {manifest.protocol.seed})",
        f"interactions: {counts.train:,} train, {counts.validation:,} validation, {counts.test:,} test",
        f"records: {records.read:,} read, {_tally(records.rejected, 'rejected')}, {_tally(records.filtered, 'left out')}, "
        f"{records.kept:,} kept",
    ]
    if manifest.rejected_side_information:
        lines.append(f"side information: {_tally(manifest.rejected_side_information, 'records rejected')}")
    table = Table("side", "feature", "kind", "size", "missing", title=None, box=None, pad_edge=False)
    for side in ("users", "items"):
        for spec in manifest.features(side):
            table.add_row(side, spec.name, spec.kind, f"{spec.size:,}", f"{spec.missing:,}")
    parts: list[Any] = [Text(line) for line in lines]
    return Group(*parts, table) if manifest.user_features or manifest.item_features else Group(*parts)


def training_summary(run: RunFolder) -> Text:
    """How a training ended, and what to do with it."""
    config = run.config()
    monitor = f"val/{config.training.monitor}"
    evaluations = [line for line in run.metrics() if monitor in line]
    best = max(evaluations, key=lambda line: line[monitor])
    return Text(
        f"trained {evaluations[-1]['epoch']} epochs; best {monitor} {best[monitor]:.4f} after epoch {best['epoch']}\n"
        f"run folder {run.path}; evaluate it with `sibra-dist evaluate {run.path}`"
    )


def evaluation_table(result: dict[str, Any]) -> Group:
    """Metrics by cutoff."""
    metrics: dict[str, float] = result["metrics"]
    names = list(dict.fromkeys(name.split("@")[0] for name in metrics))
    cutoffs = list(dict.fromkeys(name.split("@")[1] for name in metrics))
    table = Table("metric", *(f"@{cutoff}" for cutoff in cutoffs), box=None, pad_edge=False)
    for name in names:
        table.add_row(name, *(f"{metrics[f'{name}@{cutoff}']:.4f}" for cutoff in cutoffs))
    counts = result["counts"]
    hidden = f", without {', '.join(result['hidden'])}" if result["hidden"] else ""
    notes = [f"{result['split']} split{hidden}: {counts['users']:,} users, {counts['candidates']:,} candidates each"]
    notes += [
        f"{counts[key]:,} {key.replace('_', ' ')}"
        for key in ("users_without_relevant", "users_without_modality", "items_without_modality")
        if counts[key]
    ]
    return Group(Text("; ".join(notes)), table)


def comparison_table(runs: Sequence[Path]) -> Table:
    """Evaluated runs side by side on the test split.

    Raises:
        CheckpointError: a run has not been evaluated, or they were evaluated on different datasets.
    """
    names = [path.name for path in runs]
    results = {}
    for path in runs:
        run = RunFolder(path)
        run.config()
        try:
            result = read_evaluation(run, EvaluationRequest())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} has no evaluation of the test split: run `sibra-dist evaluate {path}`") from error
        results[path.name if names.count(path.name) == 1 else str(path)] = result
    if len({result["dataset"] for result in results.values()}) > 1:
        raise CheckpointError("these runs were evaluated on different datasets, so their figures cannot be compared")
    found = {name.removeprefix("test/"): None for result in results.values() for name in result["metrics"]}
    # Folded, not cut off: runs that are named by the time they began differ in their last letters.
    columns = (Column(name, overflow="fold") for name in results)
    table = Table(Column("test split", no_wrap=True), *columns, box=None, pad_edge=False)
    for name in [name for name in COMPARED if name in found] or found:
        values = [result["metrics"].get(f"test/{name}") for result in results.values()]
        table.add_row(name, *("-" if value is None else f"{value:.4f}" for value in values))
    return table


def trials_table(trials: Sequence[dict[str, Any]], config: TrainConfig) -> Table:
    """The trials of a search, best first."""
    searched = list(config.tune.search) if config.tune else []
    table = Table("trial", f"val/{config.training.monitor}", "epochs", *searched, box=None, pad_edge=False)
    for trial in trials:
        value = trial["value"]
        shown = (_short(trial["settings"][path]) for path in searched)
        table.add_row(trial["name"], "failed" if value is None else f"{value:.4f}", str(trial["epochs"]), *shown)
    return table


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tally(counts: dict[str, int], what: str) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count)
    return f"{sum(counts.values()):,} {what}" + (f" ({reasons})" if reasons else "")
