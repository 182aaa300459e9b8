"""The folder that a model is exported to: whose it is, and how its files are written and read back."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from sibra_dist.data.manifest import Shard, Side, read_verified_shard
from sibra_dist.data.publish import writing
from sibra_dist.data.results import ID_COLUMNS
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.exporting.manifest import EMBEDDINGS, IDS, INDEX, MANIFEST, Exported, ExportedSide, ExportRequest, File

REMEDY = "Make room, or name a folder that can be written, and give the command again"
EMBEDDING = "embedding"
_OF_SIDE = rf"part-\d+-[0-9a-f]{{8}}\.parquet|{re.escape(EMBEDDINGS)}|{re.escape(IDS)}"
OWN = re.compile(rf"{re.escape(MANIFEST)}|(users|items)/({_OF_SIDE})|towers/(users|items)\.pt2|{re.escape(INDEX)}")
LEFTOVER = re.compile(r"((users|items|towers|index)/)?\.[^/]+\.[0-9a-f]{32}\.partial")
"""What a process that was killed may leave."""


def begin(place: Place, request: ExportRequest, overwrite: bool) -> bool:
    """Whether all that is asked for is there already; if not, the folder is empty afterwards, ready to be filled.

    Raises:
        DatasetError: something else is there, or the folder cannot be read or written.
    """
    with writing(place, REMEDY):
        if place.is_local and place.path.exists() and not place.path.is_dir():
            raise DatasetError(f"{place} is a file; name a folder for the exported model")
        there = place.files()
        if any(not (OWN.fullmatch(name) or LEFTOVER.fullmatch(name)) for name in there):
            raise DatasetError(f"{place} holds something that is not an exported model, and stays as it is; name a new folder")
        found = _found(place, overwrite)
        if found is not None and found.request == request:
            if all((place.status(file.path) or (-1,))[0] == file.bytes for file in found.files()):
                return True
        elif found is not None and not overwrite:
            different = ", ".join(found.request.differences(request))
            raise DatasetError(
                f"{place} holds an export of another request (not the same {different}); "
                "add --overwrite to replace it, or name another folder"
            )
        # The manifest goes first: without it nothing there is taken for the whole of anything.
        place.delete([MANIFEST])
        place.delete(there)
        return False


def write_file(place: Place, path: str, pieces: Iterable[bytes | memoryview]) -> File:
    """Write a file piece by piece, and say what it is; `OSError` if it cannot be written."""
    digest, size = hashlib.sha256(), 0

    def noted() -> Iterator[memoryview]:
        nonlocal size
        for piece in pieces:
            digest.update(piece)
            size += len(piece)
            yield memoryview(piece)

    place.write(path, noted())
    return File(path=path, bytes=size, sha256=digest.hexdigest())


def complete_side(place: Place, side: Side, shards: Sequence[Shard]) -> ExportedSide:
    """Write what the shards of one side hold once more, as one array and as lines of ids, a shard at a time."""
    count, header = sum(shard.rows for shard in shards), io.BytesIO()
    shape = (count, width_of(place, shards[0]))
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def rows() -> Iterator[bytes | memoryview]:
        yield header.getvalue()
        for shard in shards:
            yield _embeddings(place, shard).data.cast("B")

    def lines() -> Iterator[bytes]:
        for shard in shards:
            ids = read_verified_shard(place, shard, [ID_COLUMNS[side]])[ID_COLUMNS[side]].to_pylist()
            yield "".join(f"{json.dumps(name, ensure_ascii=False)}\n" for name in ids).encode()

    return ExportedSide(
        count=count,
        shards=tuple(shards),
        embeddings=write_file(place, f"{side}/{EMBEDDINGS}", rows()),
        ids=write_file(place, f"{side}/{IDS}", lines()),
    )


def shard_table(side: Side, ids: pa.ChunkedArray, embedded: Tensor) -> pa.Table:
    """The rows of a shard: ids string [n] and embeddings float32 [n, d]."""
    values = pa.array(embedded.cpu().numpy().reshape(-1), pa.float32())
    lists = pa.FixedSizeListArray.from_arrays(values, embedded.shape[1])
    return pa.table({ID_COLUMNS[side]: ids, EMBEDDING: lists})


def width_of(place: Place, shard: Shard) -> int:
    """Columns of the embeddings, as a shard tells."""
    with place.open(shard.path) as file:
        width: int = pq.read_schema(file).field(EMBEDDING).type.list_size
        return width


def read_embeddings(place: Place, shard: Shard) -> Tensor:
    """The embeddings of a shard: float32 [rows, d]."""
    return torch.from_numpy(_embeddings(place, shard).copy())


def _embeddings(place: Place, shard: Shard) -> npt.NDArray[np.float32]:
    column = read_verified_shard(place, shard, [EMBEDDING])[EMBEDDING].combine_chunks()
    values: npt.NDArray[np.float32] = column.flatten().to_numpy()
    return values.reshape(shard.rows, column.type.list_size)


def _found(place: Place, overwrite: bool) -> Exported | None:
    try:
        return Exported.read(place)
    except DatasetError:
        if overwrite:
            return None
        raise
