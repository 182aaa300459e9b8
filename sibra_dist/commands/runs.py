"""The commands that train and search."""

from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from sibra_dist.commands.options import ConfigArgument, Overrides
from sibra_dist.config import load_config
from sibra_dist.errors import ConfigError
from sibra_dist.terminal import console, progress_bar, stages


def train(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged recipe.")
    ] = None,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="Run folder, a path or URI; by default runs/CONFIG-DATE-TIME.")] = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|MIN:MAX", help="Ray Train workers; MIN:MAX: as the cluster has room; 0 trains in this process."
        ),
    ] = "0",
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Continue this run instead of starting one.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Take traces, and show the time of each phase of a step.")] = False,
) -> None:
    """Train a model and keep its best state in a run folder.

    SIGTERM, or a file `stop` in the run folder, makes it write a checkpoint and end with exit code 143. Processes that
    `python -m torch.distributed.run -m sibra_dist.cli train ...` starts train together.
    """
    from sibra_dist.data.dataset import open_dataset
    from sibra_dist.report import profile_table, training_summary
    from sibra_dist.training.config import TrainConfig
    from sibra_dist.training.launch import process_group, read_workers, train_here
    from sibra_dist.training.run_folder import RunFolder, open_run

    bounds = read_workers(workers)
    if resume is not None:
        if config is not None or to is not None:
            raise ConfigError("--resume continues a run with its own configuration: give no CONFIG, settings or --to beside it")
        run, settings, dataset = open_run(resume)
    else:
        if config is None:
            raise ConfigError("give a CONFIG, or --resume RUN")
        settings = load_config(TrainConfig, config, overrides or ())
        dataset = open_dataset(settings.dataset)
        settings = settings.model_copy(update={"dataset": str(dataset.place)})
        run = RunFolder(to or Path("runs") / f"{Path(config).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    with process_group(settings.training) as ranks:
        if bounds.most and ranks.world > 1:
            raise ConfigError("--workers starts workers with Ray, and these processes were started already: leave it out")
        run = ranks.agree(run)
        if resume is None:
            ranks.alone(lambda: run.create(settings, dataset))
        with progress_bar() if ranks.leads else nullcontext(lambda progress: None) as show:
            if bounds.most:
                from sibra_dist.training.ray_train import train_on_ray

                train_on_ray(run, settings, bounds, show, profile=profile)
            else:
                train_here(run, settings, dataset, show, profile=profile)
    if ranks.leads:
        if profile:
            console.print(profile_table(run.profile))
        console.print(training_summary(run), soft_wrap=True)


def tune(
    config: ConfigArgument,
    overrides: Overrides = None,
    to: Annotated[str | None, typer.Option(help="Folder of the search; by default runs/tune-CONFIG-DATE-TIME.")] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Ray Train workers of each trial; 0 trains in the trial's own process.")
    ] = 0,
) -> None:
    """Search hyperparameters with Ray Tune.

    The configuration's `tune` section says which, and how.
    """
    from sibra_dist.report import trials_table
    from sibra_dist.training.config import TrainConfig
    from sibra_dist.training.tune import search

    if to is not None and "://" in to:
        raise ConfigError(f"a search is kept in a folder of this machine: give a path for --to, not {to}")
    settings = load_config(TrainConfig, config, overrides or ())
    folder = Path(to) if to else Path("runs") / f"tune-{Path(config).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    with stages("searching") as tell:
        trials = search(settings, folder, workers, tell)
    console.print(trials_table(trials, settings), soft_wrap=True)
    console.print(f"best configuration  {folder / 'best.yaml'}", soft_wrap=True)
