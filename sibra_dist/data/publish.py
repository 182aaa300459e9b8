"""Publication: a dataset comes into being whole, or not at all; on a disk and in an object store by the same steps.

Shards are named by their content, so new ones are written beside those of the dataset that is there, which stays as it is
and can be read. Then the manifest takes the place of the old one, in one step, and what nothing lists any more is deleted.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sibra_dist.data.manifest import MANIFEST, Manifest, Shard, Source
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError

logger = logging.getLogger("sibra_dist")

ROWS_PER_GROUP = 65_536
WORK = ".work-"
TABLE = r"(users|items|histories/(users|items)|held_out/(validation|test)|rejected|fitted/(users|items)/\w+)"
SHARD_NAME = re.compile(rf"{TABLE}/part-\d+-[0-9a-f]{{8}}\.parquet")
LEFTOVER = re.compile(rf"({TABLE}/)?\.[^/]+\.[0-9a-f]{{32}}\.partial|{re.escape(WORK)}[0-9a-f]{{12}}/.+")
"""What a preparation that was killed may leave besides shards that no manifest lists."""


def check_place(place: Place) -> None:
    """Check, before anything is computed, that a dataset may be written to a place.

    Raises:
        DatasetError: something that is no dataset is there.
    """
    if place.is_local and place.path.exists() and not place.path.is_dir():
        raise DatasetError(f"{place} is a file; name a folder for the dataset")
    foreign = [name for name in _files(place) if not (name == MANIFEST or SHARD_NAME.fullmatch(name) or name.startswith("."))]
    foreign = [name for name in foreign if not LEFTOVER.fullmatch(name)]
    if foreign:
        raise DatasetError(f"{place} holds something that is not a dataset, and stays as it is; name a new folder")


def existing_dataset(
    place: Place, config: Mapping[str, Any], sources: Sequence[Source], extends: str | None, overwrite: bool
) -> Manifest | None:
    """The manifest of the dataset that is asked for, if it is there already; None if it is to be made.

    `config` is what the manifest records of the configuration.

    Raises:
        DatasetError: there is another dataset in the place.
    """
    if overwrite or place.status(MANIFEST) is None:
        return None
    manifest = Manifest.read(place)
    if (manifest.config, manifest.sources, manifest.extends) != (dict(config), tuple(sources), extends):
        raise DatasetError(
            f"{place} holds a dataset made from another configuration or other files; "
            "add --overwrite to replace it, or name another folder"
        )
    for shard in manifest.all_shards():
        status = place.status(shard.path)
        if status is None or status[0] != shard.bytes:
            logger.warning("%s is damaged (%s); making it again", place, shard.path)
            return None
    return manifest


@contextmanager
def hold(place: Place) -> Iterator[None]:
    """Hold a place for one preparation. However the block ends, what no manifest lists is gone afterwards.

    Raises:
        DatasetError: the place cannot be written, or another preparation of this machine holds it.
    """
    with ExitStack() as held:
        if place.is_local:
            held.enter_context(_locked(place))
        try:
            yield
        finally:
            quietly(partial(_sweep, place))


def quietly(delete: Callable[[], None]) -> None:
    """Delete what is not needed any more; where that fails, the preparation has not failed."""
    try:
        delete()
    except (OSError, DatasetError) as error:
        logger.warning("what is not needed any more could not be deleted: %s", error)


@contextmanager
def writing(place: Place, remedy: str) -> Iterator[None]:
    """Turn whatever stops the writing of a dataset into one error, which ends in the remedy.

    Raises:
        DatasetError: a disk is full, a folder may not be written, an object store refuses.
    """
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{place} cannot be written: {error.strerror or error}. {remedy}") from error


def write_shard(rows: pa.Table, place: Place, table: str, number: int) -> tuple[Shard, list[int]]:
    """Write one shard, and say what it is and how many nulls each column has; it is on the disk, whole, when this returns."""
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", row_group_size=ROWS_PER_GROUP, store_schema=True)
    content = sink.getvalue()
    checksum = hashlib.sha256(content).hexdigest()
    # The name says the content: a task that runs twice writes the same file, and no other dataset's shard is in the way.
    path = f"{table}/part-{number:05d}-{checksum[:8]}.parquet"
    place.write(path, content)
    shard = Shard(path=path, rows=rows.num_rows, bytes=content.size, sha256=checksum)
    return shard, [column.null_count for column in rows.columns]


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    is_new = not place.path.exists()
    try:
        place.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(place.path, os.O_RDONLY)
    except OSError as error:
        raise DatasetError(f"{place} cannot be written: {error.strerror}. Name a folder that can be") from error
    try:
        # The lock is one on the folder itself, and goes with the process, however that ends.
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DatasetError(f"another preparation is writing to {place}; wait for it, or name another folder") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        if is_new and not any(place.path.iterdir()):
            place.path.rmdir()
        os.close(folder)


def _sweep(place: Place) -> None:
    """Delete shards that no manifest lists, and other leftovers, of this preparation and of any that was killed before."""
    files = _files(place)
    leftovers = [name for name in files if LEFTOVER.fullmatch(name)]
    work = {name.partition("/")[0] for name in leftovers if name.startswith(WORK)}
    for folder in sorted(work):
        (place / folder).delete_all()
    place.delete(name for name in leftovers if not name.startswith(WORK))
    try:
        listed = {shard.path for shard in Manifest.read(place).all_shards()} if MANIFEST in files else set()
    except DatasetError:  # a damaged manifest may be mended, and then needs its shards
        return
    place.delete(name for name in files if SHARD_NAME.fullmatch(name) and name not in listed)


def _files(place: Place) -> list[str]:
    try:
        return place.files()
    except OSError as error:
        raise DatasetError(f"{place} cannot be read: {error.strerror}") from error
