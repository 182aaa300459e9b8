"""Features of synthetic users and items that tell of their group, with noise, and are missing now and then."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sibra_dist.data.manifest import FeatureSpec, Side
from sibra_dist.data.planted import FEATURES as STREAM
from sibra_dist.data.planted import Integers, noise, words
from sibra_dist.errors import ConfigError

Kind = Literal["category", "tags", "numeric", "vector"]
Truths = npt.NDArray[np.bool_]

ANY_TAGS = 4
"""Tags that tell nothing."""
NOISE = 2.0
"""How far an element of a vector is from that of its group at most, which is 1 or -1."""
MANY = 1 << 40
"""Words of the stream of a feature that stand apart from those of its rows."""


class PlantedFeature(ABC):
    """One feature of one side, in the making."""

    kind: Kind
    size: int
    vocabulary: tuple[str, ...] | None = None
    width: int
    """Bytes of a row, about."""

    def __init__(self, side: Side, seed: int, groups: int, missing: float, size: int, type: str) -> None:
        """Prepare to make a feature that tells of so many groups; `size` and `type` are those of a vector."""
        number = list(FEATURES).index(self.kind) + len(FEATURES) * (side == "items")
        self._side, self._seed, self._stream, self._groups = side, seed, STREAM + number, groups
        self._rate = round(missing * 2**16)
        self._lacking = 0
        self._seen = np.zeros(1, bool)
        self._prepare(size, type)

    def values(self, first: int, groups: Integers, training: Truths) -> pa.Array:
        """The feature of entities `first` and following, of these groups, of which some are for training."""
        lots = self._words(first, len(groups), 1)[:, 0]
        missing = (lots & np.uint64(0xFFFF)).astype(np.int64) < self._rate
        self._lacking += int(missing.sum())
        made, codes = self._make(first, groups, lots >> np.uint64(16), missing)
        if codes is not None:
            owners, numbers = codes
            self._seen[numbers[(training & ~missing)[owners]]] = True
        return made

    def spec(self) -> FeatureSpec:
        """What the manifest says, once all values are made.

        Raises:
            ConfigError: a code was drawn for no training entity.
        """
        if self.vocabulary is not None and not self._seen.all():
            raise ConfigError(
                f"synthesize: no training entity of the {self._side} shows the {self.kind} "
                f"{self.vocabulary[int(np.argmin(self._seen))]}: ask for more {self._side}, or lower missing or cold_items"
            )
        return FeatureSpec(name=self.kind, kind=self.kind, size=self.size, vocabulary=self.vocabulary, missing=self._lacking)

    def _words(self, first: int, rows: int, each: int, apart: int = 0) -> npt.NDArray[np.uint64]:
        return words(self._seed, self._stream, apart * MANY + first * each, rows * each).reshape(rows, each)

    @abstractmethod
    def _prepare(self, size: int, type: str) -> None:
        """Settle what all rows share."""

    @abstractmethod
    def _make(
        self, first: int, groups: Integers, random: npt.NDArray[np.uint64], missing: Truths
    ) -> tuple[pa.Array, tuple[Integers, Integers] | None]:
        """The values, and of codes the row of each and the codes."""


class Category(PlantedFeature):
    """The group itself."""

    kind, width = "category", 4

    def _prepare(self, size: int, type: str) -> None:
        self.size = self._groups
        self.vocabulary = tuple(f"group {number}" for number in range(self._groups))
        self._seen = np.zeros(self.size, bool)

    def _make(self, first: int, groups: Integers, random: Any, missing: Truths) -> Any:
        return pa.array(groups.astype(np.int32), mask=missing), (np.arange(len(groups)), groups)


class Tags(PlantedFeature):
    """A tag of the group, every other time a second one, and one that tells nothing."""

    kind, width = "tags", 16

    def _prepare(self, size: int, type: str) -> None:
        self.size = 2 * self._groups + ANY_TAGS
        self.vocabulary = tuple(f"tag {number}" for number in range(self.size))
        self._seen = np.zeros(self.size, bool)

    def _make(self, first: int, groups: Integers, random: Any, missing: Truths) -> Any:
        rows = len(groups)
        second = (random & np.uint64(1)).astype(bool)
        general = 2 * self._groups + (random >> np.uint64(1) & np.uint64(ANY_TAGS - 1)).astype(np.int64)
        codes = np.stack([2 * groups, 2 * groups + 1, general], axis=1)
        shown = np.stack([np.ones(rows, bool), second, np.ones(rows, bool)], axis=1) & ~missing[:, None]
        offsets = np.append(0, np.cumsum(shown.sum(1))).astype(np.int32)
        owners, codes = np.repeat(np.arange(rows), shown.sum(1)), codes[shown]
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(codes.astype(np.int32)), mask=pa.array(missing))
        return lists, (owners, codes)


class Numeric(PlantedFeature):
    """The group's place among the groups, with noise, and a number that tells nothing; both have deviation 1, or about."""

    kind, size, width = "numeric", 2, 8

    def _prepare(self, size: int, type: str) -> None:
        pass

    def _make(self, first: int, groups: Integers, random: Any, missing: Truths) -> Any:
        told = (2 * groups + 1 - self._groups).astype(np.float32) / np.float32(self._groups) * np.float32(1.5)
        noises = noise(self._words(first, len(groups), 1, apart=1))
        numbers = np.stack([told + noises[:, 0], np.float32(1.75) * noises[:, 1]], axis=1)[~missing]
        offsets = np.append(0, np.cumsum(2 * ~missing)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(numbers.ravel()), mask=pa.array(missing)), None


class Vector(PlantedFeature):
    """A corner of a cube for each group, with noise."""

    kind = "vector"

    def _prepare(self, size: int, type: str) -> None:
        self.size, self._type = size, np.dtype(type)
        self.width = size * self._type.itemsize
        bits = self._words(0, self._groups, size, apart=2) & np.uint64(1)
        self._corners = bits.astype(np.float32) * 2 - 1

    def _make(self, first: int, groups: Integers, random: Any, missing: Truths) -> Any:
        each = -(-self.size // 4)
        noises = noise(self._words(first, len(groups), each, apart=1))[:, : self.size]
        vectors = self._corners[groups] + np.float32(NOISE) * noises
        vectors[missing] = 0
        kind = pa.list_(pa.from_numpy_dtype(self._type), self.size)
        flat = pa.array(vectors.astype(self._type).ravel())
        return pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=pa.array(missing)), None


FEATURES: dict[Kind, Callable[..., PlantedFeature]] = {
    "category": Category,
    "tags": Tags,
    "numeric": Numeric,
    "vector": Vector,
}
