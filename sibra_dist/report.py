"""Tables that a person reads: a dataset, a training, an evaluation, several runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.data.manifest import SIDES, Counts, Manifest, Records, Side
from sibra_dist.data.storage import Place
from sibra_dist.describe import PERCENTILES, modality, share_of
from sibra_dist.description import Description, EntitiesDescription, Modality
from sibra_dist.errors import CheckpointError
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.evaluation import read_result
from sibra_dist.training.profiling import WARM_UP, read_profile
from sibra_dist.training.run_folder import RunFolder

COMPARED = ("ndcg@10", "recall@10", "precision@10", "map@10", "hit_rate@10", "mrr@10", "coverage@10")
WITHOUT_SHARES = ("leave_one_out", "fixed")
"""The protocols that do not divide by the shares that are asked for."""


def dataset_table(manifest: Manifest, path: str | Path) -> Group:
    """What a dataset holds, and what became of the records it was made from; from its manifest alone.

    Args:
        manifest: what says so.
        path: how the place of the dataset is told.
    """
    counts, protocol = manifest.counts, manifest.protocol
    lines = [
        f"dataset {manifest.name} in {path}: {counts.users:,} users, {counts.items:,} items, "
        f"split {protocol.name} (seed {protocol.seed})",
        _interactions(counts),
        *_records(manifest.records, manifest.rejected_side_information),
    ]
    table = _figures("side", "feature", "kind", "size", "present", "share", "unknown values", words=3)
    for side in SIDES:
        count = counts.users if side == "users" else counts.items
        for spec in manifest.features(side):
            table.add_row(side, spec.name, *_modality_cells(modality(spec, count - spec.missing, count)))
    parts: list[RenderableType] = [Text(line) for line in lines]
    return Group(*parts, table) if table.row_count else Group(*parts)


def description_table(description: Description) -> Group:
    """Everything that is told of a dataset, for a terminal of 100 columns; `describe` says what each figure counts."""
    protocol, density = description.protocol, description.density
    asked = "" if protocol.name in WITHOUT_SHARES else f", {protocol.validation:g} validation, {protocol.test:g} test"
    extends = f"; extends {description.extends[:12]}" if description.extends else ""
    lines = [
        f"digest {description.digest[:12]}, format {description.format_version}, made by sibra-dist "
        f"{description.package_version}{extends}",
        f"split {protocol.name} (seed {protocol.seed}{asked})",
        f"{description.counts.users:,} users, {description.counts.items:,} items",
        _interactions(description.counts),
        f"density: {_significant(density.train)} of all pairs of a user and an item are in training, "
        f"{_significant(density.all)} in any split",
        *_columns(description),
        *_records(description.records, description.rejected_side_information),
    ]
    tables = (
        _cold(description),
        _held_out(description),
        _histories(description),
        _popularity(description),
        _modalities(description),
        _files(description),
    )
    # A path stays in one line, to be copied; all else is broken between words where the terminal ends.
    parts: list[RenderableType] = [Text(f"dataset {description.name} in {description.place}")]
    parts += [Text(line, no_wrap=False, overflow="fold") for line in lines]
    return Group(*parts, *[part for table in tables for part in (Text(), table)])


def training_summary(run: RunFolder) -> Text:
    """How a training ended, and what to do with it."""
    config = run.config()
    monitor = f"val/{config.training.monitor}"
    evaluations = [line for line in run.metrics() if monitor in line]
    best = max(evaluations, key=lambda line: line[monitor])
    last = evaluations[-1]
    peaks = {"in memory, mapped files included": "peak_rss_mebibytes", "on its GPU": "peak_gpu_mebibytes"}
    memory = last.get("memory", {})  # which a run of an earlier version has not told
    told = [f"{memory[name]:,} MiB {where}" for where, name in peaks.items() if name in memory]
    return Text(
        f"trained {last['epoch']} epochs; best {monitor} {best[monitor]:.4f} after epoch {best['epoch']}\n"
        + (f"peak of a rank: {', '.join(told)}\n" if told else "")
        + f"run folder {run.name}; evaluate it with `sibra-dist evaluate {run.name}`"
    )


def profile_table(folder: Place) -> RenderableType:
    """Where the time of training steps, and of an evaluation, went; from the profile in a run's folder."""
    profile = read_profile(folder)
    parts: list[RenderableType] = []
    for name, unit in (("steps", "a step"), ("evaluation", "an evaluation")):
        if name not in profile:
            continue
        count, seconds = profile[name]["count"], profile[name]["seconds"]
        table = _figures("phase", f"ms {unit}", "share", words=1)
        total = sum(seconds.values())
        for phase, taken in seconds.items():
            table.add_row(phase, f"{1e3 * taken / count:.2f}", f"{taken / total:.1%}")
        table.add_row("all", f"{1e3 * total / count:.2f}", "")
        parts += [table, Text()]
    if not parts:
        return Text(f"nothing was profiled: an epoch needs more than {WARM_UP} steps, and training had nothing left to do")
    return Group(*parts, Text(f"traces for chrome://tracing or https://ui.perfetto.dev in {folder}"))


