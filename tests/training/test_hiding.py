"""What is hidden on purpose: in training, in evaluation, and the same in both."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sibra_dist.data.batches import EMPTY
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.errors import ConfigError
from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
from sibra_dist.training.loop import Trainer
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config
from tests.training.test_loop import start

ITEMS = ("interactions", "tags", "cover")


def drawn_items(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Items of an epoch's batches, int64 [n], and a modality that was drawn of each."""
    items, modalities = [], []
    for step in range(trainer.batches.steps_per_epoch):
        batch = trainer.batches.batch(0, step)
        items.append(batch.items[..., None].expand_as(batch.item_modalities).flatten())
        modalities.append(batch.item_modalities.flatten())
    used = torch.cat(modalities) != EMPTY
    return torch.cat(items)[used], torch.cat(modalities)[used]


def test_what_is_hidden_is_never_drawn_and_all_else_is(planted: Path, tmp_path: Path) -> None:
    trainer = start(tmp_path / "run", planted, training__hide={"items.tags": 0.5, "items.cover": 1.0}, seed=3)
    items, modalities = drawn_items(trainer)
    assert 2 not in modalities
    with_tags = set(items[modalities == 1].tolist())
    hidden = Hidden("items", {"tags": 0.5}, seed=3)
    allowed = hidden.visible(("tags",), torch.arange(80))[:, 0] & open_dataset(planted).items.features["tags"].present
    assert with_tags == set(torch.nonzero(allowed).flatten().tolist())


def test_training_and_evaluation_hide_the_same_ones(planted: Path, tmp_path: Path) -> None:
    """Items that lose everything: "unknown" is drawn in training for just as many as evaluation counts."""
    hide = {f"items.{name}": 0.5 for name in ITEMS}
    trainer = start(tmp_path / "run", planted, training__hide=hide, training__epochs=1, seed=1)
    items, modalities = drawn_items(trainer)
    nothing = items[modalities == len(ITEMS)].unique()
    trainer.fit()
    found = evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest(hide=hide))
    assert found.counts["items_without_modality"] == len(nothing) > 3
    assert evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest()).counts["items_without_modality"] == 0


def test_a_model_learns_from_what_is_left(planted: Path, tmp_path: Path) -> None:
    """Half of the items keep each of their modalities; and what never was there in training helps nobody later."""
    hide = {"items.interactions": 0.5, "items.tags": 0.5}
    start(tmp_path / "run", planted, training__hide=hide, training__epochs=10).fit()
    assert evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest()).metrics["recall@10"] > 0.35


def test_a_run_hides_in_evaluation_what_its_configuration_says(planted: Path, tmp_path: Path) -> None:
    hide = {"items.interactions": 0.5, "items.tags": 1.0}
    start(tmp_path / "run", planted, training__epochs=2, evaluation__hide=hide, seed=4).fit()
    run = RunFolder(tmp_path / "run")
    folder = tmp_path / "run" / "evaluation"
    validation = evaluate_run(run, EvaluationRequest("validation"))
    assert sorted(path.name for path in (folder / "validation").iterdir()) == [
        "metrics-without-items.interactions=0.5-items.tags.json",
        "users-without-items.interactions=0.5-items.tags.parquet",
    ]
    best = max(line["val/ndcg@10"] for line in run.metrics())
    assert validation.metrics["ndcg@10"] == pytest.approx(best, abs=1e-6)  # early stopping saw the same

    whole = evaluate_run(run, EvaluationRequest("validation", {"items.interactions": 0.0, "items.tags": 0.0}))
    assert json.loads((folder / "validation" / "metrics.json").read_text())["hidden"] == []
    assert whole.metrics != validation.metrics

    more = EvaluationRequest("validation", {"items.interactions": 0.75, "items.cover": 0.25})
    evaluate_run(run, more)
    assert read_evaluation(run, more)["hidden"] == ["items.cover=0.25", "items.interactions=0.75", "items.tags"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__hide": {"items.tag": 0.5}}, r"^training.hide items.tag: .* did you mean items.tags\?"),
        ({"evaluation__hide": {"users.clubb": 0.5}}, r"^evaluation.hide users.clubb: .* did you mean users.club\?"),
        ({"training__labels": "weights", "training__loss": "bce"}, r"^training.labels is weights, but .* have none"),
    ],
    ids=["training", "evaluation", "labels"],
)
def test_what_cannot_be_served_is_told_before_a_run_is_there(
    planted: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    config, dataset, run = make_config(planted, **settings), open_dataset(planted), RunFolder(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        run.create(config, dataset)
    assert not run.path.exists()
    with pytest.raises(ConfigError, match=message):
        Trainer(config, dataset, run)
    assert not run.path.exists()


def test_a_hidden_name_that_evaluate_is_given_is_told_as_it_was_written(planted: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", planted, training__epochs=1).fit()
    with pytest.raises(ConfigError, match=r"^--hide items.tag: the model reads no such modality; did you mean items.tags"):
        evaluate_run(RunFolder(tmp_path / "run"), EvaluationRequest(hide={"items.tag": 1.0}))
