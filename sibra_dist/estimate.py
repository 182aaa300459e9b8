"""What memory each rank of a training will need, before it is launched: `sibra-dist estimate`.

Parameters, their gradients and the optimizer's state follow from the model's shapes; histories and features from the
dataset's manifest, and they are mapped from files where they do not lie on a GPU. What batches, a step and an evaluation hold
besides comes from a rehearsal (`sibra_dist.training.rehearsal`). Nothing of the dataset is opened but its manifest.
"""

import re
from collections.abc import Sequence
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from sibra_dist.config import Config, to_plain
from sibra_dist.data.manifest import Manifest
from sibra_dist.errors import ConfigError
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.placement import RESIDENT_SHARE
from sibra_dist.training.ranks import BUCKET_ELEMENTS
from sibra_dist.training.rehearsal import Rehearsal, rehearse
from sibra_dist.training.skeleton import array_bytes

Held = Literal["replicated", "row_sharded"]
HELD: tuple[Held, ...] = ("replicated", "row_sharded")
NUMBER = 4
"""Bytes of a parameter, its gradient, and either of AdamW's two moments"""
CUDA_BYTES = 600 << 20
"""Of the CUDA context, and of the workspaces of cuBLAS, on a GPU"""
PROCESS_BYTES = 390 << 20
"""Of Python, PyTorch and this package in private memory, as benchmarks/scale measures it"""
KEPT_SHARE = 0.5
"""Of a step, what lies in gaps of the heap, as training on a CPU gives nothing back; as benchmarks/scale measures it"""
GATHERED = 3
"""Copies of all ranks' sparse gradients of a table while they are added up: as they come, in one piece, sorted by row"""
MOST_GPUS = 1024
_SIZE = re.compile(r"([\d.]+)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


class RankMemory(Config):
    """What one rank needs, in bytes."""

    workers: int
    held: Held
    """how tables with a row for each user or item are held"""
    parameters: int
    gradients: int
    optimizer: int
    batches: int
    """who has which modality, what negatives are drawn from, and what interactions count where they are weighted"""
    step: int
    """of a step: what is read, activations, their gradients"""
    allocator: int
    """gaps between what is in use"""
    evaluation: int
    """embeddings of all candidates, and a tile of scores; 0 where another process evaluates"""
    checkpoint: int
    """the state copied to main memory, while it is written"""
    communication: int
    """the largest bucket of gradients that is summed over the ranks"""
    data: int
    """histories in both directions, features, and what is held out"""
    data_on_gpu: bool | None
    """null: there is no GPU, and they are mapped from files"""
    validator: int
    """private memory of the process that evaluates beside the ranks, with the whole model; 0 where they do it themselves"""

    @property
    def training(self) -> int:
        """On the device that trains, at the most, without data: a step, with its gradients, or an evaluation."""
        always = self.parameters + self.optimizer + self.batches + self.allocator
        return always + max(self.gradients + self.communication + self.step, self.evaluation)

    @property
    def gpu(self) -> int | None:
        """On a GPU, at the most; None without one."""
        if self.data_on_gpu is None:
            return None
        return CUDA_BYTES + self.training + (self.data if self.data_on_gpu else 0)

    @property
    def private(self) -> int:
        """In main memory, at the most, and nobody else's."""
        return PROCESS_BYTES + self.checkpoint + (self.training if self.data_on_gpu is None else 0)

    @property
    def mapped(self) -> int:
        """In files that are mapped: in main memory as far as there is room, once for all ranks of a node."""
        return 0 if self.data_on_gpu else self.data


class Estimate(Config):
    """What a training needs."""

    dataset: str
    model: str
    rank: RankMemory
    gpu_bytes: int | None
    """of a GPU's memory"""
    gpus: dict[Held, int | None]
    """how many such GPUs it fits on; null: on none of up to `MOST_GPUS`"""


def estimate(config: TrainConfig, workers: int = 1, gpu_bytes: int | None = None) -> Estimate:
    """What each rank of a training needs.

    Args:
        config: what is to be trained.
        workers: ranks.
        gpu_bytes: memory of a rank's GPU; None: training is on CPUs.

    Raises:
        ConfigError: the model cannot be built for this dataset.
        DatasetError: there is no dataset.
    """
    manifest = Manifest.read(config.dataset)
    gpus: dict[Held, int | None] = {}
    if gpu_bytes is not None:
        gpus = {held: _fewest(holding(config, held), manifest, gpu_bytes) for held in HELD}
    return Estimate(
        dataset=manifest.name,
        model=config.model.type,
        rank=rank_memory(config, manifest, workers, gpu_bytes),
        gpu_bytes=gpu_bytes,
        gpus=gpus,
    )


def rank_memory(config: TrainConfig, manifest: Manifest, workers: int, gpu_bytes: int | None) -> RankMemory:
    """What one rank of `workers` needs; see `estimate`."""
    training = config.training
    data = sum(array_bytes(manifest).values())
    wanted = training.data_device
    on_gpu = None if gpu_bytes is None else wanted == "same" or (wanted == "auto" and data <= gpu_bytes * RESIDENT_SHARE)
    rehearsed = rehearse(config, manifest, workers, data_on_device=on_gpu is not False)
    ahead = gpu_bytes is not None if training.read_ahead is None else training.read_ahead
    step, evaluation = _step(rehearsed, ahead), _evaluation(rehearsed, manifest)
    apart = training.evaluate_on == "apart" and rehearsed.step > 0
    return RankMemory(
        workers=workers,
        held=training.interaction_table,
        parameters=rehearsed.parameters + rehearsed.buffers,
        gradients=sum(rehearsed.gradients),
        optimizer=rehearsed.optimizer,
        batches=rehearsed.resident + _values(config, manifest),
        step=step,
        allocator=round(step * KEPT_SHARE) if gpu_bytes is None else 0,
        evaluation=0 if apart else evaluation,
        checkpoint=rehearsed.parameters + rehearsed.optimizer,
        communication=0 if workers == 1 else _largest_bucket(rehearsed.summed) + GATHERED * rehearsed.gathered,
        data=data,
        data_on_gpu=on_gpu,
        # A candidate is read beside the model, and is gone when it is evaluated.
        validator=PROCESS_BYTES + rehearsed.whole + max(rehearsed.whole, evaluation) if apart else 0,
    )


def read_bytes(text: str) -> int:
    """Bytes from a text such as `24GiB` or `80GB`.

    Raises:
        ConfigError: it is not such a text.
    """
    found = _SIZE.fullmatch(text.strip())
    if not found or not found[1].replace(".", "", 1).isdecimal() or float(found[1]) == 0:
        raise ConfigError(f"--gpu-memory {text}: write a size such as 24GiB or 80GB")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def estimate_table(found: Estimate) -> Group:
    """An estimate as a person reads it."""
    rank = found.rank
    table = Table(Column("what"), Column("bytes", justify="right"), Column("where"), box=None, pad_edge=False)
    trains_on = "memory" if rank.gpu is None else "GPU"
    rows = {
        "parameters": (rank.parameters, trains_on),
        "gradients": (rank.gradients, trains_on),
        "optimizer": (rank.optimizer, trains_on),
        "who has what, negatives": (rank.batches, trains_on),
        "communication": (rank.communication, trains_on),
        "a step: activations, what is read": (rank.step, trains_on),
        "or an evaluation: embeddings, scores": (rank.evaluation, trains_on),
        "gaps in the heap": (rank.allocator, trains_on),
        "checkpoint being written": (rank.checkpoint, "memory"),
        "histories, features": (rank.data, "GPU" if rank.data_on_gpu else "mapped from files, once a node"),
    }
    for name, (size, where) in rows.items():
        table.add_row(name, shown_bytes(size), where)
    totals = {"private memory": rank.private, "mapped files": rank.mapped, "GPU memory": rank.gpu}
    told = ", ".join(f"{shown_bytes(size)} of {name}" for name, size in totals.items() if size)
    title = f"{found.model} on {found.dataset}, {rank.workers} rank{'s' * (rank.workers > 1)}, tables {rank.held}"
    parts: list[RenderableType] = [Text(title), table, Text(f"each rank needs at most {told}")]
    if rank.validator:
        parts.append(
            Text(
                f"the process that evaluates needs {shown_bytes(rank.validator)} besides; on a spare GPU, of that, and the data"
            )
        )
    if found.gpu_bytes is not None:
        for how, count in found.gpus.items():
            fits = f"fits on {count}" if count else f"does not fit on {MOST_GPUS}"
            parts.append(Text(f"{how}: {fits} GPU{'s' * (count != 1)} of {shown_bytes(found.gpu_bytes)}"))
    return Group(*parts)


def estimate_values(found: Estimate) -> dict[str, object]:
    """An estimate for machines: what `RankMemory` holds, and its totals `gpu`, `private` and `mapped`."""
    rank = found.rank
    return to_plain(found) | {"total": {"private": rank.private, "mapped": rank.mapped, "gpu": rank.gpu}}


def shown_bytes(count: int) -> str:
    """Such as 1.25 GiB."""
    power = min(max(count.bit_length() - 1, 0) // 10, 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def holding(config: TrainConfig, held: Held) -> TrainConfig:
    """The same training with its tables held so."""
    training = config.training.model_copy(update={"interaction_table": held})
    return config.model_copy(update={"training": training})


def _fewest(config: TrainConfig, manifest: Manifest, gpu_bytes: int) -> int | None:
    """The smallest power of two of GPUs that it fits on."""
    workers = 1
    while workers <= MOST_GPUS:
        needed = rank_memory(config, manifest, workers, gpu_bytes)
        assert needed.gpu is not None
        if needed.gpu <= gpu_bytes:
            return workers
        # More GPUs make smaller parts of a batch, and of divided tables; the rest stays.
        if needed.held == "replicated" and needed.gpu - needed.step > gpu_bytes:
            return None
        workers *= 2
    return None


def _step(rehearsed: Rehearsal, ahead: bool) -> int:
    computing = max(rehearsed.step - sum(rehearsed.gradients), 0)  # which are counted by themselves
    if ahead:
        return rehearsed.read + computing + rehearsed.reading
    return max(rehearsed.read + computing, rehearsed.reading)


def _evaluation(rehearsed: Rehearsal, manifest: Manifest) -> int:
    counts = manifest.counts
    share = manifest.protocol.validation if manifest.protocol.cold_items else 1.0
    embeddings = round(counts.items * share) * rehearsed.embedding
    # Parts are put together once all are made; then there are places, candidates and how often each was recommended.
    return 24 * counts.items + embeddings + max(embeddings, rehearsed.encoding, rehearsed.scoring)


def _values(config: TrainConfig, manifest: Manifest) -> int:
    """What is computed of all interactions at once: weights in both directions, sums of masses, labels."""
    train = manifest.counts.train
    weighted = len(re.findall(r"'weighting': '(?!binary)", str(to_plain(config)["model"])))
    size = weighted * 2 * NUMBER * train
    size += 8 * (train + 3 * manifest.counts.items) * (config.training.sampler.type == "popularity")
    return size + NUMBER * train * (config.training.labels == "weights")


def _largest_bucket(sizes: Sequence[int]) -> int:
    """Of gradients of so many bytes, as `sibra_dist.training.ranks` fills buckets."""
    largest = filled = 0
    for size in sizes:
        filled = size if filled + size > NUMBER * BUCKET_ELEMENTS else filled + size
        largest = max(largest, filled)
    return largest
