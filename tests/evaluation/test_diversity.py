"""Diversity within lists, against the mean over all pairs in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sibra_dist.data.dataset import Csr, Feature
from sibra_dist.data.manifest import FeatureKind, FeatureSpec
from sibra_dist.data.transfer import to_device
from sibra_dist.evaluation.diversity import Directions, mean_distance

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Vector = list[float]


def feature(kind: FeatureKind, items: list[Vector | None]) -> Feature:
    """A feature that says of each item the vector that is given; of a category and of tags, in zeros and ones."""
    size = max((len(item) for item in items if item is not None), default=1)
    dense = torch.tensor([item or [0.0] * size for item in items]).view(-1, size)
    present = torch.tensor([item is not None for item in items], dtype=torch.bool)
    values: torch.Tensor | Csr = dense
    if kind == "category":
        values = dense.argmax(dim=1).int()
    elif kind == "tags":
        lengths = torch.cat([torch.zeros(1), dense.sum(dim=1)]).long()
        values = Csr(lengths.cumsum(0), dense.nonzero()[:, 1].int())
    return Feature(FeatureSpec(name="a", kind=kind, size=size, missing=int((~present).sum())), present, values)


def over_pairs(items: list[Vector | None], listed: list[int]) -> float:
    vectors = [vector for item in listed if item >= 0 and (vector := items[item]) is not None and any(vector)]
    distances = [
        1 - sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)
        for place, one in enumerate(vectors)
        for other in vectors[:place]
    ]
    return sum(distances) / len(distances) if distances else 0.0


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[FeatureKind, list[Vector | None]]:
    kind: FeatureKind = draw(st.sampled_from(["category", "tags", "vector"]))
    size = draw(st.integers(1, 4))
    vector: st.SearchStrategy[Vector] = {
        "category": st.integers(0, size - 1).map(lambda code: [float(place == code) for place in range(size)]),
        "tags": st.lists(st.sampled_from([0.0, 1.0]), min_size=size, max_size=size),
        "vector": st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0]), min_size=size, max_size=size),
    }[kind]
    return kind, draw(st.lists(st.none() | vector, min_size=1, max_size=6))


@pytest.mark.parametrize("device", DEVICES)
@given(catalogue=catalogues(), data=st.data())
def test_it_is_the_mean_over_all_pairs(
    device: str, catalogue: tuple[FeatureKind, list[Vector | None]], data: st.DataObject
) -> None:
    kind, items = catalogue
    # Candidates in another order than the items.
    candidates = data.draw(st.permutations(range(len(items))))
    width = data.draw(st.integers(1, 5))
    row = st.lists(st.integers(-1, len(items) - 1), min_size=width, max_size=width)
    lists = data.draw(st.lists(row, min_size=1, max_size=4))
    directions = to_device(Directions.of(feature(kind, items), torch.tensor(candidates)), torch.device(device))
    found = mean_distance(directions, torch.tensor(lists, device=device)).tolist()
    ordered = [items[item] for item in candidates]
    assert found == pytest.approx([over_pairs(ordered, listed) for listed in lists], abs=1e-5)
    one_by_one = [mean_distance(directions, torch.tensor([listed], device=device)).item() for listed in lists]
    assert found == one_by_one


@pytest.mark.parametrize("kind", ["category", "tags", "vector"])
def test_nothing_is_diverse_without_candidates(kind: FeatureKind) -> None:
    directions = Directions.of(feature(kind, []), torch.arange(0))
    assert mean_distance(directions, torch.tensor([[-1, -1]])).tolist() == [0]


def test_distances_worked_by_hand() -> None:
    genres = feature("tags", [[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], None])
    directions = Directions.of(genres, torch.arange(5))
    # Of 0, 1, 2: 1, 1/2 and 1 - 1/sqrt(2); the same twice; one alone with one that has no genres.
    found = mean_distance(directions, torch.tensor([[0, 1, 2], [0, 3, -1], [4, 1, -1]])).tolist()
    assert found == pytest.approx([(1 + 0.5 + 1 - math.sqrt(0.5)) / 3, 0, 0], abs=1e-6)


def test_sums_of_long_lists_of_equal_vectors_are_held() -> None:
    directions = Directions.of(feature("vector", [[3.0, 4.0], [-3.0, -4.0]]), torch.arange(2))
    items = torch.zeros(2, 2048, dtype=torch.int64)
    items[1, 1024:] = 1
    # Half of the second list points the other way: 1024 * 1024 pairs at a distance of 2, of 2048 * 2047 / 2.
    assert mean_distance(directions, items).tolist() == pytest.approx([0, 2 * 1024 * 1024 / (1024 * 2047)], abs=1e-5)
