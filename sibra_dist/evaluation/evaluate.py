"""Full-ranking evaluation of a split: the same numbers for any number of ranks.

Users are ranked in tiles. Ranks take whole tiles in turn, so a tile's scores come from the same computation wherever it
is done; sums are integers (see `sibra_dist.evaluation.metrics`), so their order does not matter either.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sibra_dist.data.dataset import Dataset, HeldOut
from sibra_dist.data.presence import parse_hide
from sibra_dist.data.transfer import to_device
from sibra_dist.evaluation.comparisons import rank_and_compare
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.embedding import embed_items, shared_out
from sibra_dist.evaluation.findings import EachTile, Evaluation, Findings
from sibra_dist.evaluation.ranking import NotANumberError, mask_, rank
from sibra_dist.evaluation.truth import Truth
from sibra_dist.models.base import Recommender


@torch.inference_mode()
def evaluate(
    model: Recommender,
    dataset: Dataset,
    split: HeldOut,
    config: EvaluationConfig,
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    ranks: tuple[int, int] = (0, 1),
    each: EachTile | None = None,
    item_cutoffs: Sequence[int] = (),
) -> Evaluation:
    """Rank all candidates of a split for every user that holds something out in it.

    Beside what `Findings` counts, `users_without_modality` and `items_without_modality` are.

    Args:
        model: in evaluation mode.
        dataset: what it was built for.
        split: `validation` or `test`.
        config: tiles, what is hidden, and metrics if `names` does not say otherwise.
        names: metrics such as `ndcg@10`. `auc` scores every candidate twice where there are several tiles of them.
        seed: decides which entities lose a modality that is hidden from a share of them.
        ranks: this rank and their number; where there are several, all call this together.
        each: called with every tile of this rank, in order; see `Findings`.
        item_cutoffs: cutoffs of the recall by groups of items; none leaves it out.

    Raises:
        ConfigError: a metric, its feature or a hidden modality is not known.
        SibraError: a score is NaN; the message names the user and the item.
    """
    hidden_users, hidden_items = parse_hide(config.hide, model.modalities(), seed, "evaluation.hide")
    truth, device = Truth.of(dataset, split, config.candidates), model.device
    num_candidates = len(truth.candidates)
    findings = Findings(dataset, truth.candidates, config.names if names is None else names, device, each, item_cutoffs)
    embeddings = embed_items(model, truth.candidates, hidden_items, ranks)
    for rows in shared_out(torch.arange(len(truth.users), device=dataset.device), config.user_tile, ranks):
        users, relevant, masked = truth.tile(rows)
        # Also of nobody: the others encode in this turn, and where tables are divided that takes all ranks.
        encoded = model.encode_users(users, hidden_users)
        if not len(users):
            continue
        relevant, masked = to_device((relevant, masked), device)
        scored = partial(_tile, model, encoded, embeddings, masked)
        comparisons = None
        try:
            if findings.compares:
                best, comparisons = rank_and_compare(scored, relevant, num_candidates, findings.length, config.item_tile)
            else:
                best = rank(scored, num_candidates, findings.length, config.item_tile)
        except NotANumberError as error:
            who = _who(model, dataset, int(users[error.row]), int(truth.candidates[error.candidate]))
            raise NotANumberError(error.row, error.candidate, who) from error
        findings.add(users, best.items, relevant, masked[1], comparisons)
    return findings.evaluation(
        {
            "users_without_modality": model.without_modality(items=False, hidden=hidden_users),
            "items_without_modality": model.without_modality(items=True, hidden=hidden_items),
        }
    )


def _tile(model: Recommender, users: Tensor, items: Tensor, masked: tuple[Tensor, Tensor], start: int, stop: int) -> Tensor:
    return mask_(model.score(users, items[start:stop]), *masked, start)


def _who(model: Recommender, dataset: Dataset, user: int, item: int) -> str:
    """Whose score it is, in words."""
    user_id, item_id = dataset.ids("users")[user].as_py(), dataset.ids("items")[item].as_py()
    return f"{type(model).__name__} for user {user_id!r} (index {user}) and item {item_id!r} (index {item})"
