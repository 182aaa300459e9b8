"""Where each rank is, so that one that waits in vain can say for whom.

Every rank tells the others, once a second and through the store that torch.distributed keeps, what it is doing. They look
when a collective operation has failed, for instance because it took longer than `training.rank_timeout`; and somewhat
before, as NCCL ends the process then, without an error that could be explained.
"""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from torch.distributed import DistError, distributed_c10d

from sibra_dist.errors import RankTimeoutError
from sibra_dist.training.ranks import Ranks

logger = logging.getLogger("sibra_dist")

BEAT_SECONDS = 1.0
WARNED_SHARE = 0.8
"""Of the timeout, after which a rank that gets no further says what it may be waiting for"""
SILENT_SECONDS = 5.0
"""A rank that has said nothing for so long does not run: it was stopped, or its machine is gone."""


class Place(NamedTuple):
    """What a rank is doing, and since when."""

    phase: str
    epoch: int
    step: int
    since: float
    """Seconds since 1970"""

    def __str__(self) -> str:
        return f"{self.phase} of epoch {self.epoch}, step {self.step}"


class Whereabouts:
    """Says where this rank is, and finds out where the others are."""

    def __init__(self, ranks: Ranks, timeout: float) -> None:
        """Nothing is told before `telling`; `timeout` is that of collective operations, in seconds."""
        self._ranks, self._timeout = ranks, timeout
        self._place = Place("start", 0, 0, time.time())

    def note(self, phase: str, epoch: int, step: int) -> None:
        """This rank now does `phase` of a step."""
        self._place = Place(phase, epoch, step, time.time())

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the others, and explain the error if one of them fails to take part in what is done inside.

        Raises:
            RankTimeoutError: in place of what torch.distributed raises.
        """
        if self._ranks.world == 1:
            yield
            return
        # Of its own, so that the thread never waits behind what the training asks of the store.
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        done = threading.Event()

        def tell() -> None:
            warned = None
            while not done.is_set():
                place, now = self._place, time.time()
                with suppress(RuntimeError):  # the store's process has ended, and with it this training
                    store.set(self._key(self._ranks.rank), json.dumps([*place, now]))
                if now - place.since > WARNED_SHARE * self._timeout and place != warned:
                    others = self._others(store)
                    if others:
                        warned = place
                        where = f"rank {self._ranks.rank} is since {now - place.since:.0f} s in {place}"
                        logger.warning("no rank gets further: %s; %s", where, others)
                done.wait(BEAT_SECONDS)

        teller = threading.Thread(target=tell, name="whereabouts", daemon=True)
        teller.start()
        try:
            yield
        except RuntimeError as error:
            if not (isinstance(error, DistError) or "gloo" in str(error)):
                raise
            others = self._others(store) or "every other rank is there as well"
            waited = f"rank {self._ranks.rank} has waited {time.time() - self._place.since:.0f} s in {self._place}"
            raise RankTimeoutError(f"{waited}: {others} ({' '.join(str(error).split())[-200:]})") from error
        finally:
            done.set()
            teller.join()

    def _others(self, store: Any) -> str:
        """Where those are that this rank may be waiting for; empty if all are in the same place."""
        now = time.time()
        try:
            others = [self._described(store, rank, now) for rank in range(self._ranks.world) if rank != self._ranks.rank]
        except RuntimeError:
            others = ["rank 0, whose machine holds what ranks say of each other, cannot be reached"]
        return "; ".join(filter(None, others))

    def _described(self, store: Any, rank: int, now: float) -> str | None:
        """Where a rank is that this one may be waiting for; None: in the same place."""
        if not store.check([self._key(rank)]):
            return f"rank {rank} has not been heard of"
        *place, told = json.loads(store.get(self._key(rank)))
        where = Place(*place)
        if now - told > SILENT_SECONDS:
            return f"rank {rank} was last heard of {now - told:.0f} s ago, in {where}"
        if where[:3] == self._place[:3]:
            return None
        return f"rank {rank} is since {now - where.since:.0f} s in {where}"

    @staticmethod
    def _key(rank: int) -> str:
        return f"sibra-dist/whereabouts/{rank}"
