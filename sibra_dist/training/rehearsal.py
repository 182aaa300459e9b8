"""A training step and an evaluation without data and without computing: what memory they need.

The code of the models and of the batches runs as it does in training, on a dataset without content (see `skeleton`). What is
read of the data is read in earnest, for a step's number of rows depends on it; what is computed of parameters is computed on
PyTorch's device `meta`, where tensors have shapes and no content. Every tensor is counted from its making to its end.
Where tables are divided this is the first rank, which has the most rows; nothing is sent.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sibra_dist.config import to_plain, validate
from sibra_dist.data.batches import Batches
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.manifest import Manifest
from sibra_dist.data.transfer import map_tensors
from sibra_dist.data.user_batches import UserBatches
from sibra_dist.evaluation.embedding import ENCODE_TILE
from sibra_dist.models import build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.exchange import rehearsed
from sibra_dist.models.sharing import summed_together
from sibra_dist.models.tables import tables_of
from sibra_dist.training.batching import batch_losses, make_batches
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.optimization import Optimization
from sibra_dist.training.placement import table_layout
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.reading import read_step
from sibra_dist.training.skeleton import Drawn, skeleton

META = torch.device("meta")
UPDATED = 4
"""Copies of a sparse gradient's values while rows follow it: see `LazyAdamW`, whose sparse part cannot be rehearsed"""


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, until they are freed."""

    def __init__(self) -> None:
        """Begin with none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.sparse: list[tuple[int, Tensor, Tensor]] = []
        """Rows, indices and values of each sparse tensor that was made: without content, PyTorch lets go of them"""
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not isinstance(tensor, Drawn) and not tensor.is_sparse:
                self._note(tensor.untyped_storage())
        if func is torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors.default:
            *_, size, indices, values = args
            self.sparse.append((size[0], indices, values))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes()
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Rehearsal:
    """What was found, in bytes unless it says otherwise."""

    whole: int
    """Parameters and buffers of the whole model"""
    parameters: int
    """That this rank holds"""
    buffers: int
    gradients: list[int]
    """Each, in the model's order"""
    summed: list[int]
    """Those that ranks add up in buckets"""
    gathered: int
    """Of all ranks, the sparse gradients of one table: they are gathered before they are added up"""
    optimizer: int
    """Its moments"""
    resident: int
    """Held all the time besides parameters: who has which modality, what negatives are drawn from"""
    reading: int
    """At the most while a step is read"""
    read: int
    """Of that, what the step then keeps"""
    step: int
    """At the most while a step is computed and followed, besides what was read and the optimizer's state, with gradients"""
    encoding: int
    """At the most while a tile of items is encoded"""
    scoring: int
    """At the most while a tile of users and items is scored"""
    embedding: int
    """Of one item's embedding"""


def rehearse(config: TrainConfig, manifest: Manifest, world: int = 1, *, data_on_device: bool = True) -> Rehearsal:
    """Go through the motions of one rank of `world`.

    Args:
        config: what is to be trained.
        manifest: of the dataset.
        world: ranks.
        data_on_device: whether histories lie on the device of the parameters.

    Raises:
        ConfigError: the model cannot be built for this dataset.
    """
    config = _without_values(config)
    ranks = Ranks(0, world)
    counted = Allocations()
    data = skeleton(manifest)
    with counted, rehearsed():
        with META:
            model = build_model(config.model, data, config.seed, table_layout(config.training, ranks))
        sizes: dict[str, Any] = {
            "parameters": sum(parameter.nbytes for parameter in model.parameters()),
            "buffers": sum(buffer.nbytes for buffer in model.buffers()),
        }
        held = sum(sizes.values())
        resident, trained = counted.live - held, _UNTRAINED
        if model.trainable and config.training.epochs:
            batches = make_batches(config, data, model, ranks)
            resident = counted.live - held
            trained = _rehearse_step(config, batches, model, world, data_on_device, counted)
        with META:
            # Evaluation computes the same where tables are divided; what travels for a tile is little.
            model = build_model(config.model, data, config.seed)
        sizes["whole"] = sum(value.nbytes for value in model.state_dict().values())
        encoding, scoring, embedding = _rehearse_evaluation(config, data, model, counted)
    return Rehearsal(**sizes, **trained, resident=resident, encoding=encoding, scoring=scoring, embedding=embedding)


