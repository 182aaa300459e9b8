from pathlib import Path

import pytest

from sibra_dist.config import load_config, to_plain, validate
from sibra_dist.errors import ConfigError
from sibra_dist.training.config import TrainingConfig

CONTRADICTIONS = {
    "labels for a loss that reads none": (
        {"labels": "weights"},
        r"labels weights are read by the loss bce, not by bpr: set loss to bce, or labels to binary",
    ),
    "correction of another loss": (
        {"sampler": {"type": "popularity", "log_q": True}, "loss": "bce"},
        r"sampler.log_q corrects the loss sampled_softmax, not bce: set loss to sampled_softmax, or sampler.log_q to false",
    ),
    "correction of hard negatives": (
        {"sampler": {"log_q": True, "pool": 50}, "loss": "sampled_softmax"},
        r"sampler: log_q corrects for how negatives are drawn.*set log_q to false, or pool to null",
    ),
    "pool that is too small": (
        {"sampler": {"pool": 9}, "negatives": 10},
        r"the 10 negatives are to be the highest-scored of sampler.pool, which is 9: make sampler.pool the larger",
    ),
    "a loss that is for pairs": ({"examples": "users", "loss": "bpr"}, "with examples users the loss is one of"),
    "a sampler without pairs": (
        {"examples": "users", "loss": "bce", "sampler": {"type": "in_batch"}},
        "sampler and labels weights are for examples pairs",
    ),
    "a pool without users": ({"item_pool": 100}, "item_pool and shown_share are for examples users"),
    "share beyond all": ({"hide": {"items.tags": 1.5}}, r"hide.items.tags: input should be less than or equal to 1"),
    "unknown metric": ({"monitor": "ndgc@10"}, r"monitor: there is no metric 'ndgc' \(in 'ndgc@10'\); did you mean ndcg\?"),
    "metric without its cutoff": ({"monitor": "ndcg"}, r"monitor: the metric 'ndcg' needs a cutoff"),
    "metric of the catalogue": ({"monitor": "gini@10"}, r"monitor 'gini@10' is none of ndcg, recall, .*, such as ndcg@10"),
    "unknown loss": ({"loss": "bpp"}, r"loss 'bpp' is not known; did you mean bpr\?"),
}


@pytest.mark.parametrize(("values", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_one_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^test: {message}"):
        validate(TrainingConfig, values, where="test")


@pytest.mark.parametrize(
    "values",
    [
        {"labels": "weights", "loss": "bce"},
        {"sampler": {"type": "in_batch", "log_q": True}, "loss": "sampled_softmax"},
        {"sampler": {"pool": 10}, "negatives": 10},
        {"monitor": "auc"},
        {"examples": "users", "loss": "sampled_softmax", "item_pool": 100, "shown_share": 0.8},
        {"hide": {"items.tags": 0.25, "users.interactions": 1}},
    ],
    ids=str,
)
def test_what_goes_together_is_kept_as_it_was_asked_for(values: dict[str, object]) -> None:
    config = validate(TrainingConfig, values, where="test")
    assert validate(TrainingConfig, to_plain(config), where="test") == config
    assert values.items() <= config.model_dump(exclude_unset=True).items()


def test_what_is_hidden_may_be_nested_as_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("hide: {items.tags: 0.5, users.age: 0.5, items.plot: 0.1}", encoding="utf-8")
    settings = ["hide.items.tags=0.25", "hide.items.plot.full=1"]
    shares = {"items.tags": 0.25, "items.plot": 0.1, "items.plot.full": 1, "users.age": 0.5}
    assert load_config(TrainingConfig, tmp_path / "config.yaml", settings).hide == shares
