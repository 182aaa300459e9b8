"""What each modality is worth: an evaluation with it hidden, and one with it alone of its side.

Hidden is missing, as everywhere: every row is an evaluation with other modalities in `hide`, and nothing else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sibra_dist.data.dataset import Dataset, HeldOut
from sibra_dist.errors import ConfigError
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.models.base import Recommender


@dataclass(frozen=True)
class Row:
    """One choice of what is hidden."""

    kind: Literal["full", "without", "only"]
    """`full`: what is hidden in every row, and no more; `without`: the modality too; `only`: all others of its side too"""
    modality: str | None
    """As `items.cover`; None in the full row"""
    hide: Mapping[str, float]
    """Share of the entities that lose a modality, by name"""


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found; see `sibra_dist.evaluation.evaluate`."""

    metrics: dict[str, float]
    counts: dict[str, int]


def each_modality(modalities: tuple[tuple[str, ...], tuple[str, ...]], hide: Mapping[str, float]) -> list[Row]:
    """The full row, and for every modality that is not hidden from all anyway a row without it and a row with it only.

    Where it is all that its side shows, there is no row with it only, which would be the full one again.

    Args:
        modalities: names of the modalities that the model reads of users, and of items.
        hide: what is hidden in every row: shares by dotted name.

    Raises:
        ConfigError: there is no modality to hide.
    """
    rows = [Row("full", None, dict(hide))]
    for side, names in zip(("users", "items"), modalities, strict=True):
        shown = [name for name in (f"{side}.{name}" for name in names) if hide.get(name) != 1]
        for name in shown:
            rows.append(Row("without", name, {**hide, name: 1.0}))
            if len(shown) > 1:
                rows.append(Row("only", name, {**hide, **{other: 1.0 for other in shown if other != name}}))
    if len(rows) == 1:
        raise ConfigError("--hide each: the model reads no modality that could be hidden; evaluate it without")
    return rows


def evaluate_each(
    model: Recommender,
    dataset: Dataset,
    split: HeldOut,
    config: EvaluationConfig,
    *,
    seed: int = 0,
    ranks: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Row, Outcome]]:
    """Evaluate a split once for every row of `each_modality`; arguments and errors are those of `evaluate`.

    Rows that hide the same, as those without one of two modalities and with the other only do, are evaluated once.
    `progress` is told how many rows are done, and their number.
    """
    rows = each_modality(model.modalities(), config.hide)
    found: list[tuple[Row, Outcome]] = []
    for row in rows:
        known = [outcome for other, outcome in found if other.hide == row.hide]
        if known:
            outcome = known[0]
        else:
            hiding = config.model_copy(update={"hide": row.hide})
            evaluation = evaluate(model, dataset, split, hiding, seed=seed, ranks=ranks)
            outcome = Outcome(evaluation.metrics, evaluation.counts)
        found.append((row, outcome))
        progress(len(found), len(rows))
    return found
