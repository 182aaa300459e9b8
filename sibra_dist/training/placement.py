"""On which device a rank trains, where the data lie that it reads, and what becomes of memory that it frees."""

import ctypes
import os
from typing import Literal

import torch
from torch import Tensor

from sibra_dist.data.dataset import Dataset
from sibra_dist.data.transfer import map_tensors
from sibra_dist.errors import ConfigError
from sibra_dist.models.tables import TableLayout
from sibra_dist.training.config import TrainingConfig
from sibra_dist.training.ranks import Ranks

# Names of glibc's settings, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

RESIDENT_SHARE = 0.5
"""Of a device's free memory, what data may take: the rest is for parameters, their optimizer and activations."""


def pick_device(wanted: str) -> torch.device:
    """The device of this rank: `cpu`, or `cuda` by the launcher's local rank, or for `auto` what there is."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device is cuda, but this machine has no GPU that torch can use: set it to auto or cpu")
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % max(torch.cuda.device_count(), 1))


def spare_device(device: torch.device) -> torch.device:
    """Where a model is evaluated beside ranks of this machine that train on such a device: a GPU that none has, or the CPU."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.type == "cuda" and torch.cuda.device_count() > ranks:
        return torch.device("cuda", ranks)
    return torch.device("cpu")


def place(dataset: Dataset, device: torch.device, wanted: Literal["auto", "same", "cpu"] = "auto") -> Dataset:
    """The dataset on the device that trains, or where it is, mapped from the node's cache, if it is too large for that."""
    if device.type == "cpu" or wanted == "cpu":
        return dataset
    if wanted == "auto":
        free, _ = torch.cuda.mem_get_info(device)
        if size_of(dataset) > free * RESIDENT_SHARE:
            return dataset
    return dataset.to(device)


def table_layout(config: TrainingConfig, ranks: Ranks) -> TableLayout:
    """How a rank holds the tables of a model: divided over the ranks, if the configuration says so."""
    held_by = (ranks.rank, ranks.world) if config.interaction_table == "row_sharded" else (0, 1)
    return TableLayout(*held_by, sparse=config.table_updates == "lazy")


def keep_freed_memory(device: torch.device) -> None:
    """Let a process that computes on a CPU keep memory that it frees, for the next step, or tile of scores, needs as much.

    glibc is asked not to give large blocks back to the system one by one; elsewhere nothing is done. Otherwise much time goes
    into having the same pages cleared anew (steps take 1.4 to 1.7 times as long where measured, and tiles 1.5 times).
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and change is not None:
        change(_M_TRIM_THRESHOLD, -1)
        change(_M_MMAP_MAX, 0)


def give_freed_memory_back(device: torch.device) -> None:
    """Let such a process give the system what it has kept so far: the next step may need it in other pieces."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if device.type == "cpu" and trim is not None:
        trim(ctypes.c_size_t(0))


def size_of(dataset: Dataset) -> int:
    """Bytes of what training and evaluation read of a dataset."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    map_tensors((dataset.users, dataset.items, dataset.held_out), count)
    return total
