"""The gap between modalities against hand-made embeddings and plain numpy."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.errors import ConfigError, SibraError
from sibra_dist.evaluation import gap
from sibra_dist.evaluation.gap import Gap, Placed, SideView, modality_gaps, sampled
from sibra_dist.models.base import Recommender
from tests.planted import write_planted

ABSENT = [math.inf, math.inf]


class Tabled(Recommender):
    """Items have modalities whose embeddings are given, [n, 2] each; absent ones are infinite. Users have nothing."""

    def __init__(self, **tables: list[list[float]]) -> None:
        super().__init__()
        self.tables = {name: torch.tensor(table) for name, table in tables.items()}

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return (), tuple(self.tables)

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        present = torch.stack([table.isfinite().all(1) for table in self.tables.values()], dim=1)
        return present & hidden.visible(tuple(self.tables), torch.arange(len(present)))

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        raise AssertionError("users have no modalities")

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        seen = self.seen(True, hidden)[items]
        assert (seen.sum(1) == 1).all(), "not one modality alone"
        stacked = torch.stack([table[items] for table in self.tables.values()], dim=1)
        return stacked[seen]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("gap") / "dataset"))


def gaps(dataset: Dataset, model: Recommender, hide: dict[str, float] | None = None, **settings: Any) -> list[Gap]:
    return modality_gaps([SideView(model, dataset, Hidden("items", hide or {}))], (1, 2), **settings)


def test_a_gap_by_hand(dataset: Dataset) -> None:
    """Of four items three have both. The lengths of embeddings do not matter; item 3's text is nearest to item 0's image."""
    text = [[2.0, 0.0], ABSENT, [0.0, 1.0], [5.0, 0.0]]
    image = [[0.5, 0.0], [1.0, 0.0], [0.0, 3.0], [0.0, -1.0]]
    (found,) = gaps(dataset, Tabled(text=text, image=image))
    assert (found.side, found.modalities, found.entities, found.compared) == ("items", ("text", "image"), 3, 3)
    # Centroids (2/3, 1/3) and (1/3, 0).
    assert found.distance == pytest.approx(math.sqrt(2) / 3, abs=1e-7)
    # Texts 0 and 2 find theirs first; text 3 has cosine 1 with image 0 and, as with its own, 0 with image 2.
    # Images 0 and 2 find theirs first, of equals the lower; image 3 is as near to text 0 as to its own.
    assert found.recalls == ({1: 2 / 3, 2: 2 / 3}, {1: 2 / 3, 2: 1.0})


def test_what_is_hidden_anyway_is_missing_and_nothing_is_left_to_compare(dataset: Dataset) -> None:
    model = Tabled(text=[[1.0, 0.0]], image=[[1.0, 0.0]], sound=[[0.0, 1.0]])
    found = gaps(dataset, model, hide={"image": 1.0})
    assert [(one.modalities, one.entities) for one in found] == [
        (("text", "image"), 0),
        (("text", "sound"), 1),
        (("image", "sound"), 0),
    ]
    assert found[1].distance == pytest.approx(math.sqrt(2))
    assert (found[0].distance, found[0].recalls) == (None, ({}, {}))


def test_an_embedding_of_length_zero_is_as_near_to_all(dataset: Dataset) -> None:
    (found,) = gaps(dataset, Tabled(text=[[0.0, 0.0]] * 3, image=[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    assert found.recalls == ({1: 1 / 3, 2: 2 / 3},) * 2


def test_fewer_than_two_modalities_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="fewer than two modalities of users, and of items: there is no gap to measure"):
        gaps(dataset, Tabled(text=[[1.0, 0.0]]))


def test_what_is_not_a_number_is_told_with_its_item(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tabled(text=[[1.0, 0.0]] * 3, image=[[1.0, 0.0]] * 3)
    encode = model.encode_items
    monkeypatch.setattr(
        model, "encode_items", lambda items, hidden: encode(items, hidden).masked_fill_(items[:, None] == 2, math.nan)
    )
    with pytest.raises(SibraError, match=r"the embedding of item 'i0002' in text is not a number"):
        gaps(dataset, model)


def test_a_sample_is_smaller_and_nested_and_leaves_centroids_alone(dataset: Dataset) -> None:
    generator = np.random.default_rng(0)
    tables = {name: generator.normal(size=(50, 2)).tolist() for name in ("text", "image")}
    (whole,) = gaps(dataset, Tabled(**tables))
    (some,) = gaps(dataset, Tabled(**tables), sample=10)
    assert (some.entities, some.compared, some.distance) == (50, 10, whole.distance)
    assert some.recalls != whole.recalls
    entities = torch.arange(50)
    ten, twenty = (sampled(entities, most).tolist() for most in (10, 20))
    assert ten == sorted(ten)
    assert len(set(ten)) == 10
    assert set(ten) < set(twenty)
    assert sampled(entities, 50) is entities


@pytest.mark.parametrize("tile", [1, 7, 10**6])
@pytest.mark.parametrize("world", [1, 3])
def test_any_tiles_and_ranks_find_the_same(monkeypatch: pytest.MonkeyPatch, tile: int, world: int) -> None:
    """What is ahead of each, counted in plain numpy; coarse coordinates make many ties."""
    generator = np.random.default_rng(0)
    first, second = (generator.integers(-2, 3, (40, 3)) for _ in range(2))
    monkeypatch.setattr(gap, "TILE", tile)
    total = torch.zeros(2, 40, dtype=torch.int64)
    for rank in range(world):
        placed = Placed(40)
        for start in range(rank * tile, 40, world * tile):
            placed.update(*(torch.from_numpy(table).int() for table in (first, second)), start)
        total += placed.compute()
    numbers = np.arange(40)
    for row, scores in enumerate((first @ second.T, second @ first.T)):
        own = scores.diagonal()[:, None]
        ahead = (scores > own) | ((scores == own) & (numbers < numbers[:, None]))
        assert total[row].tolist() == ahead.sum(1).tolist()


unit = st.floats(-1, 1, width=32)


@given(st.lists(st.tuples(*[unit] * 5), min_size=2, max_size=2), st.permutations(range(5)))
def test_products_are_exact_in_any_order(vectors: list[tuple[float, ...]], order: list[int]) -> None:
    """Added in another order they are equal, and to the sum in whole numbers."""
    tables = torch.tensor(vectors, dtype=torch.float64)
    lengths = tables.norm(dim=1, keepdim=True)
    units = (tables / torch.where(lengths > 1e-12, lengths, 1) * gap.ONE).round().int()
    whole = sum(int(a) * int(b) for a, b in zip(*units.tolist(), strict=True))
    assert float(gap._dots(units[:1], units[1:])) == whole
    assert float(gap._dots(units[:1, order], units[1:, order])) == whole
    assert float(units[:1].double() @ units[1:].double().T) == whole
