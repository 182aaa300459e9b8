"""Publication: a dataset comes into being whole, or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sibra_dist.config import to_plain
from sibra_dist.data.manifest import MANIFEST, Manifest, Source
from sibra_dist.errors import DatasetError
from sibra_dist.etl.config import PrepareConfig

MACHINE_SPECIFIC = ("source", "spark")
"""Fields of the configuration that say where and with what a dataset is made, and nothing of what is in it."""


def recorded(config: PrepareConfig) -> dict[str, object]:
    """The configuration as the manifest records it: without what belongs to the machine it was made on."""
    return {name: value for name, value in to_plain(config).items() if name not in MACHINE_SPECIFIC}


def existing_dataset(to: Path, config: PrepareConfig, sources: Sequence[Source], overwrite: bool) -> Manifest | None:
    """The manifest of the dataset that is asked for, if it is there already; None if it is to be made.

    Raises:
        DatasetError: there is something else in the place.
    """
    if not to.exists():
        return None
    if not to.is_dir():
        raise DatasetError(f"{to} is a file; name a folder for the dataset")
    if not (to / MANIFEST).is_file():
        if any(to.iterdir()):
            raise DatasetError(f"{to} holds something that is not a dataset, and stays as it is; name a new folder")
        return None
    if overwrite:
        return None
    manifest = Manifest.read(to)
    if manifest.config != recorded(config) or manifest.sources != tuple(sources):
        raise DatasetError(
            f"{to} holds a dataset made from another configuration or other files; "
            "add --overwrite to replace it, or name another folder"
        )
    return manifest


@contextmanager
def staged(to: Path) -> Iterator[Path]:
    """A folder beside `to` to write a dataset in; it takes the place of `to` when the block ends, and goes if the block fails.

    Raises:
        DatasetError: the folder cannot be made.
    """
    to = to.resolve()
    mark = uuid.uuid4().hex[:12]
    aside, former = to.with_name(f".{to.name}.partial-{mark}"), to.with_name(f".{to.name}.replaced-{mark}")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise DatasetError(f"{to} cannot be written: {error.strerror}. Name a folder that can be") from error
    try:
        yield aside
        replaces = to.exists()
        if replaces:
            to.rename(former)
        try:
            aside.rename(to)
        except OSError:
            if replaces:
                former.rename(to)
            raise
        _sync(to.parent)
        shutil.rmtree(former, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