def evaluation_table(result: dict[str, Any]) -> Group:
    """Metrics by cutoff; those that have none, in a column of their own."""
    metrics: dict[str, float] = result["metrics"]
    parts = {metric: metric.partition("@") for metric in metrics}
    cutoffs = list(dict.fromkeys(at + cutoff for _, at, cutoff in parts.values()))
    rows: dict[str, dict[str, str]] = {}
    for metric, (name, at, cutoff) in parts.items():
        rows.setdefault(name, {})[at + cutoff] = f"{metrics[metric]:.4f}"
    table = Table("metric", *(cutoff or "all" for cutoff in cutoffs), box=None, pad_edge=False)
    for name, values in rows.items():
        table.add_row(name, *(values.get(cutoff, "") for cutoff in cutoffs))
    counts = result["counts"]
    hidden = f", without {', '.join(result['hidden'])}" if result["hidden"] else ""
    ranked = " (all items)" if result.get("candidates") == "all" else ""
    notes = [f"{result['split']} split{hidden}: {counts['users']:,} users, {counts['candidates']:,} candidates each{ranked}"]
    notes += [
        f"{counts[key]:,} {key.replace('_', ' ')}" for key in counts if key not in ("users", "candidates") and counts[key]
    ]
    return Group(Text("; ".join(notes)), table)


def comparison_table(runs: Sequence[str | Path]) -> Table:
    """Evaluated runs side by side on the test split.

    Raises:
        CheckpointError: a run has not been evaluated, or they were evaluated on different datasets.
    """
    folders = [RunFolder(path) for path in runs]
    names = [Path(run.name).name for run in folders]
    results = {
        name if names.count(name) == 1 else run.name: read_result(run, "test") for run, name in zip(folders, names, strict=True)
    }
    if len({result["dataset"] for result in results.values()}) > 1:
        raise CheckpointError("these runs were evaluated on different datasets, so their figures cannot be compared")
    found = {name.removeprefix("test/"): None for result in results.values() for name in result["metrics"]}
    # Folded, not cut off: runs that are named by the time they began differ in their last letters.
    columns = (Column(name, overflow="fold") for name in results)
    table = Table(Column("test split", no_wrap=True), *columns, box=None, pad_edge=False)
    if any(result["hidden"] for result in results.values()):
        table.add_row("without", *(", ".join(result["hidden"]) or "-" for result in results.values()))
    ranked = ["all items" if result.get("candidates") == "all" else "split" for result in results.values()]
    if "all items" in ranked:
        table.add_row("candidates", *ranked)
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


def _figures(*headings: str, words: int = 1) -> Table:
    """A table with so many columns of words and then figures, of which none is ever cut off."""
    columns = [Column(text, overflow="fold", justify="left" if n < words else "right") for n, text in enumerate(headings)]
    return Table(*columns, box=None, pad_edge=False)


def _interactions(counts: Counts) -> str:
    splits = {"train": counts.train, "validation": counts.validation, "test": counts.test}
    total = sum(splits.values())
    told = (f"{count:,} {split} ({_percent(share_of(count, total))})" for split, count in splits.items())
    return f"interactions: {', '.join(told)}"