_UNTRAINED: dict[str, Any] = {
    **dict.fromkeys(("gathered", "optimizer", "reading", "read", "step"), 0),
    "gradients": [],
    "summed": [],
}


def _rehearse_step(
    config: TrainConfig,
    batches: Batches | UserBatches,
    model: Recommender,
    world: int,
    data_on_device: bool,
    counted: Allocations,
) -> dict[str, Any]:
    """What `Rehearsal` holds of a step, by name."""
    training = config.training
    on_meta, statistics = dict(model.named_parameters()), dict(model.named_buffers())
    before = counted.peak = counted.live
    if data_on_device:
        _replace_parameters(model, {name: torch.zeros(1).expand(value.shape) for name, value in on_meta.items()})
    step = read_step(batches, model, 0, 0, training.accumulate, together=training.sampler.pool is None)
    reading, read = counted.peak - before, counted.live - before
    model.train()
    with FakeTensorMode(), counted:
        step = map_tensors(step, _without_content)
        _replace_parameters(model, {name: torch.empty(value.shape) for name, value in on_meta.items()})
        _replace_buffers(model, {name: torch.empty(value.shape, dtype=value.dtype) for name, value in statistics.items()})
        optimization = Optimization(training, model, batches.steps_per_epoch, Ranks(0, world))
        state = sum(value.nbytes for kept in optimization.optimizer.state.values() for value in kept.values() if value.dim())
        before = counted.peak = counted.live
        with summed_together(step.together):
            for batch, inputs in step.parts[:2]:  # the others are as these
                with torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16"):
                    output = model.step(batch, inputs)
                losses = batch_losses(training.loss, batch, output.scores.float())
                for auxiliary in output.auxiliary_losses.values():
                    losses = losses + auxiliary
                (losses * batch.weights).sum().backward()
                del output, losses
        sparse = [(indices.nbytes + values.nbytes, rows / max(len(values), 1)) for rows, indices, values in counted.sparse]
        counted.sparse.clear()
        if not sparse:  # what follows a sparse gradient is counted by `UPDATED`
            optimization.optimizer.step()
        computing = counted.peak - before
    divided = {name for name, table in tables_of(model).items() if table.divided}
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    dense = {name: gradient.nbytes for name, gradient in gradients.items() if not gradient.is_sparse}
    # Where all ranks have all rows, a gradient is in the end of the rows that any of them has touched.
    touched = [round(size * (1 if divided else min(world, times))) for size, times in sparse]
    _replace_parameters(model, on_meta)
    _replace_buffers(model, statistics)
    return {
        "gradients": [*dense.values(), *touched],
        "summed": [size for name, size in dense.items() if name not in divided],
        "gathered": 0 if divided else world * max((size for size, _ in sparse), default=0),
        "optimizer": state,
        "reading": reading,
        "read": read,
        "step": max(computing, sum(dense.values()) + sum(touched) + UPDATED * max(touched, default=0)),
    }


def _rehearse_evaluation(config: TrainConfig, data: Dataset, model: Recommender, counted: Allocations) -> tuple[int, int, int]:
    model.eval()
    settings = config.evaluation
    with torch.inference_mode():
        before = counted.peak = counted.live
        items = model.encode_items(torch.arange(min(ENCODE_TILE, data.items.count)))
        encoding = counted.peak - before
        users = model.encode_users(torch.arange(min(settings.user_tile, data.users.count)))
        before = counted.peak = counted.live
        tile = min(settings.item_tile, data.items.count)
        model.score(users.to(META), torch.empty(tile, *items.shape[1:], dtype=items.dtype, device=META))
        scoring = counted.peak - before - tile * items[0].nbytes
        return encoding, scoring, items[0].nbytes


def _without_values(config: TrainConfig) -> TrainConfig:
    """The configuration with what reads the values of all interactions at once left out: they are counted by formula."""

    def plain(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: plain(inner) for key, inner in value.items() if key != "weighting"}

    values = plain(to_plain(config))
    values["training"]["labels"] = "binary"
    values["training"]["sampler"] = {**values["training"]["sampler"], "type": "uniform"}
    return validate(TrainConfig, values, "estimate")


def _without_content(tensor: Tensor) -> Tensor:
    """A tensor of the same shape; for the dataset's own arrays as well."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _replace_parameters(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
        model.get_submodule(path)._parameters[last] = parameter


def _replace_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        path, _, last = name.rpartition(".")
        model.get_submodule(path)._buffers[last] = value
