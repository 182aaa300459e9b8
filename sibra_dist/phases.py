"""Where time goes, by phase: anything may name what it does, and only a profile listens."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import record_function

_listener: ContextVar["Spans | None"] = ContextVar("listener", default=None)


def phase(name: str) -> AbstractContextManager[Any]:
    """Names what happens inside. Phases may hold others, whose time is not counted as theirs."""
    listener = _listener.get()
    return nullcontext() if listener is None else listener.measure(name)


@dataclass
class _Span:
    name: str
    parent: int | None
    start: Any
    end: Any = None


class Spans:
    """Measures the phases of this thread while it listens: on a GPU by the time that its stream takes."""

    def __init__(self, device: torch.device) -> None:
        """Prepare to measure what is computed on a device."""
        self._device = device
        self._spans: list[_Span] = []
        self._open: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Measure the phases that are entered inside."""
        token = _listener.set(self)
        try:
            yield
        finally:
            _listener.reset(token)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure one phase, which the profiler's trace shows too."""
        span = _Span(name, self._open[-1] if self._open else None, self._mark())
        self._open.append(len(self._spans))
        self._spans.append(span)
        try:
            with record_function(name):
                yield
        finally:
            span.end = self._mark()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """The time of each phase without that of the phases inside it, in the order in which they were first entered."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for span in self._spans:
            taken = self._between(span.start, span.end)
            totals[span.name] = totals.get(span.name, 0.0) + taken
            if span.parent is not None:
                totals[self._spans[span.parent].name] -= taken
        return totals

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        return float(end - start) if self._device.type != "cuda" else start.elapsed_time(end) / 1e3
