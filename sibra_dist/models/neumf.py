"""NeuMF: a generalised matrix factorization and a multilayer perceptron, whose last layers are scored together.

He, Liao, Zhang, Nie, Hu, Chua, "Neural Collaborative Filtering", WWW 2017. A tower embeds a user as p = [p_g, p_m] and
another an item as q = [q_g, q_m]; then

    s(u, i) = w . [p_g * q_g, MLP([p_m, q_m])] + b

with a ReLU after every layer of the MLP. In the paper embeddings are those of ids: towers with `modalities: [id]` and
without a branch. Towers may as well read interactions, each through a branch of its own or both through one
(`share_branch`): the recipes `neumf` and `neumf-single-branch`.
"""

from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sibra_dist.data.dataset import Dataset
from sibra_dist.data.user_batches import AnyBatch
from sibra_dist.models.base import StepOutput
from sibra_dist.models.linear import dots_with_own
from sibra_dist.models.side import SideRead, Width
from sibra_dist.models.single_branch import Towers, TowersConfig

CHUNK_ELEMENTS = 2**21
"""Numbers that the widest layer of the MLP may hold at once when all pairs of a tile are scored: 8 MiB, within a cache."""


class NeuMFConfig(TowersConfig):
    """NeuMF."""

    type: Literal["neumf"] = "neumf"
    gmf_size: Width = 64
    """How many of the `embedding_size` elements are factorized, p_g and q_g; the others are the MLP's, p_m and q_m."""
    mlp_hidden_sizes: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    """Widths of the MLP's layers; the last one's output is scored."""

    @model_validator(mode="after")
    def _both_parts_have_elements(self) -> Self:
        if self.gmf_size >= self.embedding_size:
            raise ValueError(
                f"gmf_size ({self.gmf_size}) must be less than embedding_size ({self.embedding_size}): the MLP reads the rest"
            )
        return self


class NeuMF(Towers):
    """See the module's docstring."""

    config: NeuMFConfig

    def __init__(self, config: NeuMFConfig, dataset: Dataset) -> None:
        """Build the model for a dataset, with torch's global generator."""
        super().__init__(config, dataset)
        self._sizes = [config.gmf_size, config.embedding_size - config.gmf_size]
        first, *_, last = config.mlp_hidden_sizes
        self.mlp_input = nn.Linear(2 * self._sizes[1], first)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(config.mlp_hidden_sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers)
        self.output = nn.Linear(self._sizes[0] + last, 1)

    def step(self, batch: AnyBatch, read: tuple[SideRead, SideRead]) -> StepOutput:
        """Scores, and the contrastive losses that the towers are asked for."""
        users, items = self.embed(batch, read)
        return StepOutput(self.batch_scores(users.embedding, items.embedding), self.contrasts(users, items, batch))

    @property
    def score_name(self) -> None:
        """None: a network scores."""
        return None

    def candidate_scores(self, users: Tensor, items: Tensor) -> Tensor:
        """See `Recommender`."""
        user_gmf, user_mlp = users.split(self._sizes, dim=-1)
        item_gmf, item_mlp = items.split(self._sizes, dim=-1)
        weight, _ = self._output_weights()
        factorized = dots_with_own(user_gmf * weight, item_gmf)
        return factorized + self._perceptron(self._user_part(user_mlp)[:, None], self._item_part(item_mlp))

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """See `Recommender`; holds no more than `CHUNK_ELEMENTS` numbers of a layer of the MLP at once."""
        user_gmf, user_mlp = users.split(self._sizes, dim=-1)
        item_gmf, item_mlp = items.split(self._sizes, dim=-1)
        weight, _ = self._output_weights()
        pairs = max(CHUNK_ELEMENTS // max(self.config.mlp_hidden_sizes), 1)
        columns = min(max(len(items), 1), pairs)
        chunks = self._item_part(item_mlp)[None].split(columns, dim=1)
        rows = [
            torch.cat([self._chunk(part, chunk) for chunk in chunks], dim=1)
            for part in self._user_part(user_mlp)[:, None].split(max(pairs // columns, 1))
        ]
        scores: Tensor = (user_gmf * weight) @ item_gmf.T + torch.cat(rows)
        return scores

    def _chunk(self, user_part: Tensor, item_part: Tensor) -> Tensor:
        """`_perceptron`, computed again in the backward pass instead of kept for it."""
        if not torch.is_grad_enabled():
            return self._perceptron(user_part, item_part)
        scores: Tensor = checkpoint(self._perceptron, user_part, item_part, use_reentrant=False, preserve_rng_state=False)
        return scores

    # The MLP's first layer reads [p_m, q_m]: W [p_m, q_m] + c = (W_u p_m + c) + W_i q_m, so its products are those of users
    # and of items, not of pairs.
    def _user_part(self, users: Tensor) -> Tensor:
        return F.linear(users, self.mlp_input.weight[:, : self._sizes[1]], self.mlp_input.bias)

    def _item_part(self, items: Tensor) -> Tensor:
        return F.linear(items, self.mlp_input.weight[:, self._sizes[1] :])

    def _perceptron(self, user_part: Tensor, item_part: Tensor) -> Tensor:
        """The MLP's share of the scores, and b: the parts, which broadcast, without their last dimension."""
        _, weight = self._output_weights()
        hidden: Tensor = self.mlp(F.relu(user_part + item_part))
        return hidden @ weight + self.output.bias

    def _output_weights(self) -> tuple[Tensor, Tensor]:
        """w, by what it multiplies."""
        last = self.config.mlp_hidden_sizes[-1]
        gmf, mlp = self.output.weight.squeeze(0).split([self._sizes[0], last])
        return gmf, mlp