def _records(records: Records, side_information: dict[str, int]) -> list[str]:
    told = f"{_tally(records.rejected, 'rejected')}, {_tally(records.filtered, 'left out')}"
    lines = [f"records: {records.read:,} read, {told}, {records.kept:,} kept"]
    return [*lines, f"side information: {_tally(side_information, 'records rejected')}"] if side_information else lines


def _sides(description: Description) -> tuple[tuple[Side, EntitiesDescription], ...]:
    return ("users", description.users), ("items", description.items)


def _columns(description: Description) -> list[str]:
    """What training interactions tell besides user and item."""
    weights, times = description.weights, description.times
    lines = [f"weights: {weights.min:g} to {weights.max:g}, mean {weights.mean:g}"] if weights else []
    return [*lines, f"times: from {times.earliest} to {times.latest}"] if times else lines


def _cold(description: Description) -> Table:
    headings = ("cold", "share", "first in validation", "first in test", "others", "no modality", "share")
    table = _figures("cold (no history)", *headings)
    for side, entities in _sides(description):
        cold, without = entities.cold, entities.without_modality
        figures = (f"{count:,}" for count in (cold.validation, cold.test, cold.others, without.count))
        table.add_row(side, f"{cold.count:,}", _percent(cold.share), *figures, _percent(without.share))
    return table


def _held_out(description: Description) -> Table:
    table = _figures("held out", "users", "candidates", "interactions", "warm", "cold item", "cold user", "both cold")
    for split, held in description.held_out.items():
        parts = (held.warm, held.cold_item, held.cold_user, held.cold_both)
        table.add_row(split, *(f"{count:,}" for count in (held.users, held.candidates, held.interactions, *parts)))
    return table


def _histories(description: Description) -> Table:
    percentiles = [f"p{percent}" for percent in PERCENTILES]
    table = _figures("history lengths", "with one", "min", *percentiles, "max", "mean")
    for side, entities in _sides(description):
        if (lengths := entities.history_lengths) is not None:
            names = ("entities", "min", *percentiles, "max")
            table.add_row(side, *(f"{getattr(lengths, name):,}" for name in names), f"{lengths.mean:,.1f}")
    return table


def _popularity(description: Description) -> Table:
    table = _figures("items by popularity", "items", "share of training interactions")
    if (found := description.popularity) is not None:
        for name, head in (("top 1 %", found.top_1_percent), ("top 20 %", found.top_20_percent)):
            table.add_row(name, f"{head.items:,}", _percent(head.share))
        table.add_row("all with a history", f"{found.items:,}", _percent(1.0))
    return table


def _modalities(description: Description) -> Table:
    table = _figures("side", "modality", "kind", "size", "present", "share", "of the cold", "unknown values", words=3)
    for side, entities in _sides(description):
        for name, found in entities.modalities.items():
            *cells, unknown = _modality_cells(found)
            table.add_row(side, name, *cells, _percent(found.share_of_cold), unknown)
    return table


def _modality_cells(found: Modality) -> tuple[str, ...]:
    """Kind, size, how many have it, their share, and what became of values without a code of their own."""
    unknown = "-" if found.unknown is None else f"{found.unknown:,} ({'code 0' if found.unknown_code else 'no code'})"
    return found.kind, f"{found.size:,}", f"{found.present:,}", _percent(found.share), unknown


def _files(description: Description) -> Table:
    storage = description.storage
    table = _figures("table", "rows", "on disk", "shards", "smallest", "largest")
    for name, size in storage.tables.items():
        sizes = (_bytes(size.smallest_shard), _bytes(size.largest_shard))
        table.add_row(name, f"{size.rows:,}", _bytes(size.bytes), f"{size.shards:,}", *sizes)
    table.add_row("all", "", _bytes(storage.bytes), f"{storage.shards:,}", "", "")
    return table


def _percent(share: float | None) -> str:
    """Never 0 % of something, nor 100 % of less than all."""
    if share is None:
        return "-"
    if 0 < share < 0.001:
        return "<0.1 %"
    return ">99.9 %" if 0.999 < share < 1 else f"{share:.1%}".replace("%", " %")


def _significant(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if size < 100 and unit != "B" else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
