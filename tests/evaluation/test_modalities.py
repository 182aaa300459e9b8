"""Every modality hidden in turn and alone."""

from pathlib import Path

import pytest

from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import ConfigError
from sibra_dist.evaluation import modalities
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.evaluation.modalities import each_modality, evaluate_each
from sibra_dist.models import build_model
from sibra_dist.models.single_branch import SingleBranchConfig
from tests.planted import write_planted

READ = (("interactions",), ("interactions", "tags", "cover"))


def rows(hide: dict[str, float]) -> list[tuple[str, str | None, dict[str, float]]]:
    return [(row.kind, row.modality, dict(row.hide)) for row in each_modality(READ, hide)]


def test_rows_of_every_modality_and_none_with_the_only_one_of_a_side() -> None:
    ones = dict.fromkeys
    assert rows({}) == [
        ("full", None, {}),
        ("without", "users.interactions", {"users.interactions": 1.0}),
        ("without", "items.interactions", {"items.interactions": 1.0}),
        ("only", "items.interactions", ones(["items.tags", "items.cover"], 1.0)),
        ("without", "items.tags", {"items.tags": 1.0}),
        ("only", "items.tags", ones(["items.interactions", "items.cover"], 1.0)),
        ("without", "items.cover", {"items.cover": 1.0}),
        ("only", "items.cover", ones(["items.interactions", "items.tags"], 1.0)),
    ]


def test_what_is_hidden_anyway_stays_so_in_every_row() -> None:
    both = {"items.cover": 1.0, "items.tags": 0.25}
    assert rows(both) == [
        ("full", None, both),
        ("without", "users.interactions", {**both, "users.interactions": 1.0}),
        ("without", "items.interactions", {**both, "items.interactions": 1.0}),
        ("only", "items.interactions", {"items.cover": 1.0, "items.tags": 1.0}),
        ("without", "items.tags", {"items.cover": 1.0, "items.tags": 1.0}),
        ("only", "items.tags", {**both, "items.interactions": 1.0}),
    ]


@pytest.mark.parametrize("read", [((), ()), (("interactions",), ())])
def test_nothing_to_hide_is_refused(read: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError, match="--hide each: the model reads no modality that could be hidden"):
        each_modality(read, {"users.interactions": 1.0})


def test_each_row_is_an_evaluation_and_equal_ones_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(SingleBranchConfig(), dataset, seed=0).eval()
    config = EvaluationConfig(metrics=("ndcg", "coverage"), cutoffs=(5,), hide={"items.interactions": 1.0})
    made, told = [], []

    def counted(*arguments: object, **settings: object) -> object:
        made.append(arguments)
        return evaluate(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(modalities, "evaluate", counted)
    found = evaluate_each(model, dataset, "test", config, seed=3, progress=lambda done, total: told.append((done, total)))
    assert len(found) == 9
    # Without one of two modalities, and with the other only, is the same; so it is of users and of items.
    assert len(made) == 5
    assert told == [(done, 9) for done in range(1, 10)]
    for row, outcome in found:
        expected = evaluate(model, dataset, "test", config.model_copy(update={"hide": dict(row.hide)}), seed=3)
        assert (outcome.metrics, outcome.counts) == (expected.metrics, expected.counts)
