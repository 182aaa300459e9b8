"""Matrix factorization: an embedding of each user and of each item, and a bias of each item.

The score is s(u, i) = p_u . q_i + b_i. Trained with the loss `bpr` it is Rendle, Freudenthaler, Gantner, Schmidt-Thieme,
"BPR: Bayesian Personalized Ranking from Implicit Feedback", UAI 2009. Milogradskii, Lashinin, P, Ananyeva, Kolesnikov,
"Revisiting BPR: A Replicability Study of a Common Recommender System Baseline", RecSys 2024, find that common
implementations reach up to half less than the method can, because they lack parts of it: the item bias, and an L2
regularisation of what a step touches with a weight of its own for users, positives and negatives. Both are here.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from sibra_dist.config import Config
from sibra_dist.data.batches import ModalitySampling
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.transfer import to_device
from sibra_dist.data.user_batches import AnyBatch
from sibra_dist.models.base import ModelConfig, Recommender, StepOutput
from sibra_dist.models.encoders import ID, presence
from sibra_dist.models.tables import Lookup, Table
from sibra_dist.models.towers import IdTower, Tower

Weight = Annotated[float, Field(ge=0)]


class RegularizationConfig(Config):
    """Weights of the squared lengths of what a training example touches, added to its loss; see also `weight_decay`."""

    users: Weight = 0.0
    """Of the user's embedding."""
    positives: Weight = 0.0
    """Of the positive item's embedding; not read where examples are users."""
    negatives: Weight = 0.0
    """Of the negative items' embeddings: the mean over them, or where examples are users over the pool of items."""
    bias: Weight = 0.0
    """Of the items' biases: the positive's, and the mean as that of the negatives."""


class MatrixFactorizationConfig(ModelConfig):
    """Matrix factorization."""

    type: Literal["mf"] = "mf"
    embedding_size: Annotated[int, Field(ge=1)] = 128
    """Width d of the embeddings of users and items."""
    item_bias: bool = True
    """Whether each item has a bias."""
    initial_deviation: Annotated[float, Field(gt=0)] = 0.01
    """Embeddings start normally distributed around 0 with this standard deviation, biases at 0."""
    regularization: RegularizationConfig = RegularizationConfig()
    """L2 regularisation of what a step touches."""


class MatrixFactorization(Recommender):
    """See the module's docstring.

    The one modality of a side is `id`: it is there for entities with training interactions. Without it an embedding is
    zero, and so is an item's bias, so that all cold items have the same score.
    """

    def __init__(self, config: MatrixFactorizationConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__()
        self.config = config
        self.user_embedding = id_embedding(dataset.users.known, config.embedding_size, config.initial_deviation)
        self.item_embedding = id_embedding(dataset.items.known, config.embedding_size, config.initial_deviation)
        self.item_bias = nn.Parameter(torch.zeros(dataset.items.known, 1)) if config.item_bias else None
        self.users_present = presence(ID, dataset.users)[:, None]
        self.items_present = presence(ID, dataset.items)[:, None]

    def read(self, batch: AnyBatch) -> tuple[Lookup, Lookup]:
        """See `Recommender`."""
        return self.user_embedding.plan_lookup(batch.users), self.item_embedding.plan_lookup(batch.items)

    def step(self, batch: AnyBatch, read: tuple[Lookup, Lookup]) -> StepOutput:
        """Scores, and the loss "regularization" where a weight of it is not zero."""
        users, items = self.user_embedding.lookup(read[0]), self.item_embedding.lookup(read[1])
        bias = None if self.item_bias is None else F.embedding(batch.items, self.item_bias).squeeze(-1)
        # Drawn of the one modality is either its number, 0, or 1 for "nothing is there". What is not there is left out
        # of scores and lengths, not of embeddings, which are many times as large.
        users_seen = (batch.user_modalities[:, 0] == 0).to(users.dtype)
        items_seen = (batch.item_modalities[..., 0] == 0).to(items.dtype)
        scores = self.batch_scores(users, items) * users_seen[:, None]
        if bias is not None:
            scores = scores + bias
        return StepOutput(scores * items_seen, self._regularization(users, items, bias, users_seen, items_seen))

    def _regularization(
        self, users: Tensor, items: Tensor, bias: Tensor | None, users_seen: Tensor, items_seen: Tensor
    ) -> dict[str, Tensor]:
        """The loss of `RegularizationConfig`, [B], unless all its weights are zero."""
        weights = self.config.regularization
        terms = []
        if weights.users:
            terms.append(weights.users * users_seen * users.square().sum(-1))
        if weights.positives or weights.negatives:
            lengths = items_seen * items.square().sum(-1)
            terms.append(_of_candidates(lengths, len(users), weights.positives, weights.negatives))
        if weights.bias and bias is not None:
            terms.append(_of_candidates(items_seen * bias.square(), len(users), weights.bias, weights.bias))
        return {"regularization": torch.stack(terms).sum(0)} if terms else {}

    def encode_users(self, users: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d], and with an item bias one more column of ones."""
        seen, users = to_device((self._seen(users, self.users_present, hidden), users), self.device)
        embedded = self.user_embedding.lookup(users) * seen
        return embedded if self.item_bias is None else F.pad(embedded, (0, 1), value=1.0)

    def encode_items(self, items: Tensor, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """Embeddings [n, d], and with an item bias one more column that holds it."""
        seen, items = to_device((self._seen(items, self.items_present, hidden), items), self.device)
        embedded = self.item_embedding.lookup(items)
        if self.item_bias is not None:
            embedded = torch.cat([embedded, F.embedding(items, self.item_bias)], dim=1)
        return embedded * seen

    def tower(self, items: bool) -> Tower:
        """See `Recommender`."""
        if items:
            return IdTower(self.item_embedding, self.item_bias)
        return IdTower(self.user_embedding, None if self.item_bias is None else 1.0)

    def sampling(self) -> tuple[ModalitySampling, ModalitySampling]:
        """See `Recommender`."""
        return ModalitySampling(self.users_present), ModalitySampling(self.items_present)

    def modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """See `Recommender`."""
        return (ID,), (ID,)

    def seen(self, items: bool, hidden: Hidden = NOTHING_HIDDEN) -> Tensor:
        """See `Recommender`."""
        present = self.items_present if items else self.users_present
        return self._seen(torch.arange(len(present), device=present.device), present, hidden)

    @staticmethod
    def _seen(entities: Tensor, present: Tensor, hidden: Hidden) -> Tensor:
        """Whose id is there: bool [n, 1]."""
        return present[entities] & hidden.visible((ID,), entities)


def _of_candidates(squares: Tensor, num_examples: int, positive: float, negatives: float) -> Tensor:
    """Weighted squares of an example's positive, and of its negatives on average: [B].

    Of candidates [B, 1+N]; items of a pool, [P], are all examples' negatives.
    """
    if squares.dim() == 1:
        return (negatives * squares.mean()).expand(num_examples)
    weights = squares.new_full(squares.shape[1:], negatives / (squares.shape[1] - 1))
    weights[0] = positive
    return squares @ weights


def id_embedding(count: int, width: int, deviation: float) -> Table:
    """An embedding [count, width], normally distributed around 0, from torch's global generator."""
    return Table(count, width, lambda weight: weight.normal_(std=deviation))
