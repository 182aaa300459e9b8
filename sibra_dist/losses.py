"""Training losses: of the scores of a positive and its negatives, and of two views of the same entities.

Each gives one loss an example, [B] in float32: the caller multiplies by the examples' weights and divides by the weight
of the global batch, so that a padded example counts for nothing. All are computed from logits and in float32, whatever
the autocast type.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

NO_CANDIDATE = -1e30

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(scores [B, 1 + N] with the positive in column 0 and N >= 1 negatives, labels [B] of the positives in [0, 1],
log_counts [B, N]: log of how many items each negative stands for) -> [B]"""


def bpr(scores: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
    """Bayesian personalised ranking: the mean over the negatives j of -log sigmoid(s_pos - s_j) (Rendle et al., UAI 2009)."""
    scores = scores.float()
    return F.softplus(scores[:, 1:] - scores[:, :1]).mean(dim=1)


def bce(scores: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
    """Binary cross-entropy: the mean over the 1 + N items, with the positive's label, and 0 for the negatives.

    The loss of NeuMF (He et al., WWW 2017), DMF (Xue et al., IJCAI 2017) and CoBraR; labels between 0 and 1 are DMF's
    ratings over the largest rating.
    """
    scores = scores.float()
    positive = scores[:, 0]
    # -log sigmoid(s) = softplus(-s), and -log(1 - sigmoid(s)) = softplus(s).
    own = labels * F.softplus(-positive) + (1 - labels) * F.softplus(positive)
    return torch.cat([own[:, None], F.softplus(scores[:, 1:])], dim=1).mean(dim=1)


def sampled_softmax(scores: Tensor, labels: Tensor, log_counts: Tensor) -> Tensor:
    """Cross-entropy over all items, the sum over those not drawn estimated from the N negatives.

    -s_pos + log(exp s_pos + sum_j exp(s_j + log_counts_j)): negative j stands for exp(log_counts_j) items, which are n / N
    of n for uniform draws, or 1 / (N q_j) where it is drawn with probability q_j (Jean et al., ACL 2015; Bengio & Senécal,
    2008).
    """
    scores = scores.float()
    return torch.cat([scores[:, :1], scores[:, 1:] + log_counts], dim=1).logsumexp(dim=1) - scores[:, 0]


LOSSES: dict[str, Loss] = {"bpr": bpr, "bce": bce, "sampled_softmax": sampled_softmax}

PoolLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(scores [B, P] of users with one pool of items, targets bool [B, P], negatives bool [B, P], log of how many items each item
of the pool stands for) -> [B]; a user without targets has any finite loss"""


def pool_softmax(scores: Tensor, targets: Tensor, negatives: Tensor, log_count: float) -> Tensor:
    """`sampled_softmax` of each target against all the negatives of the pool, averaged over the user's targets.

    With one target a user this is the multinomial likelihood of Liang et al. (WWW 2018); other targets of the user are not
    among what a target is told from.
    """
    scores = scores.float()
    # A finite stand-in for -inf: the logarithm of an empty sum has no gradient, and a user may have no negatives.
    others = scores.masked_fill(~negatives, NO_CANDIDATE).logsumexp(dim=1, keepdim=True) + log_count
    return _mean_where(targets, F.softplus(others - scores))


def pool_bce(scores: Tensor, targets: Tensor, negatives: Tensor, log_count: float) -> Tensor:
    """Binary cross-entropy, averaged over the user's targets and negatives."""
    scores = scores.float()
    # softplus(-s) where the label is 1, and softplus(s) where it is 0.
    return _mean_where(targets | negatives, F.softplus(torch.where(targets, -scores, scores)))


def _mean_where(wanted: Tensor, values: Tensor) -> Tensor:
    """The mean of values [B, P] over what is wanted of each row; 0 where nothing is."""
    return torch.where(wanted, values, 0.0).sum(dim=1) / wanted.sum(dim=1).clamp(min=1)


POOL_LOSSES: dict[str, PoolLoss] = {"sampled_softmax": pool_softmax, "bce": pool_bce}


def symmetric_info_nce(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Symmetric InfoNCE: each of n entities is to find its own other view among the n, in both directions.

    With L = A Bᵀ / temperature the loss of an example is CE(L, identity) + CE(Lᵀ, identity), each the mean over its n rows
    (van den Oord et al., 2018; symmetric: Zhang et al., 2023). Views are compared as they come, not normalised.

    a, b: [B, n, d]. Returns [B].
    """
    # Autocast would multiply in half precision, and the temperature magnify what that rounds away.
    with torch.autocast(a.device.type, enabled=False):
        logits = a.float() @ b.float().transpose(1, 2) / temperature
        own = logits.diagonal(dim1=1, dim2=2)
        return (logits.logsumexp(dim=2) + logits.logsumexp(dim=1) - 2 * own).mean(dim=1)


def candidates_info_nce(a: Tensor, b: Tensor, temperature: float, num_examples: int) -> Tensor:
    """Symmetric InfoNCE among the candidates of each example, [B, n, d], or among the one pool of all of them, [P, d].

    Returns [B], with B the number of examples.
    """
    if a.dim() == 3:
        return symmetric_info_nce(a, b, temperature)
    return symmetric_info_nce(a[None], b[None], temperature).expand(num_examples)


def batch_info_nce(a: Tensor, b: Tensor, weights: Tensor, temperature: float, *, local: bool = False) -> Tensor:
    """Symmetric InfoNCE among the examples of the global batch: each is to find its own other view among all, both ways.

    As `symmetric_info_nce`, with the examples of all ranks as the candidates: both views are gathered with gradients, so
    that gradients summed over the ranks are those of one rank. Every rank must call it, and go backward, equally often.

    Args:
        a: [B, d], one view of this rank's examples; B is the same on every rank.
        b: [B, d], the other.
        weights: [B]; an example of weight 0 (padding) is nobody's candidate, and its loss is 0.
        temperature: divides the dot products.
        local: whether only this rank's examples are candidates: nothing is communicated, and the result depends on the
            number of ranks.

    Returns:
        [B], for this rank's examples.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, real = a.float(), b.float(), weights > 0
        every_a, every_b, every_real, first = a, b, real, 0
        if not local:
            gathered = gather_rows(torch.cat([a, b, weights.float()[:, None]], dim=1))
            every_a, every_b = gathered[:, : a.shape[1]], gathered[:, a.shape[1] : -1]
            every_real, first = gathered[:, -1] > 0, _rank() * len(a)
        own = torch.arange(len(a), device=a.device)
        # Its own other view stays with a padded example too: the logarithm of an empty sum has no gradient.
        candidate = every_real.repeat(len(a), 1)
        candidate[own, first + own] = True
        rows, columns = (
            (views @ others.T / temperature).masked_fill(~candidate, float("-inf"))
            for views, others in ((a, every_b), (b, every_a))
        )
        loss = sum(logits.logsumexp(dim=1) - logits[own, first + own] for logits in (rows, columns))
        return torch.where(real, loss, 0.0)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [B, ...] of all W ranks in order of rank, [W * B, ...]; B is the same on every rank.

    The gradient of a rank's own rows is the sum of what all ranks pass back for them.
    """
    if not _distributed():
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[_rank()]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _distributed() else 0
