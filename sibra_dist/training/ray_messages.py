"""What workers of Ray tell their driver: errors that its user can put right, and warnings.

They go through the key-value store of the cluster. A file in the run's folder would not do: they may be about its disk.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from ray.experimental import internal_kv as store

from sibra_dist.errors import SibraError, TrainingStopped

logger = logging.getLogger("sibra_dist")

NAMESPACE = "sibra-dist"


class Messages:
    """Between the workers and the driver of one run."""

    def __init__(self, run: str) -> None:
        """Of the run at this path or URI; Ray must have been started."""
        self._error, self._warnings = f"error {run}", f"warning {run} "

    @contextmanager
    def sending(self) -> Iterator[bool]:
        """On a worker: an error that does not go by itself is told, so that it is not tried again, and so are warnings.

        Yields False when an earlier attempt has already told an error.
        """
        warnings = _Warnings(self._warnings)
        logger.addHandler(warnings)
        try:
            yield not store._internal_kv_exists(self._error, namespace=NAMESPACE)
        except SibraError as error:
            if not error.passing:
                told = json.dumps({"kind": type(error).__name__, "message": str(error)})
                store._internal_kv_put(self._error, told, namespace=NAMESPACE)
            # All ranks stop in the same step: they are done, and none has to be started again.
            if not isinstance(error, TrainingStopped):
                raise
        finally:
            logger.removeHandler(warnings)

    @contextmanager
    def hearing(self, seconds: float) -> Iterator[None]:
        """On the driver: workers' warnings are logged here, inside, looking for them in every `seconds`."""
        done = threading.Event()

        def hear() -> None:
            while not done.wait(seconds):
                self._log()

        listener = threading.Thread(target=hear, name="warnings", daemon=True)
        listener.start()
        try:
            yield
        finally:
            done.set()
            listener.join()
            self._log()

    def raise_error(self) -> None:
        """On the driver: raise the error that a worker has told, if one has."""
        told = _taken(self._error)
        if told is not None:
            recorded = json.loads(told)
            kinds = {kind.__name__: kind for kind in SibraError.__subclasses__()}
            raise kinds.get(recorded["kind"], SibraError)(recorded["message"])

    def forget(self) -> None:
        """On the driver: drop what an earlier training of the run has left."""
        for key in [self._error.encode(), *self._told()]:
            store._internal_kv_del(key, namespace=NAMESPACE)

    def _told(self) -> list[bytes]:
        """Keys of the warnings, the earliest first."""
        return sorted(store._internal_kv_list(self._warnings, namespace=NAMESPACE))

    def _log(self) -> None:
        for key in self._told():
            told = json.loads(_taken(key) or "{}")
            logger.log(told["level"], "%s", told["message"])


class _Warnings(logging.Handler):
    """Keeps warnings for the driver, whose user does not see what workers print."""

    def __init__(self, prefix: str) -> None:
        super().__init__(logging.WARNING)
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        told = json.dumps({"level": record.levelno, "message": record.getMessage()})
        try:
            store._internal_kv_put(f"{self._prefix}{time.time_ns():020d} {uuid.uuid4().hex}", told, namespace=NAMESPACE)
        except Exception:
            self.handleError(record)


def _taken(key: str | bytes) -> bytes | None:
    """The value of a key, which is deleted; None if there is none."""
    value: bytes | None = store._internal_kv_get(key, namespace=NAMESPACE)
    store._internal_kv_del(key, namespace=NAMESPACE)
    return value
