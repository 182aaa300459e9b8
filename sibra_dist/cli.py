"""The command line. Each command, in `sibra_dist/commands`, reads a configuration, calls one function and shows the result.

An error that the user can put right is one line on the standard error stream and exit code 2. Spark and Ray are imported
by the verbs that need them, so that the others start at once.
"""

import logging
import signal
import sys
import warnings
from collections.abc import Sequence

import typer
from rich.logging import RichHandler

from sibra_dist import __version__
from sibra_dist.commands import datasets, evaluation, exports, models, recommendations, runs
from sibra_dist.errors import SibraError, TrainingStopped
from sibra_dist.terminal import console, errors

app = typer.Typer(
    help="Train single-branch recommenders: fetch data, prepare it with Spark, train and search with Ray, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)


def version() -> None:
    """Print the version."""
    console.print(__version__)


for command in (
    *(datasets.fetch, datasets.prepare, datasets.synthesize, datasets.describe),
    *(runs.train, runs.tune, evaluation.evaluate, evaluation.gap, evaluation.compare, evaluation.report),
    *(recommendations.recommend, exports.export),
    *(models.models, models.params, models.estimate),
    version,
):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, by default those of the process, and exit."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)]
    )
    logging.getLogger("sibra_dist").setLevel(logging.INFO)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # libraries' deprecations are for developers; the tests turn them into errors
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sibra-dist")
    except TrainingStopped as stopped:
        typer.echo(stopped, err=True)
        sys.exit(128 + signal.SIGTERM)
    except SibraError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a disk that is full, a folder that may not be written, a file that went away
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
