"""Hyperparameter search with Ray Tune: each trial is the ordinary training, in a run folder of its own.

<folder>/
  config.yaml       the configuration searched from, with its `tune` section
  trials/<name>/    a run folder each
  trials.csv        best first
  best.yaml         the best configuration, which `sibra-dist train` takes
"""

import csv
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from sibra_dist.config import to_plain, to_yaml, validate, with_override
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import write_atomically
from sibra_dist.errors import ConfigError, TrainingError
from sibra_dist.training.config import SearchConfig, TrainConfig, TuneConfig
from sibra_dist.training.launch import Workers
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ray_train import require, start_ray, train_on_ray, uses_gpu
from sibra_dist.training.run_folder import RunFolder

EPOCH = "epoch"


def search(
    config: TrainConfig, folder: Path, workers: int = 0, tell: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Search as `config.tune` says and return the trials, best first.

    Args:
        config: what the trials have in common, and the search.
        folder: where everything is written; it must not hold a search yet.
        workers: Ray Train workers of each trial; 0 trains in the trial's own process.
        tell: called with a line of text now and then.

    Returns:
        For each trial `name`, `value` (its best monitored metric, None if it failed), `epochs` and `settings` by path.

    Raises:
        ConfigError: there is no `tune` section, a path or value in it does not fit, or `folder` is in use.
        TrainingError: every trial failed.
    """
    wanted = config.tune
    if wanted is None:
        raise ConfigError(
            "there is no tune section in this configuration: add one with tune.search, or use a recipe that has it"
        )
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds a search already; choose another --to")
    space = _space(config, wanted)
    dataset = open_dataset(config.dataset)
    config = config.model_copy(update={"dataset": str(dataset.place)})
    folder = folder.resolve()
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", to_yaml(config).encode())
    monitor = f"val/{config.training.monitor}"

    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    start_ray(max(workers, 1) * wanted.concurrent)
    require("GPU" if uses_gpu(config.training, 1) else "CPU", max(workers, 1))
    trainable = tune.with_parameters(_trial, base=to_plain(config), trials=str(folder / "trials"), workers=workers)
    tuner = tune.Tuner(
        # A trial that launches workers leaves the processors to them; Ray wants it to ask for something all the same.
        tune.with_resources(trainable, {"memory": 2**20} if workers else {"CPU": 1, "GPU": int(uses_gpu(config.training, 1))}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=monitor,
            mode="max",
            num_samples=wanted.trials if wanted.method == "random" else 1,
            scheduler=ASHAScheduler(
                time_attr=EPOCH,
                max_t=max(config.training.epochs, wanted.grace_epochs),
                grace_period=wanted.grace_epochs,
                reduction_factor=wanted.reduction,
            ),
            search_alg=BasicVariantGenerator(random_state=config.seed, max_concurrent=wanted.concurrent),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="ray", storage_path=str(folder), verbose=0, callbacks=[_Teller(tell or _tell_nobody, monitor)]
        ),
    )
    results = tuner.fit()
    trials = [_summary(folder, name, config, dict(space)) for name in sorted(os.listdir(folder / "trials"))]
    trials.sort(key=lambda trial: (trial["value"] is None, -(trial["value"] or 0.0)))
    write_atomically(folder / "trials.csv", _as_csv(trials, list(space)).encode())
    if not trials or trials[0]["value"] is None:
        reasons = [" ".join(str(error).split())[-300:] for error in results.errors]
        raise TrainingError(f"every trial failed; the first: {reasons[0] if reasons else 'no reason was reported'}")
    best = RunFolder(folder / "trials" / trials[0]["name"]).config()
    write_atomically(folder / "best.yaml", to_yaml(best).encode())
    return trials


def _trial(settings: dict[str, Any], base: dict[str, Any], trials: str, workers: int) -> None:
    """One trial: the ordinary training, with some settings replaced. Ray Tune runs it in a process of its own."""
    run = RunFolder(Path(trials) / tune.get_context().get_trial_id())
    config = _with_settings(base, settings)
    dataset = open_dataset(config.dataset)
    if not run.exists:  # Ray Tune may start a trial again: then it continues
        run.create(config, dataset)
    if workers:
        train_on_ray(run, config, Workers(workers, workers), callbacks=[TuneReportCallback()])
    else:

        def report(metrics: dict[str, float]) -> None:
            trainer.saver.wait()  # Ray Tune may end a trial by not returning from here
            tune.report(metrics)

        trainer = Trainer(config, dataset, run, Callbacks(evaluated=report))
        trainer.fit()


def _with_settings(base: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    values: dict[str, Any] = {**base, "tune": None}
    for path, value in settings.items():
        values = with_override(values, path, value)
    config = validate(TrainConfig, values, where="tune.search")
    if config.training.evaluate_on == "apart":
        raise ConfigError("training.evaluate_on is apart, but a search takes its decisions at once: set it to ranks")
    return config


def _space(config: TrainConfig, search_config: TuneConfig) -> dict[str, Any]:
    """The search space in Ray Tune's terms, after trying one value of each path on the configuration."""
    space = {}
    for path, wanted in search_config.search.items():
        if search_config.method == "grid" and wanted.choice is None:
            raise ConfigError(f"tune.search.{path}: a grid needs a list of choices, not a range")
        for value in wanted.choice or _probes(wanted.uniform or wanted.log_uniform or (0, 0)):
            _with_settings(to_plain(config), {path: value})
        space[path] = _domain(wanted, grid=search_config.method == "grid")
    return space


def _probes(bounds: tuple[float, float]) -> tuple[float, ...]:
    """The ends of a range, and a fraction between them, which a setting that must be whole refuses."""
    low, high = bounds
    return low, high, low + 0.1234567 * (high - low)


def _domain(wanted: SearchConfig, grid: bool) -> Any:
    if wanted.choice is not None:
        return tune.grid_search(list(wanted.choice)) if grid else tune.choice(list(wanted.choice))
    if wanted.uniform is not None:
        return tune.uniform(*wanted.uniform)
    assert wanted.log_uniform is not None
    return tune.loguniform(*wanted.log_uniform)


def _summary(folder: Path, name: str, config: TrainConfig, searched: dict[str, Any]) -> dict[str, Any]:
    run = RunFolder(folder / "trials" / name)
    monitor = f"val/{config.training.monitor}"
    evaluations = [line for line in run.metrics() if monitor in line]
    plain = to_plain(run.config())
    return {
        "name": name,
        "value": max((line[monitor] for line in evaluations), default=None),
        "epochs": evaluations[-1][EPOCH] if evaluations else 0,
        "settings": {path: _at(plain, path) for path in searched},
    }


def _at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values[key]
    return values


def _as_csv(trials: list[dict[str, Any]], searched: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["trial", "value", "epochs", *searched])
    writer.writerows(
        [trial["name"], trial["value"], trial["epochs"], *(trial["settings"][path] for path in searched)] for trial in trials
    )
    return text.getvalue()


def _tell_nobody(line: str) -> None:
    pass


class _Teller(tune.Callback):
    """Tells of every trial that ends."""

    def __init__(self, tell: Callable[[str], None], monitor: str) -> None:
        self._tell = tell
        self._monitor = monitor
        self._done = 0

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune stores the search with its callbacks; a terminal cannot be stored."""
        return {**self.__dict__, "_tell": _tell_nobody}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._done += 1
        value = (trial.last_result or {}).get(self._monitor)
        shown = "failed" if value is None else f"{self._monitor} {value:.4f}"
        self._tell(f"trial {self._done} done, {shown}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_trial_complete(iteration, trials, trial)
