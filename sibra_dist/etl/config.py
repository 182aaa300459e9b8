"""What `sibra-dist prepare` is told: sources, features, filters, split."""

import codecs
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sibra_dist.config import Config

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class TableConfig(Config):
    """Where a table lies and how it is written."""

    path: str
    """A file or glob, relative to `source` unless absolute or a URI."""
    format: Literal["delimited", "atomic", "parquet", "npz"] = "delimited"
    """`atomic` is RecBole's: delimited by tabs, with `name:type` headings. `npz` holds arrays `ids`, `vectors`."""
    separator: Annotated[str, Field(min_length=1)] = "\t"
    """delimited: one or several characters."""
    encoding: str = "utf-8"
    """delimited, atomic: the encoding of the text."""
    header: bool | tuple[str, ...] = True
    """delimited: whether the first line names the columns, or else their names."""

    @field_validator("encoding")
    @classmethod
    def _encodes_line_ends_as_ascii(cls, encoding: str) -> str:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise ValueError(f"no encoding is called {encoding!r}; write for example utf-8 or latin-1") from error
        if "\n".encode(encoding) != b"\n":
            raise ValueError(f"lines of {encoding} text cannot be told apart by their bytes; convert the file to utf-8")
        return encoding

    @field_validator("header")
    @classmethod
    def _names_columns(cls, header: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        if not header:
            raise ValueError("without a first line that names the columns, give their names, in order")
        return header


class InteractionsConfig(TableConfig):
    """The interactions, one a row."""

    user: str = "user_id"
    """Column of the user id; likewise below."""
    item: str = "item_id"
    rating: str | None = None
    time: str | None = None
    """Seconds since 1970, if the source has them: of several interactions of one pair, the latest is kept."""


class FeatureConfig(Config):
    """One feature of users or of items."""

    kind: Literal["category", "tags", "numeric", "vector"]
    column: str | tuple[str, ...] | None = None
    """The column or columns it is read from; by default the one of the feature's own name. numeric may have several."""
    separator: str = "|"
    """tags: what stands between two of them, where the column is text."""
    scale: Literal["standard", "minmax", "none"] = "standard"
    """numeric: fitted on the training entities."""

    @model_validator(mode="after")
    def _has_several_columns_only_if_numeric(self) -> Self:
        if self.kind != "numeric" and isinstance(self.column, tuple):
            raise ValueError(f"a {self.kind} feature is read from one column; only numeric may have several")
        return self


class FeatureTableConfig(TableConfig):
    """A table of side information, one row an entity."""

    id: str
    """Column of the user or item id. In an `npz`, always `ids`."""
    features: dict[str, FeatureConfig]


class EntityFilter(Config):
    """Which users, or items, are kept at all. By default every one: a missing feature is no reason to drop an entity."""

    require: tuple[str, ...] = ()
    """Features that an entity must have."""
    within: dict[str, tuple[float, float]] = {}
    """Inclusive bounds on the raw value of a column of its tables; an entity without a value is dropped."""


class FilterConfig(Config):
    """What is left out, in the order of the fields."""

    min_rating: float | None = None
    users: EntityFilter = EntityFilter()
    items: EntityFilter = EntityFilter()
    core: Annotated[int, Field(ge=0)] = 0
    """k of the k-core: users and items with fewer interactions are removed until none is left. 0 and 1 keep all."""


class SplitConfig(Config):
    """How interactions are divided into train, validation and test."""

    protocol: Literal["random", "cold_item"] = "random"
    seed: int = 0
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Never nothing: early stopping needs it."""
    test: Share = 0.1

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave something to train on")
        return self


class SparkConfig(Config):
    """The Spark session, when this process starts one. Under spark-submit the submitter's settings stand."""

    master: str = "local[*]"
    driver_memory: str = "4g"
    settings: dict[str, str] = {}
    """Any further Spark setting, for example `{spark.sql.shuffle.partitions: "64"}`. None of them changes the result."""


class PrepareConfig(Config):
    """A dataset to be: what it is made from, and how."""

    name: str
    source: str = "."
    """Folder or URI that the paths of tables are relative to."""
    interactions: InteractionsConfig
    users: tuple[FeatureTableConfig, ...] = ()
    items: tuple[FeatureTableConfig, ...] = ()
    filters: FilterConfig = FilterConfig()
    split: SplitConfig = SplitConfig()
    max_rejected_share: Share = 0.01
    """The job fails when a larger share of the interaction records cannot be used."""
    shard_mebibytes: Annotated[int, Field(ge=1)] = 128
    """Size that a shard is aimed at, before compression."""
    spark: SparkConfig = SparkConfig()

    @model_validator(mode="after")
    def _ratings_are_read_where_needed(self) -> Self:
        if self.filters.min_rating is not None and self.interactions.rating is None:
            raise ValueError("filters.min_rating needs the column of the ratings: set interactions.rating")
        return self

    @model_validator(mode="after")
    def _feature_names_are_one_per_side(self) -> Self:
        for side, tables in (("users", self.users), ("items", self.items)):
            names = [name for table in tables for name in table.features]
            reserved = {"index", "id", "split", "interactions", "unknown"}
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{side}: feature {name} is defined twice")
                if name in reserved or not name.isidentifier():
                    taken = ", ".join(sorted(reserved))
                    raise ValueError(f"{side}: {name!r} cannot name a feature; use a plain word other than {taken}")
            entity_filter = self.filters.users if side == "users" else self.filters.items
            for name in entity_filter.require:
                if name not in names:
                    raise ValueError(f"filters.{side}.require names {name}, which is no feature of {side}")
        return self

    def located(self, table: TableConfig) -> str:
        """Where a table lies: its path under `source`, unless it says where by itself."""
        if "://" in table.path or PurePosixPath(table.path).is_absolute():
            return table.path
        return f"{self.source.rstrip('/')}/{table.path}"
