"""The commands that train, search, evaluate and compare."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sibra_dist.commands.options import ConfigArgument, Overrides, Workers
from sibra_dist.config import load_config
from sibra_dist.errors import ConfigError
from sibra_dist.terminal import console, counting, progress_bar, stages

if TYPE_CHECKING:
    from sibra_dist.training.config import TrainConfig
    from sibra_dist.training.run_folder import RunFolder


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


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a path or URI.")],
    split: Annotated[Literal["validation", "test"], typer.Option(help="The split to rank.")] = "test",
    hide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=SHARE]",
            help="A modality that the model shall not see, such as items.interactions; with =0.25 of a quarter of them. "
            "each: every one in turn, and alone.",
        ),
    ] = None,
    candidates: Annotated[
        Literal["split", "all"] | None,
        typer.Option(help="Rank the items that the dataset's protocol says, or all; by default as the run is configured."),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the run's dataset lies now, if it has moved.")] = None,
    workers: Workers = 0,
) -> None:
    """Evaluate a run's best model by full ranking."""
    from sibra_dist.data.presence import EACH, read_hide
    from sibra_dist.data.storage import Place
    from sibra_dist.report import evaluation_table
    from sibra_dist.report_groups import groups_table
    from sibra_dist.report_modalities import modalities_table
    from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
    from sibra_dist.training.modalities import evaluate_modalities, read_modalities
    from sibra_dist.training.run_folder import open_run

    named = [option for option in hide or () if option != EACH]
    request = EvaluationRequest(split, read_hide(named), str(Place.at(dataset)) if dataset else None, candidates)
    folder, settings, _ = open_run(run, request.dataset)
    if EACH in (hide or ()):
        with counting("evaluating", "rows") as show:
            _share(folder, settings, partial(evaluate_modalities, request=request), show, workers)
        console.print(modalities_table(read_modalities(folder, request)), soft_wrap=True)
        return
    if workers == 0:
        evaluate_run(folder, request)
    else:
        from sibra_dist.training.ray_train import evaluate_on_ray

        evaluate_on_ray(folder, settings, request, workers)
    result = read_evaluation(folder, request)
    console.print(evaluation_table(result), soft_wrap=True)
    console.print(groups_table(result), soft_wrap=True)


def gap(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a path or URI.")],
    sample: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Search among N entities of each pair of modalities; by default all.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the run's dataset lies now, if it has moved.")] = None,
    workers: Workers = 0,
) -> None:
    """Measure how far apart a run's best model embeds the modalities of the same users, and items.

    The distance of centroids, and how often an embedding in one modality is found from that in another; with a plot.
    """
    from sibra_dist.data.storage import Place
    from sibra_dist.report_modalities import gap_table
    from sibra_dist.training.modalities import GapRequest, measure_gap, read_gap
    from sibra_dist.training.run_folder import open_run

    request = GapRequest(sample, str(Place.at(dataset)) if dataset else None)
    folder, settings, _ = open_run(run, request.dataset)
    with counting("comparing", "embeddings") as show:
        _share(folder, settings, partial(measure_gap, request=request), show, workers)
    result = read_gap(folder)
    console.print(gap_table(result), soft_wrap=True)
    console.print(f"plot  {folder.place / 'evaluation' / result['plot']}", soft_wrap=True)


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


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Evaluated run folders; the first is the reference.")],
    split: Annotated[Literal["validation", "test"], typer.Option(help="The split they were evaluated on.")] = "test",
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME@K", help="A metric of users; by default ndcg@10. Repeatable.")
    ] = None,
    form: Annotated[
        Literal["text", "csv", "latex", "markdown"], typer.Option("--format", help="How the table is written.")
    ] = "text",
    resamples: Annotated[int, typer.Option(min=1, help="Of the bootstrap.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Test whether runs differ from the first, user by user.

    Paired t-test, Wilcoxon signed-rank, corrected for the number of runs; effect size and bootstrap interval.
    """
    from sibra_dist.comparison.runs import compare_runs
    from sibra_dist.comparison.tables import written

    table = written(compare_runs(runs, split, metric or ("ndcg@10",), resamples, seed), form)
    if isinstance(table, str):
        typer.echo(table, nl=False)
    else:
        console.print(table, soft_wrap=True)


def report(runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Evaluated run folders, paths or URIs.")]) -> None:
    """Compare the evaluated runs on the test split, side by side."""
    from sibra_dist.report import comparison_table

    console.print(comparison_table(runs), soft_wrap=True)


def _share(
    run: "RunFolder", settings: "TrainConfig", act: Callable[..., None], show: Callable[[int, int], None], workers: int
) -> None:
    """Have something done to a run in this process, or by Ray workers, which do not tell how far they are."""
    if workers == 0:
        act(run, progress=show)
    else:
        from sibra_dist.training.ray_train import share_on_ray

        share_on_ray(run, settings, act, workers)
