"""MovieLens 1M comes out with the published sizes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from sibra_dist.config import load_config
from sibra_dist.etl.config import PrepareConfig
from sibra_dist.etl.pipeline import prepare

pytestmark = [pytest.mark.spark, pytest.mark.real_data, pytest.mark.slow]


@pytest.fixture
def compiling(spark: SparkSession) -> Iterator[None]:
    """Queries over a million rows are compiled, as they are for a user."""
    compiled = {"spark.sql.codegen.wholeStage": "true", "spark.sql.codegen.factoryMode": "FALLBACK"}
    before = {name: str(spark.conf.get(name)) for name in compiled}
    for name, value in compiled.items():
        spark.conf.set(name, value)
    yield
    for name, value in before.items():
        spark.conf.set(name, value)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("protocol", ["cold_item", "random"])
def test_movielens_1m_has_the_published_sizes(spark: SparkSession, tmp_path: Path, real_data: Path, protocol: str) -> None:
    config = load_config(PrepareConfig, "ml-1m", [f"source={real_data / 'ml-1m'}", f"split.protocol={protocol}"])
    manifest = prepare(config, tmp_path / "dataset")
    assert manifest.counts.users == 5_816
    assert sum(manifest.records.filtered.values()) + manifest.records.kept == manifest.records.read == 836_432
    if protocol == "random":
        assert (manifest.counts.validation, manifest.counts.test) == (83_930, 83_930)
    else:
        splits = [row.split for row in spark.read.parquet(str(tmp_path / "dataset" / "items")).collect()]
        assert splits.count("test") == splits.count("validation") == 330
    assert {spec.name: (spec.size, spec.missing) for spec in manifest.user_features + manifest.item_features} == {
        "gender": (2, 0),
        "occupation": (21, 0),
        "age": (6, 0),
        "genres": (18, 0),
        # The year of one cold film is that of no training film: it is as good as none.
        "release_year": (81, 0) if protocol == "random" else (80, 1),
        "plot": (384, 0),
    }
