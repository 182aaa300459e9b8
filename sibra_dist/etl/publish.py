"""What of publication is Spark's matter: what the manifest records, and errors out of its tasks; see `data.publish`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException

from sibra_dist.config import to_plain
from sibra_dist.data import publish
from sibra_dist.data.storage import Place
from sibra_dist.errors import DatasetError
from sibra_dist.etl.config import PrepareConfig

MACHINE_SPECIFIC = ("source", "spark")
"""Fields of the configuration that say where and with what a dataset is made, and nothing of what is in it."""
WRITE_TROUBLE = re.compile(r"\b(?:OSError|PermissionError): (\[Errno \d+\] .+)|(No space left on device|Permission denied)")


def recorded(config: PrepareConfig) -> dict[str, object]:
    """The configuration as the manifest records it: without what belongs to the machine it was made on."""
    return {name: value for name, value in to_plain(config).items() if name not in MACHINE_SPECIFIC}


@contextmanager
def writing(place: Place) -> Iterator[None]:
    """Turn whatever stops the writing of a dataset or of intermediate tables, in Spark's tasks too, into one error.

    Raises:
        DatasetError: a disk is full, a folder may not be written, an object store refuses.
    """
    remedy = "Free some space or make it writable; the configuration's spark.work and Spark's spark.local.dir need some too"
    try:
        with publish.writing(place, remedy):
            yield
    except (PySparkException, Py4JJavaError) as error:
        told = WRITE_TROUBLE.search(str(error))
        # What cannot be read is another matter.
        if told is None or re.search(r"SourceError|DatasetError|FAILED_READ_FILE", str(error)):
            raise
        raise DatasetError(f"{place} cannot be written: {told[1] or told[2]}. {remedy}") from error
