"""Trains `DenseSibrar`: a data set of pairs, a data loader, AdamW.

    python -m benchmarks.training.dense_training --seconds S --result FILE CONFIG [SETTING ...]

It reads the configuration that ours trains with, as far as it goes for both.
"""

from typing import cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.contender import contender, tell
from benchmarks.training.dense import UNUSED, DenseBatch, DenseSibrar, Inputs, Matrix
from benchmarks.training.pace import Pace
from sibra_dist.config import load_config
from sibra_dist.data.dataset import Csr, open_dataset
from sibra_dist.data.dataset import Dataset as Prepared
from sibra_dist.models.single_branch import SingleBranchConfig
from sibra_dist.training.config import TrainConfig


class Pairs(Dataset[DenseBatch]):
    """Positives with negatives and drawn modalities, a batch at a time."""

    def __init__(self, prepared: Prepared, modalities: tuple[str, ...], draws: int, negatives: int) -> None:
        """Hold the training pairs of a dataset, whose items have these modalities."""
        self.users = torch.repeat_interleave(torch.arange(prepared.users.count), prepared.users.histories.lengths())
        self.items = prepared.users.histories.indices.long()
        self.known = self.users * prepared.items.count + self.items  # ascending
        self.candidates = prepared.training_items
        self.num_items = prepared.items.count
        self.draws, self.negatives = draws, negatives
        present = [prepared.items.histories.lengths() > 0, *(prepared.items.features[name].present for name in modalities[1:])]
        self.present = torch.stack(present, dim=1)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, numbers: list[int]) -> DenseBatch:
        chosen = torch.tensor(numbers)
        users, positives = self.users[chosen], self.items[chosen]
        items = torch.cat([positives[:, None], self._negatives(users)], dim=1)
        return DenseBatch(users, items, self._modalities(items))

    def _negatives(self, users: Tensor) -> Tensor:
        """Uniform among what a user has no pair with, [B, N]: what is known is drawn again."""
        drawn = self.candidates[torch.randint(len(self.candidates), (len(users), self.negatives))]
        while bool((known := self._is_known(users[:, None] * self.num_items + drawn)).any()):
            drawn[known] = self.candidates[torch.randint(len(self.candidates), (int(known.sum()),))]
        return drawn

    def _is_known(self, pairs: Tensor) -> Tensor:
        place = torch.searchsorted(self.known, pairs).clamp(max=len(self.known) - 1)
        return self.known[place] == pairs

    def _modalities(self, items: Tensor) -> Tensor:
        """Distinct ones of those that an item has, [*, D]."""
        present = self.present[items]
        keys, drawn = torch.where(present, torch.rand(present.shape), 2.0).topk(self.draws, dim=-1, largest=False)
        return torch.where(keys < 2, drawn, UNUSED)


def inputs_of(prepared: Prepared, modalities: tuple[str, ...]) -> Inputs:
    """What the model reads of a dataset; `modalities` of items are interactions, tags and a vector."""
    _, tags, vector = modalities
    codes, vectors = prepared.items.features[tags], prepared.items.features[vector]
    of_tags = _matrix(cast(Csr, codes.values), codes.spec.size)
    return Inputs(
        users=_matrix(prepared.users.histories, prepared.items.count),
        items=_matrix(prepared.items.histories, prepared.users.count),
        tags=of_tags.dense(torch.arange(prepared.items.count)),
        vectors=cast(Tensor, vectors.values).float(),
    )


def _matrix(rows: Csr, width: int) -> Matrix:
    return Matrix(rows.indptr, rows.indices.long(), width)


def main() -> None:
    """Train until enough is timed."""
    parser = contender(__doc__)
    parser.add_argument("config")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    config = load_config(TrainConfig, arguments.config, arguments.settings)
    assert isinstance(config.model, SingleBranchConfig)
    assert config.model.items.modalities is not None
    assert isinstance(config.model.items.draws, int)
    modalities, training = config.model.items.modalities, config.training
    prepared = open_dataset(config.dataset)
    pairs = Pairs(prepared, modalities, config.model.items.draws, training.negatives)
    model = DenseSibrar(inputs_of(prepared, modalities), config.model, len(pairs.candidates))
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=training.weight_decay)
    batches = DataLoader(
        pairs, batch_size=None, sampler=BatchSampler(RandomSampler(pairs), training.batch_size, drop_last=True)
    )
    pace = Pace(arguments.seconds)
    enough = False
    while not enough:
        pace.rest()
        for batch in batches:
            optimizer.zero_grad()
            loss = model(batch)
            loss.backward()
            optimizer.step()
            enough = pace.step(training.batch_size)
            if enough:
                break
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tell(arguments.result, pace.result() | {"threads": torch.get_num_threads(), "parameters": parameters})


if __name__ == "__main__":
    main()
