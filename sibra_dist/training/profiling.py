"""Profiles some steps of a training and one evaluation: traces, and the time of each phase.

    <run>/profile/
      steps.trace.json        for chrome://tracing or https://ui.perfetto.dev
      evaluation.trace.json   likewise
      phases.json             seconds by phase

While a profile is taken nothing is read ahead, so that phases follow each other.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sibra_dist.data.storage import Place
from sibra_dist.phases import Spans

logger = logging.getLogger("sibra_dist")

WARM_UP, PROFILED = 5, 20
"""Steps that pass before a profile begins, and that it takes at most, all within an epoch."""
RESULT = "phases.json"


class TrainingProfile:
    """The profile of one training, taken once."""

    def __init__(self, folder: Place, device: torch.device) -> None:
        """Prepare to write into a folder."""
        self._folder = folder
        self._device = device
        self._result: dict[str, Any] = {"device": device.type}
        self._passed = 0
        self._steps = 0
        self._running: ExitStack | None = None

    def before_step(self) -> None:
        """Begin after the first steps."""
        if self._passed == WARM_UP and self._running is None and not self._steps:
            self._running = ExitStack()
            self._running.enter_context(self._taken("steps"))

    def after_step(self, last: bool) -> None:
        """End after enough steps, or with an epoch's last."""
        self._passed += 1
        if self._running is not None:
            self._steps += 1
            if last or self._steps == PROFILED:
                self._running.close()
                self._running = None
                self._result["steps"]["count"] = self._steps
                self._write()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What happens inside is an evaluation; the first is taken."""
        if "evaluation" in self._result:
            yield
            return
        with self._taken("evaluation"):
            yield
        self._write()

    @contextmanager
    def _taken(self, name: str) -> Iterator[None]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        spans = Spans(self._device)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's own log goes to the terminal
        with profile(activities=activities) as trace:
            with spans.listening():
                yield
            self._result[name] = {"count": 1, "seconds": spans.seconds()}
        with TemporaryDirectory(prefix="sibra-dist-") as folder:  # of this machine, where the run's folder may not be
            file = Path(folder) / f"{name}.trace.json"
            trace.export_chrome_trace(str(file))
            self._keep(file.name, file.read_bytes())

    def _write(self) -> None:
        self._keep(RESULT, json.dumps(self._result, indent=2).encode() + b"\n")

    def _keep(self, name: str, content: bytes) -> None:
        try:
            self._folder.write(name, content)
        except OSError as error:  # no reason to stop
            logger.warning("%s could not be written: %s", self._folder / name, error)


def read_profile(folder: Place) -> dict[str, Any]:
    """What was written: for `steps` and `evaluation`, as far as they were profiled, the `count` and `seconds` by phase."""
    result: dict[str, Any] = json.loads(folder.read(RESULT)) if folder.status(RESULT) else {}
    return result
