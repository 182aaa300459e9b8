"""What `sibra-dist prepare` is told: sources, features, filters, split."""

import codecs
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from sibra_dist.config import Config
from sibra_dist.etl.feature_config import Columns, FeatureConfig

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Format = Literal["delimited", "atomic", "json", "parquet", "orc", "table", "query", "npz", "npy"]
TEXT_FORMATS = ("delimited", "atomic", "json")
"""Formats of lines of text; of these every value is read as text."""
SplitName = Literal["train", "validation", "test"]


class TableConfig(Config):
    """Where a table lies and how it is written."""

    path: str | tuple[str, ...]
    """A file, a glob, or several of them, relative to `source` unless absolute or a URI (`s3://`, `hdfs://`, `gs://`).
    For `table` the name of a table that Spark knows, for `query` an SQL query."""
    format: Format = "delimited"
    """`atomic` is RecBole's: delimited by tabs, with `name:type` headings. `json`: one object a line. `npz` holds arrays `ids`
    and `vectors`; `npy` a matrix, with the ids of its rows, a line each, in the file of the same name that ends in `.ids`."""
    separator: Annotated[str, Field(min_length=1)] = "\t"
    """delimited: one or several characters."""
    quote: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """delimited: the character around fields that hold a separator, doubled within them. By default quotes mean nothing."""
    encoding: str = "utf-8"
    """delimited, atomic, json: the encoding of the text."""
    header: bool | tuple[str, ...] = True
    """delimited: whether the first line names the columns, or else their names."""

    @field_validator("encoding")
    @classmethod
    def _encodes_line_ends_as_ascii(cls, encoding: str) -> str:
        try:
            if codecs.lookup(encoding).name == "utf-8-sig":
                return "utf-8"  # whose byte order mark is left out in any case
            line_end = "\n".encode(encoding)
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"no encoding of text is called {encoding!r}; write for example utf-8 or latin-1") from error
        if line_end != b"\n":
            raise ValueError(f"lines of {encoding} text cannot be told apart by their bytes; convert the file to utf-8")
        return encoding

    @field_validator("header")
    @classmethod
    def _names_columns(cls, header: bool | tuple[str, ...]) -> bool | tuple[str, ...]:
        if not header:
            raise ValueError("without a first line that names the columns, give their names, in order")
        return header

    @field_validator("path")
    @classmethod
    def _names_something(cls, path: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not path:
            raise ValueError("name at least one file")
        return path


class SplitPaths(Config):
    """The files of each split, where the files say how the interactions are divided (`split.protocol: fixed`)."""

    train: Columns
    validation: Columns
    test: Columns

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not (self.train and self.validation and self.test):
            raise ValueError("name at least one file for each of train, validation and test")
        return self


class InteractionsConfig(TableConfig):
    """The interactions, one a row."""

    path: str | tuple[str, ...] | SplitPaths  # type: ignore[assignment]
    """As in any table; for a fixed split, a path each of `train`, `validation` and `test`."""
    user: str = "user_id"
    """Column of the user id; likewise below."""
    item: str = "item_id"
    rating: str | None = None
    """What `filters.min_rating` looks at."""
    weight: str | None = None
    """How much an interaction counts, kept in the histories; may be the column of the rating."""
    time: str | None = None
    time_format: Literal["seconds", "milliseconds", "iso"] = "seconds"
    """How times are written where the column is not a date or timestamp: since 1970, or as 2024-05-31[T12:30:00[Z]], in UTC
    unless they say otherwise."""
    split: str | None = None
    """Column that says `train`, `validation` or `test`, for a fixed split that is in one table."""

    def of_split(self, paths: Columns) -> "InteractionsConfig":
        """The table of one split of a fixed split by files."""
        return self.model_copy(update={"path": paths})


class FeatureTableConfig(TableConfig):
    """A table of side information, one row an entity."""

    id: str
    """Column of the user or item id. In an `npz` or `npy`, always `ids`."""
    features: dict[str, FeatureConfig]


class EntityFilter(Config):
    """Which users, or items, are kept at all. By default every one: a missing feature is no reason to drop an entity."""

    require: tuple[str, ...] = ()
    """Features that an entity must have."""
    within: dict[str, tuple[float, float]] = {}
    """Inclusive bounds on the raw value of a column of its tables; an entity without a value is dropped."""
    allowed: dict[str, tuple[str, ...]] = {}
    """The values that a column of its tables may have, as text; an entity without a value is dropped."""
    min_count: Annotated[int, Field(ge=0)] = 0
    """Interactions that an entity must have, once; `core` is for ever."""
    max_count: Annotated[int, Field(ge=1)] | None = None
    """And may have at the most: more is a robot, or a shop's carrier bag."""

    @model_validator(mode="after")
    def _lets_something_pass(self) -> Self:
        for column, (low, high) in self.within.items():
            if low > high:
                raise ValueError(f"within.{column} begins above its end: write [low, high]")
        if self.max_count is not None and self.max_count < self.min_count:
            raise ValueError("max_count is below min_count")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The raw columns it looks at."""
        return tuple(dict.fromkeys([*self.within, *self.allowed]))


class FilterConfig(Config):
    """What is left out, in the order of the fields."""

    min_rating: float | None = None
    duplicates: Literal["latest", "earliest", "highest", "sum"] = "latest"
    """Of the records of one pair one is left: the latest or earliest by `interactions.time`, the one with the highest rating
    (or weight, where there is no rating), or the latest with the sum of all weights. Without times, `latest` is `highest`."""
    users: EntityFilter = EntityFilter()
    items: EntityFilter = EntityFilter()
    core: Annotated[int, Field(ge=0)] = 0
    """k of the k-core: users and items with fewer interactions are removed until none is left. 0 and 1 keep all."""


class SplitConfig(Config):
    """How interactions are divided into train, validation and test."""

    protocol: Literal[
        "random", "temporal_user", "leave_one_out", "temporal_global", "cold_item", "cold_user", "cold_both", "fixed"
    ] = "random"
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] = 0
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Never nothing: early stopping needs it. `leave_one_out` and `fixed` take no shares."""
    test: Share = 0.1

    @model_validator(mode="after")
    def _leaves_training(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must leave something to train on")
        return self

    @property
    def needs_time(self) -> bool:
        """Whether the protocol goes by the order of time."""
        return self.protocol in ("temporal_user", "leave_one_out", "temporal_global")

    @property
    def cold_sides(self) -> tuple[str, ...]:
        """The sides whose entities are split: `user`, `item`."""
        return {"cold_item": ("item",), "cold_user": ("user",), "cold_both": ("user", "item")}.get(self.protocol, ())


class HistoryConfig(Config):
    """How much of a user's training interactions is kept."""

    max_length: Annotated[int, Field(ge=1)] | None = None
    keep: Literal["latest", "sample"] = "sample"
    """Of a longer history: the latest by `interactions.time`, or a sample drawn with `split.seed`."""


class SparkConfig(Config):
    """The Spark session, when this process starts one. Under spark-submit the submitter's settings stand."""

    master: str = "local[*]"
    driver_memory: str = "4g"
    settings: dict[str, str] = {}
    """Any further Spark setting, for example `{spark.sql.shuffle.partitions: "64"}`. None of them changes the result."""
    work: str | None = None
    """Folder or URI for intermediate tables, which Spark's driver and executors must all reach; by default in the folder
    of the dataset, or, if that is in an object store and Spark runs on this machine alone, a temporary folder."""


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
    history: HistoryConfig = HistoryConfig()
    max_rejected_share: Share = 0.01
    """The job fails when a larger share of a table's records cannot be used. Side information of unknown ids does not count."""
    shard_mebibytes: Annotated[int, Field(ge=1, le=1024)] = 128
    """Size that a shard is aimed at, before compression."""
    spark: SparkConfig = SparkConfig()

    @model_validator(mode="after")
    def _columns_are_named_where_needed(self) -> Self:
        table, filters = self.interactions, self.filters
        if filters.min_rating is not None and table.rating is None:
            raise ValueError("filters.min_rating needs the column of the ratings: set interactions.rating")
        if filters.duplicates == "sum" and table.weight is None:
            raise ValueError("filters.duplicates: sum needs the column of the weights: set interactions.weight")
        if filters.duplicates == "earliest" and table.time is None:
            raise ValueError("filters.duplicates: earliest needs the column of the times: set interactions.time")
        if filters.duplicates == "highest" and table.rating is None and table.weight is None:
            raise ValueError("filters.duplicates: highest needs interactions.rating or interactions.weight")
        if self.split.needs_time and table.time is None:
            raise ValueError(f"split.protocol {self.split.protocol} needs the column of the times: set interactions.time")
        if self.history.max_length is not None and self.history.keep == "latest" and table.time is None:
            raise ValueError("history.keep: latest needs the column of the times: set interactions.time")
        return self

    @model_validator(mode="after")
    def _fixed_split_is_given(self) -> Self:
        by_files, by_column = isinstance(self.interactions.path, SplitPaths), self.interactions.split is not None
        if self.split.protocol == "fixed" and by_files == by_column:
            raise ValueError(
                "split.protocol fixed needs to be told the split: give interactions.path a path each of train, validation and "
                "test, or name the column in interactions.split"
            )
        if self.split.protocol != "fixed" and (by_files or by_column):
            raise ValueError("interactions that come with their split need split.protocol: fixed")
        return self

    @model_validator(mode="after")
    def _feature_names_are_one_per_side(self) -> Self:
        for side, tables in (("users", self.users), ("items", self.items)):
            names = [name for table in tables for name in table.features]
            # Spark tells no capitals from small letters.
            folded = [name.casefold() for name in names]
            reserved = {"index", "id", "split", "interactions", "unknown", "key", "position"}
            for name in names:
                if folded.count(name.casefold()) > 1:
                    raise ValueError(f"{side}: feature {name} is defined twice")
                if name.casefold() in reserved or name.startswith("_") or not name.isidentifier():
                    taken = ", ".join(sorted(reserved))
                    raise ValueError(f"{side}: {name!r} cannot name a feature; use a plain word other than {taken}")
            entity_filter = self.filters.users if side == "users" else self.filters.items
            for name in entity_filter.require:
                if name not in names:
                    raise ValueError(f"filters.{side}.require names {name}, which is no feature of {side}")
        return self

    def features(self, side: str) -> Mapping[str, FeatureConfig]:
        """The features of `users` or `items`, of all their tables, in order."""
        tables = self.users if side == "users" else self.items
        return {name: feature for table in tables for name, feature in table.features.items()}

    def interaction_tables(self) -> Iterator[tuple[SplitName | None, InteractionsConfig]]:
        """The tables of interactions: one, or for a fixed split by files one for each split, with its name."""
        path = self.interactions.path
        if isinstance(path, SplitPaths):
            yield "train", self.interactions.of_split(path.train)
            yield "validation", self.interactions.of_split(path.validation)
            yield "test", self.interactions.of_split(path.test)
        else:
            yield None, self.interactions

    def located(self, path: str) -> str:
        """Where a path lies: under `source`, unless it says where by itself."""
        if "://" in path or PurePosixPath(path).is_absolute():
            return path
        return f"{self.source.rstrip('/')}/{path}"
