"""The files of tensors that a checkpoint consists of, and which rows of a divided tensor each of them holds.

Their format is that of safetensors (https://huggingface.co/docs/safetensors, "Format"), which carries no code. They are
written here, because they go to any file system, piece by piece and with a checksum, without a second copy in memory.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from sibra_dist.data.manifest import sha256_of
from sibra_dist.data.storage import Place

PIECE_BYTES = 2**24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Rows(NamedTuple):
    """Rows `first` to `last`, exclusive, of a table that has `total` in all."""

    first: int
    last: int
    total: int


Tables = Mapping[str, Rows]
"""The tensors of a model that are divided over ranks, by name in its state dict, each with the rows that this rank holds."""


class Part(BaseModel):
    """A file of tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    bytes: int
    sha256: str
    rows: dict[str, Rows]
    """Of the tensors that are divided; all others are whole"""


def write_part(folder: Place, file: str, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows]) -> Part:
    """Write tensors of the CPU as a file, durably; its checksum is computed while it is written.

    Raises:
        OSError: it could not be written; then no such file is left.
    """
    digest, size = hashlib.sha256(), 0

    def noted() -> Iterator[memoryview]:
        nonlocal size
        for piece in _pieces(tensors):
            digest.update(piece)
            size += len(piece)
            yield piece

    try:
        folder.write(file, noted())
        status = folder.status(file)
        if status is None or status[0] != size:
            raise OSError(f"{folder / file} is not as long as what was written")
    except BaseException:
        with suppress(OSError):
            folder.delete([file])
        raise
    return Part(file=file, bytes=size, sha256=digest.hexdigest(), rows=dict(rows))


def read_parts(folder: Place, parts: Sequence[Part], rows_of: Callable[[str], Rows | None]) -> dict[str, Tensor]:
    """Read the tensors of all parts; of those that `rows_of` divides, the rows it wants.

    Only parts that hold something wanted are read, and these are verified as a whole.

    Args:
        folder: where they are.
        parts: the first holds every tensor that is whole.
        rows_of: given a tensor's name, the rows that are wanted of it, or None for all.

    Raises:
        OSError: a part is not there, or cannot be read.
        ValueError: one is not what was written, or rows are missing.
    """
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Rows] = {}
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for number, part in enumerate(parts):
        if number and not any(_overlap(rows_of(name) or held, held) for name, held in part.rows.items()):
            continue
        with _verified(folder, part) as path, safe_open(path, "pt") as file:
            for name in list(file.keys()):
                shape, held, want = file.get_slice(name).get_shape(), part.rows.get(name), rows_of(name)
                if not shape or (held is None and want is None):
                    tensors[name] = file.get_tensor(name)
                    continue
                held = held or Rows(0, shape[0], shape[0])
                wanted[name] = want = want or Rows(0, held.total, held.total)
                if want.total != held.total:
                    raise ValueError(f"{name} has {held.total} rows, not {want.total}")
                rows = _overlap(want, held) or range(held.first, held.first)  # no rows, but their shape and type
                piece = file.get_slice(name)[rows.start - held.first : rows.stop - held.first]
                found.setdefault(name, []).append((rows.start, piece))
    for name in list(found):
        pieces = sorted(found.pop(name), key=lambda piece: piece[0])  # of one tensor at a time there are two copies
        tensors[name] = torch.cat([piece for _, piece in pieces])
        if len(tensors[name]) != wanted[name].last - wanted[name].first:
            raise ValueError(f"rows of {name} are missing")
    return tensors


def _overlap(one: Rows, other: Rows) -> range:
    return range(max(one.first, other.first), min(one.last, other.last))


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The content of the file: the length of a header in JSON, the header, and the tensors one after the other."""
    # The widest first, so that every tensor lies at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(content), PIECE_BYTES):
            yield content[begin : begin + PIECE_BYTES]


@contextmanager
def _verified(folder: Place, part: Part) -> Iterator[Path]:
    """A part as a file of this machine, once its checksum is found right."""
    with ExitStack() as stack:
        if folder.is_local:
            path = folder.path / part.file
        else:
            path = Path(stack.enter_context(TemporaryDirectory(prefix="sibra-dist-"))) / "part"
            with folder.stream(part.file) as source, path.open("wb") as copy:
                shutil.copyfileobj(source, copy, PIECE_BYTES)
        if sha256_of(path) != part.sha256:
            raise ValueError(f"the checksum of {part.file} is wrong")
        yield path
