"""The node-local cache of decoded arrays: built once under a lock, published whole, checked on every opening.

    <cache>/<dataset digest>-v<layout>/
      arrays.json       written last: name -> dtype, shape, bytes, sha256
      *.bin             one raw array each
    <cache>/<the same>.lock
    <cache>/<the same>.checked.json   which files were verified, by size and modification time

A checksum costs a full read, so a file is read again only when its size or modification time has changed since it was
last found whole. That holds for the dataset's shards and for the cache's own arrays alike.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from sibra_dist.data.manifest import Manifest, sha256_of, verify_shard, write_atomically
from sibra_dist.errors import DatasetError

CONTENTS = "arrays.json"
LAYOUT = 1
"""Raised when the arrays of a dataset change, so that no version reads those of another."""
Arrays = dict[str, Tensor]


def default_cache() -> Path:
    """`$SIBRA_CACHE`, or `sibra-dist` in the user's cache folder. Safe to delete while nothing runs."""
    if chosen := os.environ.get("SIBRA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sibra-dist"


def cache_folder(manifest: Manifest, root: Path) -> Path:
    """Where a dataset's arrays lie in the cache `root`."""
    return root / f"{manifest.digest[:32]}-v{LAYOUT}"


class ArrayWriter:
    """Appends to named arrays on disk, so that decoding needs the memory of one shard."""

    def __init__(self, folder: Path) -> None:
        """Start writing into an empty `folder`."""
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {}
        self._about: dict[str, tuple[str, list[int]]] = {}
        self._totals: dict[str, int] = {}

    def append(self, name: str, values: npt.NDArray[Any]) -> None:
        """Add rows to the end of array `name`."""
        if name not in self._files:
            self._files[name] = (self._folder / _file_name(name)).open("wb")
            self._about[name] = (values.dtype.str, [0, *values.shape[1:]])
        self._about[name][1][0] += len(values)
        self._files[name].write(np.ascontiguousarray(values).data)

    def append_lengths(self, name: str, lengths: npt.NDArray[np.int64]) -> None:
        """Continue the CSR row pointer `name` by rows of these lengths; it starts with 0 by itself."""
        if name not in self._totals:
            self._totals[name] = 0
            self.append(name, np.zeros(1, np.int64))
        ends = self._totals[name] + np.cumsum(lengths, dtype=np.int64)
        self._totals[name] = int(ends[-1]) if len(ends) else self._totals[name]
        self.append(name, ends)

    def finish(self) -> None:
        """Flush every array to the disk and write the table of contents, last."""
        contents = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            path = self._folder / _file_name(name)
            dtype, shape = self._about[name]
            contents[name] = {"dtype": dtype, "shape": shape, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_atomically(self._folder / CONTENTS, json.dumps(contents).encode())


def cached_arrays(
    dataset: Path, manifest: Manifest, cache: Path | None, decode: Callable[[Path, Manifest, ArrayWriter], None]
) -> Arrays:
    """The arrays of a dataset, memory-mapped, private to this process when written to.

    Raises:
        DatasetError: a shard is damaged, or the cache cannot be written.
    """
    root = cache or default_cache()
    folder = cache_folder(manifest, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            checked = _Checked(folder.with_suffix(".checked.json"))
            for shard in manifest.all_shards():
                if not checked.unchanged(dataset / shard.path, shard.bytes):
                    verify_shard(dataset, shard)
                    checked.remember(dataset / shard.path)
            if not _is_whole(folder, checked):
                _build(dataset, manifest, folder, decode)
                for name in _contents(folder):
                    checked.remember(folder / _file_name(name))
            checked.save()
            return {name: _map(folder / _file_name(name), about) for name, about in _contents(folder).items()}
    except OSError as error:
        raise DatasetError(
            f"the cache {root} cannot be used: {error}. Free some space, or set SIBRA_CACHE to a folder that can be written"
        ) from error


def _build(dataset: Path, manifest: Manifest, folder: Path, decode: Callable[[Path, Manifest, ArrayWriter], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        writer = ArrayWriter(aside)
        decode(dataset, manifest, writer)
        writer.finish()
        # A process that mapped a damaged folder before keeps its pages: the files are unlinked, not overwritten.
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_whole(folder: Path, checked: "_Checked") -> bool:
    try:
        contents = _contents(folder)
    except (OSError, ValueError):
        return False
    for name, about in contents.items():
        path = folder / _file_name(name)
        if not checked.unchanged(path, about["bytes"]):
            if not path.is_file() or path.stat().st_size != about["bytes"] or sha256_of(path) != about["sha256"]:
                return False
            checked.remember(path)
    return True


def _contents(folder: Path) -> dict[str, dict[str, Any]]:
    contents: dict[str, dict[str, Any]] = json.loads((folder / CONTENTS).read_text())
    return contents


def _map(path: Path, about: dict[str, Any]) -> Tensor:
    shape = tuple(about["shape"])
    dtype = np.dtype(about["dtype"])
    if math.prod(shape) == 0:  # an empty file cannot be mapped
        return torch.from_numpy(np.empty(shape, dtype))
    # "c", copy on write: torch wants writable memory, and no write can reach the file.
    return torch.from_numpy(np.memmap(path, dtype, mode="c", shape=shape))


def _file_name(name: str) -> str:
    return name.replace("/", ".") + ".bin"


class _Checked:
    """Which files were found whole, by size and modification time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._seen: dict[str, list[int]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._seen = {}
        self._changed = False

    def unchanged(self, path: Path, size: int) -> bool:
        try:
            status = path.stat()
        except OSError:
            return False
        return status.st_size == size and self._seen.get(str(path.resolve())) == [status.st_size, status.st_mtime_ns]

    def remember(self, path: Path) -> None:
        status = path.stat()
        self._seen[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
        self._changed = True

    def save(self) -> None:
        if self._changed:
            write_atomically(self._path, json.dumps(self._seen).encode())
