"""Recall by groups of items, by hand and against counting in plain Python."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Csr, open_dataset
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.evaluate import evaluate
from sibra_dist.evaluation.groups import Grouping
from sibra_dist.evaluation.item_groups import ItemRecalls, candidate_groupings
from sibra_dist.evaluation.ranking import hits
from sibra_dist.models import build_model
from sibra_dist.models.baselines import PopConfig
from tests.planted import write_planted


def csr(rows: Sequence[Sequence[int]]) -> Csr:
    lengths = torch.tensor([0, *map(len, rows)])
    return Csr(lengths.cumsum(0), torch.tensor([item for row in rows for item in sorted(row)], dtype=torch.int32))


def grouped(groups: Sequence[int], labels: Sequence[str]) -> Grouping:
    values = torch.tensor(groups)
    return Grouping("by", tuple(labels), values, torch.ones_like(values, dtype=torch.bool))


def told(recalls: ItemRecalls, items: Tensor, relevant: Csr, num_candidates: int) -> None:
    recalls.update(items, hits(items, relevant, num_candidates), relevant.indices)


def test_candidates_are_divided_by_what_training_saw() -> None:
    """Of 10 interactions the head holds 2 or more, in whole items: the first one."""
    popularity = torch.tensor([4, 0, 3, 2, 1, 0])
    cold_start, by_popularity = candidate_groupings(Catalog.of(popularity, torch.tensor([0, 1, 3, 5]), num_users=4))
    everyone = torch.arange(4)
    assert [cold_start.labels[group] for group in cold_start.groups(everyone)] == ["warm", "cold", "warm", "cold"]
    assert [by_popularity.labels[group] for group in by_popularity.groups(everyone)] == ["head", *["long tail"] * 3]


def test_recall_and_gap_by_hand() -> None:
    recalls = ItemRecalls([grouped([0, 0, 1, 1, 3], "abcd")], 5, (1, 2))
    items = torch.tensor([[0, 2, 1], [3, 4, -1]])
    told(recalls, items, csr([[0, 1, 2], [2, 4]]), 5)
    assert recalls.compute() == {
        "by": {
            "groups": {
                "a": {"candidates": 2, "relevant": 2, "metrics": {"recall@1": 0.5, "recall@2": 0.5}},
                "b": {"candidates": 2, "relevant": 2, "metrics": {"recall@1": 0.0, "recall@2": 0.5}},
                "d": {"candidates": 1, "relevant": 1, "metrics": {"recall@1": 0.0, "recall@2": 1.0}},
            },
            "gap": {"recall@1": 0.5, "recall@2": 0.5},
        }
    }


def test_a_group_of_which_nothing_is_relevant_has_no_recall() -> None:
    recalls = ItemRecalls([grouped([0, 1], "ab")], 2, (1,))
    told(recalls, torch.tensor([[1]]), csr([[1]]), 2)
    found = recalls.compute()["by"]
    assert found["groups"]["a"] == {"candidates": 1, "relevant": 0, "metrics": {}}
    assert found["gap"] == {"recall@1": 0.0}


def test_nobody_has_been_told() -> None:
    found = ItemRecalls([grouped([0, 1], "ab")], 2, (1,)).compute()["by"]
    assert found["gap"] == {}
    assert [group["relevant"] for group in found["groups"].values()] == [0, 0]


def test_lists_that_are_too_short_are_refused() -> None:
    with pytest.raises(ValueError, match="a cutoff of 3 of lists of 2"):
        told(ItemRecalls([grouped([0, 0], "a")], 2, (3,)), torch.tensor([[0, 1]]), csr([[1]]), 2)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_recall_in_plain_python_for_any_tiles(candidates: int, users: int, tile: int, draw: random.Random) -> None:
    groups = [draw.randrange(3) for _ in range(candidates)]
    lists = [draw.sample(range(candidates), candidates) for _ in range(users)]
    relevant = [draw.sample(range(candidates), draw.randint(0, candidates)) for _ in range(users)]
    cutoffs = (1, candidates)
    recalls = ItemRecalls([grouped(groups, "abc")], candidates, cutoffs)
    for start in range(0, users, tile):
        own = slice(start, start + tile)
        told(recalls, torch.tensor(lists[own]), csr(relevant[own]), candidates)
    found = recalls.compute()["by"]["groups"]
    for number, label in enumerate("abc"):
        wanted = [(user, item) for user, row in enumerate(relevant) for item in row if groups[item] == number]
        assert (label in found) == (number in groups)
        for k in cutoffs:
            if wanted:
                share = sum(item in lists[user][:k] for user, item in wanted) / len(wanted)
                assert found[label]["metrics"][f"recall@{k}"] == share


def test_an_evaluation_tells_them_only_if_asked_to(tmp_path: Path) -> None:
    dataset = open_dataset(write_planted(tmp_path / "dataset"))
    model = build_model(PopConfig(), dataset, seed=0).eval()
    config = EvaluationConfig(user_tile=7)
    assert evaluate(model, dataset, "test", config).item_groups == {}
    found = evaluate(model, dataset, "test", config, names=["ndcg@1"], item_cutoffs=(8,)).item_groups
    pairs = dataset.manifest.counts.test
    everything = {"candidates": 8, "relevant": pairs, "metrics": {"recall@8": 1.0}}  # all 8 candidates are shown
    assert found["cold_start"]["groups"] == {"cold": everything}
    assert found["popularity"]["groups"] == {"long tail": everything}
