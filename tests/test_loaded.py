"""A trained run in Python."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import sibra_dist
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import Place
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.loaded import LoadedRun, load_run
from sibra_dist.recommending.recommend import Asked, recommend
from sibra_dist.training.launch import train_here
from sibra_dist.training.run_folder import RunFolder
from tests.newcomers import told_again
from tests.planted import write_planted
from tests.recommending.test_newcomers import rows
from tests.training.conftest import SMALL, make_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    folder = tmp_path_factory.mktemp("loaded")
    config = make_config(write_planted(folder / "dataset"), model=SMALL["model"], training__epochs=1)
    trained, dataset = RunFolder(folder / "run"), open_dataset(config.dataset)
    trained.create(config, dataset)
    train_here(trained, config, dataset)
    return sibra_dist.load_run(folder / "run")


def test_recommendations_are_those_of_the_command(run: LoadedRun, tmp_path: Path) -> None:
    recommend(run.folder, Asked(7), Place.at(tmp_path))
    expected = rows(tmp_path)
    assert run.recommend(k=7).to_pylist() == expected
    some = run.recommend(["u0030", "u0002"], 7).to_pylist()
    assert [row["item_id"] for row in some] == [
        row["item_id"] for user in ("u0030", "u0002") for row in expected if row["user_id"] == user
    ]
    assert run.recommend([], 7).num_rows == 0
    assert run.recommend(k=7, candidates="new").num_rows == 0
    assert run.recommend(["u0002"], 10**15, exclude="none").num_rows == 80


def test_embeddings_are_the_models(run: LoadedRun) -> None:
    with torch.inference_mode():
        users, items = run.model.encode_users(torch.tensor([5, 3])), run.model.encode_items(torch.tensor([7]))
    found = run.embed_users(["u0005", "u0003"])
    assert found["user_id"].to_pylist() == ["u0005", "u0003"]
    np.testing.assert_allclose(found["embedding"].to_pylist(), users.numpy(), rtol=1e-5)
    np.testing.assert_allclose(run.embed_items(["i0007"])["embedding"].to_pylist(), items.numpy(), rtol=1e-5)


def test_newcomers_come_as_data_frames_and_are_like_those_they_are_told_as(run: LoadedRun) -> None:
    told = told_again(run.dataset, "items", [4, 9]).to_pandas()
    assert isinstance(told, pd.DataFrame)
    found = run.embed_items(told)
    assert found["item_id"].to_pylist() == ["new i0004", "new i0009"]
    known = run.embed_items(["i0004", "i0009"])["embedding"].to_pylist()
    np.testing.assert_allclose(found["embedding"].to_pylist(), known, rtol=1e-4, atol=1e-6)
    joined = run.with_newcomers(items=told)
    assert repr(joined).endswith("single_branch, 60 users, 82 items, 0 and 2 of them new)")
    assert joined.similar_items("new i0004", 1)["similarity"].to_pylist() == [pytest.approx(1, abs=1e-5)]
    assert run.recommend(k=3).num_rows == joined.recommend(k=3, candidates="all").num_rows
    both = joined.with_newcomers(users={"user_id": ["x"], "interactions": [["i0001"]]})
    assert both.recommend(["x"], 200).num_rows == 81
    assert both.recommend(["x"], 200, candidates="new")["item_id"].to_pylist() != []


def test_similar_items_are_those_of_the_largest_cosine(run: LoadedRun) -> None:
    with torch.inference_mode():
        embedded = run.model.encode_items(torch.arange(80)).double().numpy()
    unit = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    cosines = unit @ unit[13]
    cosines[13] = -np.inf
    best = np.argsort(-cosines, kind="stable")[:5]
    found = run.similar_items("i0013", 5).to_pydict()
    np.testing.assert_allclose(found["similarity"], cosines[best], rtol=1e-4, atol=1e-6)
    assert set(found["item_id"]) == {f"i{item:04}" for item in best}
    assert found["rank"] == [1, 2, 3, 4, 5]
    assert run.similar_items("i0013", 10**15).num_rows == 79


def test_what_was_refused_is_told(run: LoadedRun, caplog: pytest.LogCaptureFixture) -> None:
    joined = run.with_newcomers(users={"user_id": ["x", "u0001"], "club": ["group 1", None]})
    assert [(record.reason, record.record) for record in joined.rejected] == [("id is in the dataset already", ("u0001", ""))]
    assert "not used: 1 id is in the dataset already" in caplog.text


def test_bad_requests_are_one_error(run: LoadedRun) -> None:
    with pytest.raises(SourceError, match=r"knows no user 'nobody' .* give it to with_newcomers\(users=TABLE\)"):
        run.recommend(["u0001", "nobody"])
    with pytest.raises(SourceError, match="knows no item '7'"):
        run.similar_items(7)
    with pytest.raises(ConfigError, match=r"users is the text 'u0001'; give a list of ids, such as \['u0001'\]"):
        run.recommend("u0001")
    with pytest.raises(ConfigError, match="k is 0; ask for 1 or more"):
        run.recommend(k=0)
    with pytest.raises(ConfigError, match="exclude is 'all'; it can be seen or none"):
        run.recommend(exclude="all")  # type: ignore[arg-type]
    for table in (7, {"item_id": [2**70]}):
        with pytest.raises(SourceError, match="no table can be made of what was given"):
            run.embed_items(table)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device is 'tpu'; it can be auto or cpu or cuda"):
        load_run(run.folder.path, device="tpu")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="has no attribute 'load_runs'"):
        sibra_dist.load_runs  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_itself_loads_nothing() -> None:
    code = "import sys, sibra_dist; print([name for name in ('torch', 'pyarrow', 'pydantic') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
    assert sibra_dist.load_run is load_run
