"""The dataset that is extended: what of it stays as it is, so that a model trained on it can be trained on."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from sibra_dist.config import to_plain
from sibra_dist.data.manifest import FeatureSpec, Manifest, Side, read_verified_shard
from sibra_dist.data.storage import Place
from sibra_dist.encoding.texts import read_fitted
from sibra_dist.errors import ConfigError
from sibra_dist.etl.config import PrepareConfig


@dataclass(frozen=True)
class Former:
    """The dataset that is extended; without one, nothing is known before."""

    place: Place | None = None
    manifest: Manifest | None = None

    @classmethod
    def read(cls, place: str | Path | Place | None, config: PrepareConfig) -> "Former":
        """The dataset in `place`, if one is named.

        Raises:
            DatasetError: there is none, or it is damaged.
            ConfigError: a feature is of another kind in it than in `config`.
        """
        if place is None:
            return cls()
        former = cls(Place.at(place), Manifest.read(place))
        for side in ("users", "items"):
            specs = former.specs(side)
            for name, feature in config.features(side).items():
                if name not in specs:
                    continue
                kind = "vector" if feature.kind == "text" else feature.kind
                encoder = to_plain(feature.encoder) if feature.kind == "text" else None
                if (specs[name].kind, specs[name].encoder) != (kind, encoder):
                    raise ConfigError(
                        f"{side}: feature {name} is not made as it is in {place}, which is extended; "
                        "keep its kind and encoder, or give it another name"
                    )
        return former

    @property
    def digest(self) -> str | None:
        """Which dataset it is."""
        return self.manifest.digest if self.manifest else None

    def count(self, side: Side) -> int:
        """How many users or items it has."""
        if self.manifest is None:
            return 0
        return self.manifest.counts.users if side == "users" else self.manifest.counts.items

    def specs(self, side: Side) -> Mapping[str, FeatureSpec]:
        """What was fitted for its features, by name."""
        return {spec.name: spec for spec in self.manifest.features(side)} if self.manifest else {}

    def indices(self, spark: SparkSession, side: Side) -> DataFrame | None:
        """Columns `id` and `former` (int): the index of each of its users or items."""
        if self.place is None or self.manifest is None:
            return None
        place, shards = self.place, self.manifest.shards[side]

        def read(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                for number in batch.column(0).to_pylist():
                    rows = read_verified_shard(place, shards[number], ["id", "index"])
                    yield from rows.rename_columns(["id", "former"]).to_batches()

        # Read by Arrow, which finds the dataset wherever it is, a task a shard.
        return spark.range(len(shards), numPartitions=len(shards)).mapInArrow(read, "id string, former int")

    def fitted(self, side: Side, name: str) -> pa.Table | None:
        """What was fitted to encode a text."""
        if self.place is None or self.manifest is None:
            return None
        return read_fitted(self.place, self.manifest, side, name)
