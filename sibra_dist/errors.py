"""The errors that a user can cause.

Each says what is wrong, where, and what to do. The command line prints the message alone and exits with 2; everything
that is not a `SibraError` is a defect of this package and keeps its traceback.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class SibraError(Exception):
    """Something the user can put right."""

    passing: ClassVar[bool] = False
    """Whether it may go by itself, so that workers that failed with it are started again."""


class ConfigError(SibraError):
    """A configuration that cannot be used: an unknown key, a value of the wrong kind, a contradiction."""


class SourceError(SibraError):
    """Raw input that cannot be fetched or read: a missing file or column, a wrong checksum, no network."""


class DatasetError(SibraError):
    """A prepared dataset that cannot be opened: no manifest, a damaged shard, a newer format."""


class CheckpointError(SibraError):
    """A checkpoint or run folder that cannot be used: damaged, or made from another dataset or model."""


class TrainingError(SibraError):
    """Training that cannot go on: a loss that is not finite, workers that cannot be had."""


class TrainingStopped(SibraError):
    """Training that was asked to stop and did, after a checkpoint: it can be continued."""


class RankTimeoutError(SibraError):
    """Another rank did not take part in time."""

    passing = True


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known word nearest to `name`, or else lists them all.

    >>> nearest("batch_sise", ["batch_size", "epochs"])
    'did you mean batch_size?'
    """
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(words)}" if words else "nothing is known here"
