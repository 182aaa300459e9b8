"""Training losses: of the scores of a positive and its negatives, and of two views of the same entities.

Each gives one loss an example, [B] in float32: the caller multiplies by the examples' weights and divides by the weight
of the global batch, so that a padded example counts for nothing. All are computed from logits and in float32, whatever
the autocast type.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, int], Tensor]
"""(scores [B, 1 + N] with the positive in column 0 and N >= 1 negatives, number of items negatives are drawn from) -> [B]"""


def bpr(scores: Tensor, num_candidates: int) -> Tensor:
    """Bayesian personalised ranking: the mean over the negatives j of -log sigmoid(s_pos - s_j) (Rendle et al., UAI 2009)."""
    scores = scores.float()
    return F.softplus(scores[:, 1:] - scores[:, :1]).mean(dim=1)


def bce(scores: Tensor, num_candidates: int) -> Tensor:
    """Binary cross-entropy: the mean over the 1 + N items, with label 1 for the positive and 0 for the negatives.

    The loss of NeuMF (He et al., WWW 2017), of DMF with implicit feedback (Xue et al., IJCAI 2017) and of CoBraR.
    """
    scores = scores.float()
    # -log sigmoid(s) = softplus(-s), and -log(1 - sigmoid(s)) = softplus(s).
    return F.softplus(torch.cat([-scores[:, :1], scores[:, 1:]], dim=1)).mean(dim=1)


def sampled_softmax(scores: Tensor, num_candidates: int) -> Tensor:
    """Cross-entropy over all items, the sum over those not drawn estimated from N uniform negatives.

    -s_pos + log(exp s_pos + sum_j exp(s_j + log(num_candidates / N))): each negative stands for num_candidates / N items
    (Jean et al., ACL 2015; Bengio & Senécal, 2008).
    """
    scores = scores.float()
    negatives = scores[:, 1:] + math.log(num_candidates / (scores.shape[1] - 1))
    return torch.cat([scores[:, :1], negatives], dim=1).logsumexp(dim=1) - scores[:, 0]


LOSSES: dict[str, Loss] = {"bpr": bpr, "bce": bce, "sampled_softmax": sampled_softmax}


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
