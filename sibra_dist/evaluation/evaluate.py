"""Full-ranking evaluation of a split: the same numbers for any number of ranks.

Users are ranked in tiles. Ranks take whole tiles in turn, so a tile's scores come from the same computation wherever it
is done; sums are integers (see `sibra_dist.evaluation.metrics`), so their order does not matter either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sibra_dist.data.dataset import Csr, Dataset, Feature, HeldOut
from sibra_dist.data.presence import parse_hide
from sibra_dist.data.transfer import to_device
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.evaluation.catalog import Catalog
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.embedding import embed_items, shared_out
from sibra_dist.evaluation.item_groups import ItemRecalls, candidate_groupings
from sibra_dist.evaluation.metrics import (
    OVER_ALL_CANDIDATES,
    CatalogTallies,
    UserAverages,
    features_of,
    parse_metric,
    split_metrics,
)
from sibra_dist.evaluation.ranking import NotANumberError, hits, mask_, rank
from sibra_dist.evaluation.user_metrics import Lists
from sibra_dist.models.base import Recommender

EachTile = Callable[[Tensor, Tensor, Tensor], None]
"""(users int64 [U], hits bool [U, K] best first, number of relevant candidates int64 [U])"""
EachValues = Callable[[Tensor, Tensor], None]
"""(users int64 [U], values float64 [U, M] of the metrics of users among those asked for, in their order)"""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, float]
    counts: dict[str, int]
    """`users` averaged over, `users_without_relevant`, `candidates`, and `users_` and `items_without_modality`"""
    item_groups: dict[str, dict[str, Any]]
    """Recall by groups of items, if asked for: what `ItemRecalls` computes."""


@torch.inference_mode()
def evaluate(
    model: Recommender,
    dataset: Dataset,
    split: HeldOut,
    config: EvaluationConfig,
    *,
    names: list[str] | None = None,
    seed: int = 0,
    ranks: tuple[int, int] = (0, 1),
    each: EachTile | None = None,
    each_values: EachValues | None = None,
    item_cutoffs: Sequence[int] = (),
) -> Evaluation:
    """Rank all candidates of a split for every user that holds something out in it.

    Args:
        model: in evaluation mode.
        dataset: what it was built for.
        split: `validation` or `test`.
        config: tiles, what is hidden, and metrics if `names` does not say otherwise.
        names: metrics such as `ndcg@10`. `auc` scores every candidate twice where there are several tiles of them.
        seed: decides which entities lose a modality that is hidden from a share of them.
        ranks: this rank and their number; where there are several, all call this together.
        each: called with every tile of this rank, in order.
        each_values: likewise, with the values of `UserAverages.per_user` for the first metrics of `split_metrics(names)`.
        item_cutoffs: cutoffs of the recall by groups of items; none leaves it out.

    Raises:
        ConfigError: a metric, its feature or a hidden modality is not known.
        SibraError: a score is NaN; the message names the user and the item.
    """
    names = config.names if names is None else names
    hidden_users, hidden_items = parse_hide(config.hide, model.modalities(), seed, "evaluation.hide")
    data, device = dataset.device, model.device
    candidates = dataset.candidates(split)
    position = torch.full((dataset.items.count,), -1, device=data)
    position[candidates] = torch.arange(len(candidates), device=data)

    user_names, catalog_names = split_metrics(names)
    averages = UserAverages(user_names).to(device)
    num_trained = int(dataset.users.histories.lengths().count_nonzero())
    features = {name: _feature(dataset, name) for name in features_of(names)}
    catalog = to_device(Catalog.of(dataset.items.histories.lengths(), candidates, num_trained, features), device)
    tallies = CatalogTallies(catalog_names, catalog).to(device)
    parsed = [parse_metric(metric) for metric in names]
    recalls = ItemRecalls(candidate_groupings(catalog) if item_cutoffs else (), len(candidates), item_cutoffs).to(device)
    k = max(1, *(cutoff for _, cutoff in parsed), *item_cutoffs)
    compared = any(name in OVER_ALL_CANDIDATES for name, _ in parsed)
    embeddings = embed_items(model, candidates, hidden_items, ranks)

    holders, held_out = dataset.held_out[split]
    for rows in shared_out(torch.arange(len(holders), device=data), config.user_tile, ranks):
        users = holders[rows].long()
        if not len(users):
            # The others encode in this turn, and where tables are divided that takes all ranks.
            model.encode_users(users, hidden_users)
            continue
        relevant = _candidates_of(held_out, rows, position)
        relevant, masked = to_device((relevant, _masked(dataset, split, users, position)), device)
        scored = partial(_tile, model, model.encode_users(users, hidden_users), embeddings, masked)
        comparisons = None
        try:
            if compared:
                recommended, comparisons = rank_and_compare(scored, relevant, len(candidates), k, config.item_tile)
            else:
                recommended = rank(scored, len(candidates), k, config.item_tile)
        except NotANumberError as error:
            who = _who(model, dataset, int(users[error.row]), int(candidates[error.candidate]))
            raise NotANumberError(error.row, error.candidate, who) from error
        found_hits = hits(recommended.items, relevant, len(candidates))
        lists = Lists(found_hits, relevant.lengths(), recommended.items, catalog, comparisons)
        averages.update(*lists)
        tallies.update(recommended.items, found_hits, relevant.indices, masked[1])
        recalls.update(recommended.items, found_hits, relevant.indices)
        if each is not None:
            each(users, found_hits, lists.num_relevant.to(data))
        if each_values is not None:
            each_values(users, averages.per_user(*lists))

    found = averages.compute()
    found.pop("num_users_without_relevant")
    counts = {"users": int(found.pop("num_users"))}
    counts["users_without_relevant"] = dataset.users.count - counts["users"]
    counts["candidates"] = len(candidates)
    counts["users_without_modality"] = model.without_modality(items=False, hidden=hidden_users)
    counts["items_without_modality"] = model.without_modality(items=True, hidden=hidden_items)
    found |= tallies.compute()
    return Evaluation({name: found[name] for name in names}, counts, recalls.compute() if item_cutoffs else {})


def _feature(dataset: Dataset, name: str) -> Feature:
    """A feature of the items in which two of them can be compared."""
    known = [feature for feature, held in dataset.items.features.items() if held.spec.kind != "numeric"]
    if name not in known:
        raise ConfigError(
            f"evaluation.metrics: items have no category, tags or vector {name!r} to be diverse in; {nearest(name, known)}"
        )
    return dataset.items.features[name]


def _candidates_of(held_out: Csr, rows: Tensor, position: Tensor) -> Csr:
    """The relevant candidates of some rows; items that are no candidates are left out."""
    items, _ = held_out.gather(rows)
    owner = torch.repeat_interleave(held_out.lengths(rows))
    places = position[items.long()]
    kept = places >= 0
    lengths = torch.bincount(owner[kept], minlength=len(rows))
    return Csr(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), places[kept].int())


def _masked(dataset: Dataset, split: HeldOut, users: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs (row, candidate) that are masked, int64 [Q] each; -1 is an item that is no candidate."""
    rows, items = zip(*dataset.masked(split, users), strict=True)
    return torch.cat(rows), position[torch.cat(items)]


def _tile(model: Recommender, users: Tensor, items: Tensor, masked: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
    return mask_(model.score(users, items[start:stop]), *masked, start)


def _who(model: Recommender, dataset: Dataset, user: int, item: int) -> str:
    """Whose score it is, in words."""
    user_id, item_id = dataset.ids("users")[user].as_py(), dataset.ids("items")[item].as_py()
    return f"{type(model).__name__} for user {user_id!r} (index {user}) and item {item_id!r} (index {item})"
