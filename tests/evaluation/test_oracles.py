"""Metrics of accuracy against three other implementations: ranx, ir-measures (trec_eval) and torchmetrics.

They define what is compared alike but for `map`, which they divide by |R| (torchmetrics: by the number of hits), not by
min(k, |R|). Ties are broken by trec_eval by the later name, and by the others as it happens: so documents are named from the
last to the first, and the others are given scores in the order of the candidates.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import ir_measures
import numpy as np
import pyarrow.csv as pa_csv
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional import retrieval

from sibra_dist.data.dataset import Csr
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.ranking import MASKED, hits
from sibra_dist.evaluation.tallies import UserAverages
from sibra_dist.evaluation.user_metrics import Lists

NAMES = ("ndcg", "recall", "precision", "map", "hit_rate", "mrr")
TREC = {
    "ndcg": ir_measures.nDCG,
    "recall": ir_measures.R,
    "precision": ir_measures.P,
    "map": ir_measures.AP,
    "hit_rate": ir_measures.Success,
}
TORCHMETRICS: dict[str, Callable[..., Tensor]] = {
    "ndcg": retrieval.retrieval_normalized_dcg,
    "recall": retrieval.retrieval_recall,
    "precision": retrieval.retrieval_precision,
    "hit_rate": retrieval.retrieval_hit_rate,
    "mrr": retrieval.retrieval_reciprocal_rank,
}


class Case(NamedTuple):
    """Users who are given scores of some candidates."""

    scores: Tensor
    """float32 [U, C]; -inf is masked"""
    relevant: Tensor
    """bool [U, C]: candidates that are not masked"""

    def measured(self, names: tuple[str, ...], k: int, tile_size: int) -> tuple[Tensor, dict[str, float]]:
        """Of every user, float64 [U, M], and on average."""
        lengths = self.relevant.sum(dim=1)
        rows = Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), self.relevant.nonzero()[:, 1].int())
        width = self.scores.shape[1]
        found, compared = rank_and_compare(lambda start, stop: self.scores[:, start:stop], rows, width, k, tile_size)
        averages = UserAverages([name if name == "auc" else f"{name}@{k}" for name in names])
        values = averages.per_user(Lists(hits(found.items, rows, width), lengths, found.items, comparisons=compared))
        averages.update(values, lengths)
        return values, averages.compute()

    def ordered(self, user: int, count: int | None = None) -> list[int]:
        """The first candidates of a user, best first, found by Python's own sort."""
        scores = self.scores[user].tolist()
        candidates = [item for item, score in enumerate(scores) if score != MASKED]
        return sorted(candidates, key=lambda item: (-scores[item], item))[:count]

    def truth(self) -> dict[str, dict[str, int]]:
        """What is relevant, in the form that others read."""
        pairs = self.relevant.nonzero().tolist()
        found: dict[str, dict[str, int]] = {f"{user:05}": {} for user, _ in pairs}
        for user, item in pairs:
            found[f"{user:05}"][name_of(item)] = 1
        return found

    def judged(self) -> list[int]:
        """Users with something relevant."""
        return self.relevant.any(dim=1).nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def ranx() -> ModuleType:
    """The same functions as Python runs them: numba takes a minute to compile them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        return importlib.import_module("ranx")


def name_of(item: int) -> str:
    return f"{10**6 - item:07}"


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few users, one candidate or more, few different scores; some candidates are masked, all of some user's."""
    width = draw(st.integers(1, 9))
    # What a candidate is to a user: masked, relevant, or neither.
    roles = draw(st.lists(st.lists(st.integers(0, 2), min_size=width, max_size=width), min_size=1, max_size=5))
    score = st.sampled_from([-1.0, 0.0, 0.5, 2.0])
    scores = draw(st.lists(st.lists(score, min_size=width, max_size=width), min_size=len(roles), max_size=len(roles)))
    role = torch.tensor(roles)
    return Case(torch.tensor(scores).masked_fill(role == 0, MASKED), role == 1)


def planted(users: int = 300, width: int = 40) -> Case:
    """Many users; scores that tell what is relevant, with ties; a tenth of the users have nothing relevant."""
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(users, width, generator=generator) < torch.rand(users, 1, generator=generator)
    relevant = ~masked & (torch.rand(users, width, generator=generator) < 0.2)
    relevant[::10] = False
    scores = torch.randint(6, (users, width), generator=generator) + 2.0 * relevant
    return Case(scores.masked_fill(masked, MASKED), relevant)


