"""Recommendations by the workers of a Ray cluster of this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from sibra_dist.commands.recommendations import recommend as command
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.recommending.recommend import Asked, recommend
from sibra_dist.training.launch import train_here
from sibra_dist.training.ray_train import start_ray
from sibra_dist.training.run_folder import RunFolder
from tests.planted import write_planted
from tests.training.conftest import make_config

pytestmark = pytest.mark.ray


@pytest.fixture
def cluster() -> Iterator[None]:
    start_ray(2)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_workers_write_the_same_files_and_tell_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(write_planted(tmp_path / "dataset"), training__epochs=1)
    dataset = open_dataset(config.dataset)
    run = RunFolder(tmp_path / "run")
    run.create(config, dataset)
    train_here(run, config, dataset)
    (tmp_path / "users").write_text("u0004\nu0002\nnobody\n")
    recommend(run, Asked(5, users=str(tmp_path / "users")), Place.at(tmp_path / "alone"))
    monkeypatch.chdir(tmp_path)
    command("run", "shared", k=5, users="users", workers=2)
    assert "10 recommendations to 2 users are in" in capsys.readouterr().out
    with pytest.raises(DatasetError, match=r"shared holds recommendations of another request \(not the same k\)"):
        command("run", "shared", k=6, users="users", workers=2)
    paths = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*") if path.is_file()]
    assert len(paths) == 3
    for path in paths:
        assert (tmp_path / "shared" / path).read_bytes() == (tmp_path / "alone" / path).read_bytes()
