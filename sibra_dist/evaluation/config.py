"""What an evaluation measures."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from sibra_dist.config import Config
from sibra_dist.data.dataset import Candidates
from sibra_dist.data.presence import Shares
from sibra_dist.errors import nearest
from sibra_dist.evaluation.metrics import KNOWN_METRICS, LARGEST_CUTOFF, at_cutoffs, is_metric

Cutoff = Annotated[int, Field(ge=1, le=LARGEST_CUTOFF)]


class EvaluationConfig(Config):
    """Metrics, and the tiles in which they are computed. Every metric is computed at every cutoff, if it has one."""

    metrics: tuple[str, ...] = ("ndcg", "recall", "precision", "map", "hit_rate", "mrr", "coverage")
    cutoffs: tuple[Cutoff, ...] = (1, 5, 10, 20)
    user_tile: Annotated[int, Field(ge=1)] = 256
    """Users ranked at once. Ranks share out whole tiles, so that every tile is computed alike on any number of ranks."""
    item_tile: Annotated[int, Field(ge=1)] = 65536
    """Candidates scored at once."""
    max_groups: Annotated[int, Field(ge=1)] = 20
    """Results tell of the groups of users that a category feature makes if it has at most so many values."""
    candidates: Candidates = "split"
    """What is ranked: `split`, the items that the dataset's protocol says, or `all` items also where items are divided."""
    hide: Shares = {}
    """Share of the entities from which a modality is hidden, by name: `items.genres: 0.25`."""

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Self:
        for name in self.metrics:
            if not is_metric(name):
                raise ValueError(f"metric {name!r} is not known; {nearest(name, KNOWN_METRICS)}")
        return self

    @property
    def names(self) -> list[str]:
        """Every metric at every cutoff, `ndcg@10` and so on; once, where it has none."""
        return at_cutoffs(self.metrics, self.cutoffs)