def movies(folder: Path, users: int = 400) -> Case:
    """Of MovieLens 1M: a tenth of a user's films is relevant, the others are masked; films are scored by popularity."""
    table = pa_csv.read_csv(folder / "ml-1m" / "interactions.tsv", parse_options=pa_csv.ParseOptions(delimiter="\t"))
    pairs = torch.from_numpy(np.stack([table["user_id"].to_numpy(), table["item_id"].to_numpy()]))
    user, film = pairs[:, pairs[0] <= users] - 1
    held_out = torch.rand(len(user), generator=torch.Generator().manual_seed(0)) < 0.1
    relevant = torch.zeros(users, int(film.max()) + 1, dtype=torch.bool)
    relevant[user[held_out], film[held_out]] = True
    scores = torch.bincount(film[~held_out], minlength=relevant.shape[1]).float().repeat(users, 1)
    scores[user[~held_out], film[~held_out]] = MASKED
    return Case(scores, relevant)


def agree_with_trec(case: Case, k: int, tile_size: int) -> None:
    values, averages = case.measured(NAMES, k, tile_size)
    judged = case.judged()
    assert averages["num_users"] == len(judged)
    if not judged:
        return
    given = {
        f"{user:05}": {name_of(item): case.scores[user, item].item() for item in case.ordered(user, 2 * k)} for user in judged
    }
    measures = {measure @ k: name for name, measure in TREC.items()}
    for found in ir_measures.iter_calc(measures, case.truth(), given):
        name, user = measures[found.measure], int(found.query_id)
        assert values[user, NAMES.index(name)].item() == pytest.approx(found.value * factor(case, name, user, k), abs=1e-6)


def factor(case: Case, name: str, user: int, k: int) -> float:
    """What a value of those who divide `map` by |R| is to be multiplied with."""
    num_relevant = int(case.relevant[user].sum())
    return num_relevant / min(k, num_relevant) if name == "map" else 1.0


def agree_with_ranx(ranx: ModuleType, case: Case, k: int) -> None:
    names = (*NAMES, "f1")
    values, _ = case.measured(names, k, 10**9)
    judged = case.judged()
    given = {
        f"{user:05}": {name_of(item): -float(place) for place, item in enumerate(case.ordered(user, 2 * k))} for user in judged
    }
    found = ranx.evaluate(ranx.Qrels(case.truth()), ranx.Run(given), [f"{name}@{k}" for name in names], return_mean=False)
    for column, name in enumerate(names):
        expected = found[f"{name}@{k}"] * [factor(case, name, user, k) for user in judged]
        np.testing.assert_allclose(values[judged, column], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tile_size", [1, 4, 10**9])
@given(case=cases(), k=st.integers(1, 12))
def test_they_agree_with_trec_eval(tile_size: int, case: Case, k: int) -> None:
    agree_with_trec(case, k, tile_size)


@given(case=cases(), k=st.integers(1, 12))
def test_they_agree_with_torchmetrics_from_scores_on(case: Case, k: int) -> None:
    values, _ = case.measured((*TORCHMETRICS, "auc"), k, 3)
    for user in case.judged():
        ordered = case.ordered(user)
        target = case.relevant[user][ordered]
        places = torch.arange(len(ordered), 0, -1).float()
        own = {name: float(oracle(places, target, top_k=k)) for name, oracle in TORCHMETRICS.items()}
        # Ties are what `auc` is about, so it is given the scores themselves; without an irrelevant candidate it has no pair.
        scores = case.scores[user][ordered]
        own["auc"] = 0.5 if target.all() else float(retrieval.retrieval_auroc(scores, target))
        assert dict(zip(own, values[user].tolist(), strict=True)) == pytest.approx(own, abs=1e-6)


def test_they_agree_with_ranx_and_trec_eval_on_many_users(ranx: ModuleType) -> None:
    case = planted()
    assert 0 < len(case.judged()) < 300
    agree_with_ranx(ranx, case, 10)
    agree_with_trec(case, 10, 7)


@pytest.mark.real_data
def test_they_agree_with_ranx_and_trec_eval_on_movielens(ranx: ModuleType, real_data: Path) -> None:
    case = movies(real_data)
    agree_with_ranx(ranx, case, 20)
    agree_with_trec(case, 20, 1000)
