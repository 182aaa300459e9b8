"""What a person at a terminal sees while they wait. Where there is no terminal, a line now and then."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sibra_dist.training.progress import Progress as TrainingProgress

# No markup, no emoji: the brackets and colons in a path or a message are meant by the letter.
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False, emoji=False)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else 120, highlight=False, markup=False, emoji=False)


@contextmanager
def stages(title: str, known: Sequence[str] = ()) -> Iterator[Callable[[str], None]]:
    """Show which stage a job is in: yields a function to call with a stage's name as it begins."""
    if not errors.is_terminal:
        yield lambda stage: errors.print(f"{title}: {stage}", soft_wrap=True)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=len(known) or None)

        def begin(stage: str) -> None:
            bar.update(task, description=f"{title}: {stage}", completed=known.index(stage) if stage in known else None)

        yield begin


@contextmanager
def counting(title: str, what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how many are done, else a line a tenth: yields a function to call with that number and the number of all."""
    if not errors.is_terminal:
        told = 0

        def line(done: int, total: int) -> None:
            nonlocal told
            tenth = 10 * done // max(total, 1)
            if tenth > told:
                told = tenth
                errors.print(f"{title}: {done:,} of {total:,} {what}", soft_wrap=True)

        yield line
        return
    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = (TextColumn(f"{title} {what}", markup=False), BarColumn(), MofNCompleteColumn(), left)
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def progress_bar() -> Iterator[Callable[["TrainingProgress"], None]]:
    """Show training: a bar for the epoch with loss, validation metric, speed and time left; else a line an epoch."""
    if not errors.is_terminal:
        told = 0.0

        def line(progress: "TrainingProgress") -> None:
            nonlocal told
            if progress.evaluated > told:
                told = progress.evaluated
                errors.print(f"epoch {told:.4g}/{progress.epochs}  {_figures(progress)}", soft_wrap=True)

        yield line
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=None, epoch="-", figures="starting")

        def show(progress: "TrainingProgress") -> None:
            epoch = f"{progress.epoch}/{progress.epochs}"
            bar.update(task, total=progress.steps, completed=progress.step, epoch=epoch, figures=_figures(progress))

        yield show


def _figures(progress: "TrainingProgress") -> str:
    parts = [f"loss {progress.loss:.4f}"]
    if progress.metric is not None and progress.best is not None:
        parts.append(f"{progress.monitor} {progress.metric:.4f} (best {progress.best:.4f})")
    if progress.examples_per_second > 0:  # a run that resumes at the end of an epoch has not measured any
        parts.append(f"{progress.examples_per_second:,.0f} examples/s")
        parts.append(f"at most {duration(progress.seconds_left)} left")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
