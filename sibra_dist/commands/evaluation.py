"""The commands that evaluate and compare."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sibra_dist.commands.options import Workers
from sibra_dist.commands.sharing import share
from sibra_dist.errors import ConfigError
from sibra_dist.terminal import console

if TYPE_CHECKING:
    from sibra_dist.recommending.score import Scored
    from sibra_dist.training.config import TrainConfig
    from sibra_dist.training.evaluation import EvaluationRequest
    from sibra_dist.training.run_folder import RunFolder


def evaluate(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run folder, a path or URI.")] = None,
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
    dataset: Annotated[
        str | None, typer.Option(help="Where the run's dataset lies now, if it has moved; what recommendations are scored on.")
    ] = None,
    recommendations: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Score these instead of a run: user_id, item_id, and rank or score; CSV, TSV, Parquet, or a folder of them.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME@K", help="Of recommendations, a metric; by default those of a run. Repeatable."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Of recommendations, the result's folder or URI; by default runs/FILE-DATE-TIME.")
    ] = None,
    workers: Workers = 0,
) -> None:
    """Evaluate a run's best model by full ranking, or recommendations of any system."""
    from sibra_dist.data.presence import EACH, read_hide
    from sibra_dist.data.storage import Place
    from sibra_dist.recommending.score import Scored
    from sibra_dist.training.evaluation import EvaluationRequest, evaluate_run, read_evaluation
    from sibra_dist.training.run_folder import open_run

    if (run is None) == (recommendations is None):
        raise ConfigError("give a RUN, or else --recommendations FILE with --dataset DATASET")
    if run is None:
        if dataset is None:
            raise ConfigError("--recommendations are scored on a dataset: give it with --dataset DATASET")
        if hide or workers:
            raise ConfigError("--hide and --workers are for a RUN; leave them out with --recommendations")
        _score(Scored(str(recommendations), split, tuple(metric or ()), candidates or "split"), dataset, to)
        return
    if metric or to:
        raise ConfigError("a RUN is evaluated by its own configuration, in its own folder: leave out --metric and --to")
    named = [option for option in hide or () if option != EACH]
    request = EvaluationRequest(split, read_hide(named), str(Place.at(dataset)) if dataset else None, candidates)
    folder, settings, _ = open_run(run, request.dataset)
    if EACH in (hide or ()):
        _evaluate_modalities(folder, settings, request, workers)
        return
    if share(folder, settings, partial(evaluate_run, request=request), workers, ("evaluating", "users")):
        _show(read_evaluation(folder, request))


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
    if share(folder, settings, partial(measure_gap, request=request), workers, ("comparing", "embeddings")):
        result = read_gap(folder)
        console.print(gap_table(result), soft_wrap=True)
        console.print(f"plot  {folder.place / 'evaluation' / result['plot']}", soft_wrap=True)


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


def _score(scored: "Scored", dataset: str, to: str | None) -> None:
    """Score recommendations of any system."""
    from sibra_dist.data.dataset import open_dataset
    from sibra_dist.recommending.manifest import REJECTED
    from sibra_dist.recommending.score import score
    from sibra_dist.training.evaluation import read_result
    from sibra_dist.training.run_folder import RunFolder

    folder = RunFolder(to or Path("runs") / f"{Path(scored.source).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    score(scored, open_dataset(dataset), folder)
    result = read_result(folder, scored.split)
    _show(result)
    for reason, count in result["recommendations"]["rejected"].items():
        console.print(f"not used  {count:,} {reason}: see {folder.evaluation(scored.split) / REJECTED}", soft_wrap=True)
    console.print(f"result folder  {folder.name}", soft_wrap=True)


def _evaluate_modalities(folder: "RunFolder", settings: "TrainConfig", request: "EvaluationRequest", workers: int) -> None:
    """Evaluate with every modality hidden in turn, and alone."""
    from sibra_dist.report_modalities import modalities_table
    from sibra_dist.training.modalities import evaluate_modalities, read_modalities

    if share(folder, settings, partial(evaluate_modalities, request=request), workers, ("evaluating", "rows")):
        console.print(modalities_table(read_modalities(folder, request)), soft_wrap=True)


def _show(result: dict[str, Any]) -> None:
    from sibra_dist.report import evaluation_table
    from sibra_dist.report_groups import groups_table

    console.print(evaluation_table(result), soft_wrap=True)
    console.print(groups_table(result), soft_wrap=True)
