"""What tests of several rooms share."""

import multiprocessing
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.object_store import ObjectStore

# The same examples in every run, so that a failure belongs to the change under test; and no limit to the time of one:
# a busy machine is no defect.
settings.register_profile("sibra", deadline=None, derandomize=True)
settings.load_profile("sibra")

# Many small processes on few cores: one thread each is fastest, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# What ranks import that tests start as processes of their own: once, in the process that they are forked from.
multiprocessing.set_forkserver_preload(["pytest", "sibra_dist.recommending.recommend", "sibra_dist.exporting.export"])

# Java that ends soon: what its second compiler would win, it never earns back.
SHORT_JAVA = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
for name in ("SPARK_LAUNCHER_OPTS", "SPARK_SUBMIT_OPTS", "SPARK_DAEMON_JAVA_OPTS"):
    os.environ[name] = SHORT_JAVA


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Arrays that an earlier version of the code decoded would hide what this one does."""
    os.environ["SIBRA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets, for tests marked `real_data`."""
    folder = os.environ.get("SIBRA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: set SIBRA_TEST_DATA to the folder that holds it")
    return Path(folder)


@pytest.fixture(scope="session")
def object_store() -> "Iterator[ObjectStore]":
    """An S3-compatible server on this machine."""
    from tests.object_store import ObjectStore  # here, because tests of other things need not load what it needs

    with ObjectStore() as store:
        yield store


@pytest.fixture
def s3(object_store: "ObjectStore", monkeypatch: pytest.MonkeyPatch) -> "Iterator[str]":
    """The URI of a fresh bucket, which the environment says how to reach."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{object_store.new_bucket()}"
    object_store.answer = None


@cache
def marks_in(path: Path) -> list[bool]:
    """Which of `spark`, `ray` and `slow` a test of a file has."""
    text = path.read_text(encoding="utf-8")
    return [f"pytest.mark.{mark}" in text for mark in ("spark", "ray", "slow")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that need an engine stay together in a process, where it starts once and stays warm; each other file goes to any.

    With Spark the slow ones are as much work as all the rest, and apart from it.
    """
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            spark, ray, slow = marks_in(config.rootpath / path)
            return ("slow spark" if slow else "spark") if spark else "ray" if ray else path

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long, so that processes end together, and skip what is marked `gpu` on a machine without one."""
    items.sort(key=lambda item: [not there for there in marks_in(item.path)])

    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
