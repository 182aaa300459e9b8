"""The folder that recommendations are written to: whose it is, which shards are there already, and how it is completed."""

import hashlib
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq

from sibra_dist.data.manifest import Shard
from sibra_dist.data.publish import writing
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.recommending.manifest import MANIFEST, REJECTED, TABLE, Recommended

logger = logging.getLogger("sibra_dist")

SHARD_NAME = re.compile(rf"{TABLE}/part-(\d+)-([0-9a-f]{{8}})\.parquet")
LEFTOVER = re.compile(rf"({TABLE}/)?\.[^/]+\.[0-9a-f]{{32}}\.partial")
"""What a process that was killed may leave."""
REMEDY = "Make room, or name a folder that can be written, and give the command again: it goes on where it was"


def begin(place: Place, plan: Recommended, rejected: bytes | None, overwrite: bool) -> dict[int, Shard]:
    """Write the plan, unless it is there already; returns the shards that are there and whole, by number.

    Args:
        place: the folder.
        plan: what is to be made.
        rejected: content of `rejected.csv`; None if there is nothing to tell.
        overwrite: whether other recommendations are deleted.

    Raises:
        DatasetError: something else is there, or the folder cannot be read or written.
    """
    with writing(place, REMEDY):
        if place.is_local and place.path.exists() and not place.path.is_dir():
            raise DatasetError(f"{place} is a file; name a folder for the recommendations")
        there = place.files()
        if any(not (name in (MANIFEST, REJECTED) or SHARD_NAME.fullmatch(name) or LEFTOVER.fullmatch(name)) for name in there):
            raise DatasetError(f"{place} holds something that is not recommendations, and stays as it is; name a new folder")
        if there and not _is_of(place, plan, overwrite):
            # The manifest goes first: without it nothing there is taken for the whole of anything.
            place.delete([MANIFEST])
            place.delete(there)
            there = []
        place.delete(name for name in there if LEFTOVER.fullmatch(name))
        kept = {}
        for name in there:
            shard = _whole(place, name)
            if shard is not None:
                kept[int(SHARD_NAME.fullmatch(name)[1])] = shard  # type: ignore[index]
        if len(kept) < plan.num_shards or not there:
            if rejected is not None:
                place.write(REJECTED, rejected)
            plan.write(place)
        return kept


def finish(place: Place, plan: Recommended, shards: dict[int, Shard]) -> Recommended:
    """Complete the manifest: every shard is there.

    Raises:
        DatasetError: the folder cannot be written.
    """
    ordered = tuple(shards[number] for number in range(plan.num_shards))
    rows = sum(shard.rows for shard in ordered)
    completed = plan.model_copy(update={"complete": True, "rows": rows, "shards": ordered})
    with writing(place, REMEDY):
        # Of shards that were damaged, new ones are there under other names.
        listed = {shard.path for shard in ordered}
        place.delete(name for name in place.files(TABLE) if name not in listed)
        if Recommended.read(place) != completed:
            completed.write(place)
    return completed


def _is_of(place: Place, plan: Recommended, overwrite: bool) -> bool:
    """Whether what is there belongs to this plan; False if it is to be replaced."""
    try:
        found = Recommended.read(place)
    except DatasetError:
        if overwrite:
            return False
        raise
    if found is not None and found.request == plan.request:
        return True
    if overwrite:
        return False
    if found is None:
        raise DatasetError(f"{place} holds recommendations without {MANIFEST}; add --overwrite to replace them")
    different = ", ".join(found.request.differences(plan.request))
    raise DatasetError(
        f"{place} holds recommendations of another request (not the same {different}); "
        "add --overwrite to replace them, or name another folder"
    )


def _whole(place: Place, name: str) -> Shard | None:
    """The shard in a file, if the file has the content that its name says."""
    named = SHARD_NAME.fullmatch(name)
    if named is None:
        return None
    content = place.read(name)
    checksum = hashlib.sha256(content).hexdigest()
    if not checksum.startswith(named[2]):
        logger.warning("%s is damaged; making it again", place / name)
        return None
    rows = pq.read_metadata(pa.BufferReader(content)).num_rows
    return Shard(path=name, rows=rows, bytes=len(content), sha256=checksum)
