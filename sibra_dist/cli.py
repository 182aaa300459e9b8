"""The command line. Each verb reads a configuration, calls one function and shows what came of it.

An error that the user can put right is one line on the standard error stream and exit code 2. Spark and Ray are imported
by the verbs that need them, so that the others start at once.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.logging import RichHandler

from sibra_dist import __version__
from sibra_dist.config import load_config
from sibra_dist.errors import ConfigError, SibraError, TrainingStopped
from sibra_dist.terminal import console, errors, progress_bar, stages

app = typer.Typer(
    help="Train single-branch recommenders: fetch data, prepare it with Spark, train and search with Ray, evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a packaged recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Settings that replace the file's: training.epochs=3")
]
Workers = Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 works in this process.")]


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


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A public dataset: ml-100k.")],
    to: Annotated[Path | None, typer.Option(help="Folder to fetch into; by default data/NAME.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="An archive or folder that you have already.")] = None,
) -> None:
    """Fetch a public dataset and verify it.

    It comes from its owner, or else from a mirror.
    """
    from sibra_dist.data.sources import SOURCES
    from sibra_dist.data.sources import fetch as fetch_source

    folder = to or Path("data") / name
    with stages("fetching") as progress:
        fetch_source(name, folder, source, progress)
    console.print(f"{name} is in {folder}\n{SOURCES[name].licence}", soft_wrap=True)


@app.command()
def prepare(
    config: ConfigArgument,
    overrides: Overrides = None,
    to: Annotated[str, typer.Option(help="Folder or URI of the dataset.")] = ...,  # type: ignore[assignment]
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in that place.")] = False,
    extend: Annotated[
        str | None, typer.Option(metavar="DATASET", help="Keep the indices and encodings of this dataset for what it knows.")
    ] = None,
) -> None:
    """Build a dataset from raw files or tables with Spark."""
    from sibra_dist.etl.config import PrepareConfig
    from sibra_dist.etl.pipeline import STAGES
    from sibra_dist.etl.pipeline import prepare as build
    from sibra_dist.report import dataset_table

    settings = load_config(PrepareConfig, config, overrides or ())
    with stages("preparing", STAGES) as stage:
        manifest = build(settings, to, overwrite, extend, stage)
    console.print(dataset_table(manifest, to), soft_wrap=True)


@app.command()
def synthesize(
    users: Annotated[int, typer.Option(help="How many.")],
    items: Annotated[int, typer.Option(help="How many.")],
    interactions: Annotated[int, typer.Option(help="In all splits together.")],
    to: Annotated[str, typer.Option(help="Folder or URI of the dataset.")],
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of each user's interactions for validation, and for test.")] = 0.1,
    cold_items: Annotated[
        float, typer.Option(help="Share of the items for validation, and for test, with all their interactions.")
    ] = 0.0,
    evaluated_users: Annotated[
        int | None, typer.Option(help="Users that hold something out; by default all.", show_default=False)
    ] = None,
    user_features: Annotated[str, typer.Option(help="Of category, tags, numeric, vector; or none.")] = "category,numeric",
    item_features: Annotated[str, typer.Option(help="Likewise.")] = "category,tags,numeric,vector",
    missing: Annotated[float, typer.Option(help="Share of users, or items, that lack a feature.")] = 0.2,
    vector_size: Annotated[int, typer.Option(help="Numbers in a vector.")] = 32,
    vector_type: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in that place.")] = False,
) -> None:
    """Write a synthetic dataset of any size, with a structure that can be learned.

    It takes no raw files and no Spark, and memory for one shard.
    """
    from sibra_dist.config import validate
    from sibra_dist.data.synthetic import STAGES, SyntheticConfig
    from sibra_dist.data.synthetic import synthesize as build
    from sibra_dist.report import dataset_table

    asked = {
        "users": users,
        "items": items,
        "interactions": interactions,
        "seed": seed,
        "held_out": held_out,
        "cold_items": cold_items,
        "evaluated_users": evaluated_users,
        "user_features": _names(user_features),
        "item_features": _names(item_features),
        "missing": missing,
        "vector_size": vector_size,
        "vector_type": vector_type,
    }
    with stages("synthesizing", STAGES) as stage:
        manifest = build(validate(SyntheticConfig, asked, "synthesize"), to, overwrite, stage)
    console.print(dataset_table(manifest, to), soft_wrap=True)


@app.command()
def describe(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Folder or URI of a dataset.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Show a dataset at a glance: sizes, density, cold shares, history lengths, modalities, rejected records."""
    from sibra_dist.describe import describe as look_at

    description = look_at(dataset)
    if as_json:
        typer.echo(json.dumps(description.model_dump(mode="json"), indent=2))
        return
    from sibra_dist.report import description_table

    console.print(description_table(description), soft_wrap=True)


