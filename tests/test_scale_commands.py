"""`synthesize` and `estimate` on the command line."""

import json
from pathlib import Path

import pytest

from sibra_dist.cli import main
from sibra_dist.data.manifest import Manifest


def test_a_dataset_is_synthesized_and_a_training_on_it_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "dataset")
    sizes = ["--users", "200", "--items", "150", "--interactions", "3000", "--cold-items", "0.1", "--seed", "3"]
    features = ["--user-features", "none", "--item-features", "tags, vector", "--vector-size", "5", "--missing", "0.1"]
    main_of("synthesize", *sizes, *features, "--evaluated-users", "50", "--to", folder)
    out = capsys.readouterr().out
    assert "200 users, 150 items, split cold_item (seed 3)" in out
    manifest = Manifest.read(folder)
    assert not manifest.user_features
    assert [(spec.name, spec.size) for spec in manifest.item_features][1] == ("vector", 5)

    main_of("estimate", "sibrar-cold-item", f"dataset={folder}", "--workers", "2")
    out = capsys.readouterr().out
    assert "single_branch on synthetic, 2 ranks, tables replicated" in out
    assert "private memory" in out
    assert "GPU memory" not in out

    main_of("estimate", "sibrar-cold-item", f"dataset={folder}", "--gpu-memory", "24GiB", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["gpus"] == {"replicated": 1, "row_sharded": 1}
    assert told["rank"]["optimizer"] == 2 * told["rank"]["gradients"] > 0
    assert told["total"]["gpu"] > told["rank"]["data"] > 0 == told["total"]["mapped"]


def main_of(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
