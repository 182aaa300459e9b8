import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from sibra_dist.data.manifest import Manifest
from sibra_dist.etl.config import PrepareConfig, SparkConfig
from sibra_dist.etl.pipeline import prepare
from sibra_dist.etl.session import spark_session

if TYPE_CHECKING:
    from tests.object_store import ObjectStore


# Queries over a few rows, each run once, take longer to compile than to interpret. Sessions that tests start in processes of
# their own compile, as a user's do, and their datasets are compared with those of this one.
SETTINGS = {
    "spark.sql.shuffle.partitions": "3",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """One session for all tests; `prepare` finds it active and leaves it running."""
    with spark_session(SparkConfig(master="local[2]", driver_memory="1g", settings=SETTINGS)) as session:
        yield session


@pytest.fixture
def bucket(spark: SparkSession, s3: str, object_store: "ObjectStore") -> Iterator[str]:
    """The URI of a bucket that Spark's Python workers reach as well, though they began before it."""
    environment = spark.sparkContext.environment
    environment.update(object_store.environment)
    yield s3
    for name in object_store.environment:
        del environment[name]


@pytest.fixture
def table() -> Callable[[Path, Manifest, str], pa.Table]:
    def read(dataset: Path, manifest: Manifest, name: str) -> pa.Table:
        return pa.concat_tables([pq.read_table(dataset / shard.path) for shard in manifest.shards[name]])

    return read


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., PrepareConfig]:
    """A source folder with every kind of feature and of bad record, and the configuration that reads it."""
    source = tmp_path / "source"
    write_small(source)

    def config(**changes: object) -> PrepareConfig:
        return PrepareConfig.model_validate({**SMALL, "source": str(source), **changes})

    return config


@pytest.fixture(scope="session")
def small_dataset(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the dataset that `prepare` makes of `small()`, once for all who need it to be there already."""
    folder = tmp_path_factory.mktemp("small")
    write_small(folder / "source")
    prepare(PrepareConfig.model_validate({**SMALL, "source": str(folder / "source")}), folder / "dataset")
    return folder / "dataset"


@pytest.fixture
def put_small(small_dataset: Path) -> Callable[[Path], Manifest]:
    """Puts the dataset of `small()` into a folder that is not there yet."""

    def put(to: Path) -> Manifest:
        shutil.copytree(small_dataset, to)
        return Manifest.read(to)

    return put


# Users u01 .. u12 and items i01 .. i10 in a band of pairs, every pair with a rating and a time.
PAIRS = [(f"u{user:02}", f"i{(user + step) % 10 + 1:02}") for user in range(1, 13) for step in range(6)]
SMALL = {
    "name": "small",
    "interactions": {"path": "interactions.tsv", "rating": "rating", "time": "time"},
    "users": [
        {
            "path": "users.dat",
            "separator": "::",
            "encoding": "latin-1",
            "header": ["user_id", "city", "age"],
            "id": "user_id",
            "features": {"city": {"kind": "category"}, "age": {"kind": "numeric"}},
        }
    ],
    "items": [
        {"path": "items.item", "format": "atomic", "id": "item_id", "features": {"genres": {"kind": "tags", "separator": " "}}},
        {
            "path": "vectors.parquet",
            "format": "parquet",
            "id": "item",
            "features": {"look": {"kind": "vector", "column": "vector"}},
        },
    ],
    "filters": {"min_rating": 3, "core": 2},
    "max_rejected_share": 0.2,
}


def write_small(source: Path) -> None:
    source.mkdir()
    rows = [f"{user}\t{item}\t{3 + place % 3}\t{1000 + place}" for place, (user, item) in enumerate(PAIRS)]
    rows += ["u01\ti02\t5\t2000", "u02\ti09\t1\t5"]  # once more, and below the least rating
    rows += ["u01\ti02", "\ti02\t4\t1", "u01\t\t4\t1", "u01\ti02\tgood\t1", "u01\ti02\tnan\t1", "u01\ti02\t4\tlate"]
    lines = "\n".join(["user_id\titem_id\trating\ttime", *rows, "", ""]).encode() + b"u\xff1\ti02\t4\t1\r\n"
    (source / "interactions.tsv").write_bytes(lines)
    users = [f"u{user:02}::{('Köln', 'Linz', '')[user % 3]}::{20 + user if user != 5 else ''}" for user in range(1, 12)]
    users += ["u03::Bonn::33", "u99::Wien::40", "u12::Graz::old", "u12"]
    (source / "users.dat").write_text("\n".join(users) + "\n", encoding="latin-1")
    items = [f"i{item:02}\t{('drama comedy drama', 'comedy', '')[item % 3]}" for item in range(1, 11)]
    (source / "items.item").write_text("item_id:token\tgenres:token_seq\n" + "\n".join(items) + "\n", encoding="utf-8")
    (source / "other.tsv").write_text("vector_id\tcolour\nv1\tred\nv2\tblue\n", encoding="utf-8")
    ids = [f"i{item:02}" for item in range(2, 11)]
    vectors = [[float(place), 0.5] for place in range(8)] + [[float("nan"), 1.0]]
    pq.write_table(pa.table({"item": ids, "vector": pa.array(vectors, pa.list_(pa.float64()))}), source / "vectors.parquet")