@app.command()
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
        if resume is None and ranks.leads:
            run.create(settings, dataset)
        ranks.wait()
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


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, a path or URI.")],
    split: Annotated[Literal["validation", "test"], typer.Option(help="The split to rank.")] = "test",
    hide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=SHARE]",
            help="A modality that the model shall not see, such as items.interactions; with =0.25 of a quarter of them.",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Where the run's dataset lies now, if it has moved.")] = None,
    workers: Workers = 0,
) -> None:
    """Evaluate a run's best model by full ranking."""
    from sibra_dist.data.presence import read_hide
    from sibra_dist.data.storage import Place
    from sibra_dist.report import evaluation_table
    from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
    from sibra_dist.training.run_folder import open_run

    request = EvaluationRequest(split, read_hide(hide or ()), str(Place.at(dataset)) if dataset else None)
    folder, settings, _ = open_run(run, request.dataset)
    if workers == 0:
        evaluate_run(folder, request)
    else:
        from sibra_dist.training.ray_train import evaluate_on_ray

        evaluate_on_ray(folder, settings, request, workers)
    console.print(evaluation_table(read_evaluation(folder, request)), soft_wrap=True)


@app.command()
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


@app.command()
def report(runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Evaluated run folders, paths or URIs.")]) -> None:
    """Compare the evaluated runs on the test split, side by side."""
    from sibra_dist.report import comparison_table

    console.print(comparison_table(runs), soft_wrap=True)


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The model whose options are wanted.")] = None,
) -> None:
    """List the models, or the options of one of them."""
    from sibra_dist.catalogue import models_table, options_table

    console.print(models_table() if name is None else options_table(name), soft_wrap=True)


@app.command()
def params(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [key=value]...", help="Configurations to compare, and settings for all.")
    ],
) -> None:
    """Count the parameters of models, part by part and side by side: params cobrar dmf dataset=FOLDER."""
    from sibra_dist.catalogue import parameter_counts, parameters_table
    from sibra_dist.data.dataset import open_dataset
    from sibra_dist.training.config import TrainConfig

    # Not Path.is_file, which raises where a setting is longer than a file's name may be.
    configs = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    overrides = [argument for argument in arguments if argument not in configs]
    if not configs:
        raise ConfigError("give at least one CONFIG: a YAML file, or the name of a packaged recipe")
    settings = [(Path(config).stem, load_config(TrainConfig, config, overrides)) for config in configs]
    counted = [(name, parameter_counts(config.model, open_dataset(config.dataset))) for name, config in settings]
    console.print(parameters_table(counted), soft_wrap=True)


@app.command()
def estimate(
    config: ConfigArgument,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=1, help="Ranks that share each batch.")] = 1,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of a rank's GPU, such as 24GiB; by default, ranks train on CPUs.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes, for machines.")] = False,
) -> None:
    """Say what memory each rank of a training will need, and on how many GPUs it fits."""
    from sibra_dist.estimate import estimate as estimated
    from sibra_dist.estimate import estimate_table, estimate_values, read_bytes
    from sibra_dist.training.config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or ())
    found = estimated(settings, workers, None if gpu_memory is None else read_bytes(gpu_memory))
    if as_json:
        typer.echo(json.dumps(estimate_values(found), indent=2))
        return
    console.print(estimate_table(found), soft_wrap=True)


@app.command()
def version() -> None:
    """Print the version."""
    console.print(__version__)


def _names(text: str) -> tuple[str, ...]:
    """Names between commas; `none` is none."""
    return () if text == "none" else tuple(name.strip() for name in text.split(","))


if __name__ == "__main__":
    main()
