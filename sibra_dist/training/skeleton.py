"""A dataset without content, of the sizes that a manifest tells: what training makes of it costs memory as with the real one.

Only where rows of histories start is held, 8 bytes for each entity. How long they are a manifest does not say, so they are
given a skewed law: the n-th most active of N entities has in proportion to sqrt(n) - sqrt(n - 1).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sibra_dist.data.batches import hash64
from sibra_dist.data.dataset import Csr, Dataset, Entities, Feature
from sibra_dist.data.manifest import FeatureSpec, Manifest, Side
from sibra_dist.data.storage import Place

TAGS = 4
"""Tags of an entity that has some, which a manifest does not say."""


class Drawn(Tensor):
    """Numbers int32 [count] below a bound: none is held, and each is a hash of its position when it is looked up."""

    _bound: int

    @staticmethod
    def __new__(cls, count: int, bound: int) -> "Drawn":
        """Stand for so many numbers below a bound."""
        drawn: Drawn = torch.Tensor._make_wrapper_subclass(cls, (count,), dtype=torch.int32)
        drawn._bound = bound
        return drawn

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        """Look numbers up."""
        if func is torch.ops.aten.index.Tensor:
            drawn, (positions,) = args
            return ((hash64(0, positions) >> 32 & 0x7FFFFFFF) % drawn._bound).int()
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a dataset without content")


def skeleton(manifest: Manifest) -> Dataset:
    """The dataset of a manifest, with no content, on the CPU."""
    counts = manifest.counts
    users = _entities(manifest, "users", counts.users, counts.items)
    items = _entities(manifest, "items", counts.items, counts.users)
    empty = torch.zeros(0, dtype=torch.int32), Csr(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32))
    return Dataset(Place.at("."), manifest, users, items, {"validation": empty, "test": empty})


def array_bytes(manifest: Manifest) -> dict[str, int]:
    """Bytes of the arrays that a dataset is opened as, of histories in both directions and of features."""
    counts = manifest.counts
    histories = 8 * (counts.users + counts.items) + 2 * 4 * counts.train
    histories += counts.train * sum({"weights": 2 * 4, "times": 8}[name] for name in manifest.interaction_columns)
    features = counts.users + sum(_feature_bytes(spec, counts.users) for spec in manifest.user_features)
    features += counts.items + sum(_feature_bytes(spec, counts.items) for spec in manifest.item_features)
    held_out = 4 * (counts.validation + counts.test) + 2 * 12 * min(counts.users, counts.validation)
    return {"histories": histories, "features": features, "held out": held_out}


def _feature_bytes(spec: FeatureSpec, count: int) -> int:
    if spec.kind == "tags":
        return count + 8 * (count + 1) + 4 * TAGS * (count - spec.missing)
    return count + 4 * count * (1 if spec.kind == "category" else spec.size)


def _entities(manifest: Manifest, side: Side, count: int, others: int) -> Entities:
    nnz = manifest.counts.train
    starts = (nnz * (torch.arange(count + 1, dtype=torch.float64) / max(count, 1)).sqrt()).long()
    starts[-1] = nnz
    return Entities(
        count=count,
        split=torch.zeros(1, dtype=torch.int8).expand(count),
        histories=Csr(starts, Drawn(nnz, others)),
        features={spec.name: _feature(spec, count) for spec in manifest.features(side)},
        weights=torch.zeros(1).expand(nnz) if "weights" in manifest.interaction_columns else None,
    )


def _feature(spec: FeatureSpec, count: int) -> Feature:
    present = torch.ones(1, dtype=torch.bool).expand(count)
    if spec.kind == "category":
        return Feature(spec, present, torch.zeros(1, dtype=torch.int32).expand(count))
    if spec.kind == "tags":
        total = TAGS * (count - spec.missing)
        starts = torch.arange(count + 1) * total // max(count, 1)
        return Feature(spec, present, Csr(starts, Drawn(total, spec.size)))
    return Feature(spec, present, torch.zeros(1, 1).expand(count, spec.size))
