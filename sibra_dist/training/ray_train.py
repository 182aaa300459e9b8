"""The training loop, and evaluation, on the workers of Ray Train.

Checkpoints are the loop's own, in the run folder, so that a run may go on with Ray, without it, or on another number of
workers. When a worker dies, Ray Train starts the group again and the loop continues from the newest checkpoint. On
several nodes the run folder and the dataset must therefore lie on storage that all of them see.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from math import ceil
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from sibra_dist.config import to_plain, validate
from sibra_dist.data.dataset import open_dataset
from sibra_dist.data.storage import filesystem
from sibra_dist.errors import TrainingError
from sibra_dist.training.config import TrainConfig, TrainingConfig
from sibra_dist.training.launch import Workers, stop_request
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks, Progress
from sibra_dist.training.ray_messages import Messages
from sibra_dist.training.ray_validation import ActorValidator, evaluator
from sibra_dist.training.run_folder import RunFolder
from sibra_dist.training.stopping import on_sigterm

POLL_SECONDS = 0.5
REMOTE_SECONDS = 5.0
"""Between two tellings of progress in an object store, for which training waits."""


def train_on_ray(
    run: RunFolder,
    config: TrainConfig,
    workers: Workers,
    progress: Callable[[Progress], None] = lambda progress: None,
    callbacks: Sequence[UserCallback] = (),
    *,
    profile: bool = False,
) -> None:
    """Train, or continue, the run in a folder on Ray Train workers, and profile some steps of it if asked to.

    SIGTERM makes the workers write a checkpoint and end.

    Raises:
        SibraError: what a worker raised that the user can put right.
        TrainingStopped: it was asked to stop.
        TrainingError: workers failed more often than `training.max_failures`.
    """
    # Whoever is called back, such as a search, may end the training then.
    payload = {"run": str(run.place), "config": to_plain(config), "profile": profile, "saved_first": bool(callbacks)}
    apart = config.training.evaluate_on == "apart"
    start_ray(workers.most + apart)
    run.stop.unlink()
    with (
        _following(run, progress),
        on_sigterm(lambda: run.stop.write_text("")),
        evaluator(run, config, _reserved(config.training, workers)) if apart else nullcontext() as actor,
    ):
        _run(_train_worker, {**payload, "evaluator": actor}, run, workers, config.training, callbacks)


def share_on_ray(run: RunFolder, config: TrainConfig, act: Callable[..., object], workers: int) -> None:
    """Have `workers` Ray Train workers do together what ranks share out, `act(run, device=...)`; what it returns is dropped.

    Raises:
        SibraError: what a worker raised that the user can put right.
        TrainingError: workers failed more often than `training.max_failures`.
    """
    start_ray(workers)
    _run(_share_worker, {"run": str(run.place), "act": act}, run, Workers(workers, workers), config.training, ())


def start_ray(workers: int) -> None:
    """Join the cluster that `RAY_ADDRESS` or a surrounding job names, or start one on this machine; quietly."""
    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if not address:  # a cluster that happens to run on this machine is not joined without being told
        settings |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, workers), "include_dashboard": False}
    try:
        ray.init(**settings)
    except (ValueError, ConnectionError, RuntimeError) as error:
        where = f"the cluster at RAY_ADDRESS={address} cannot be joined" if address else "Ray cannot be started"
        raise TrainingError(f"{where}: {' '.join(str(error).split())[:300]}") from error


def require(resource: str, wanted: float) -> None:
    """Check that the cluster has as much of a resource as is wanted, or workers would wait for ever.

    Raises:
        TrainingError: it has less.
    """
    there = ray.cluster_resources().get(resource, 0)
    if there < wanted:
        raise TrainingError(
            f"{wanted:g} {resource}s are wanted, but the cluster has {there:g}: use fewer --workers, or set training.device"
        )


def uses_gpu(config: TrainingConfig, workers: int) -> bool:
    """Whether `workers` train on a GPU each: when told to, or when the cluster has as many."""
    return config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) >= workers)


def _reserved(config: TrainingConfig, workers: Workers) -> torch.device:
    """What evaluates apart from workers: a GPU where they leave one, or else a CPU, which the cluster must have."""
    on_gpu = uses_gpu(config, workers.least)
    if on_gpu and ray.cluster_resources().get("GPU", 0) > workers.most:
        return torch.device("cuda")
    require("CPU", 1 if on_gpu else workers.least + 1)
    return torch.device("cpu")


def _run(
    worker: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    run: RunFolder,
    workers: Workers,
    config: TrainingConfig,
    callbacks: Sequence[UserCallback],
) -> None:
    use_gpu = uses_gpu(config, workers.least)
    require("GPU" if use_gpu else "CPU", workers.least)
    messages = Messages(str(run.place))
    messages.forget()
    # By name, as the types that Ray states are those of its former interface.
    scaling: dict[str, Any] = {"num_workers": workers.least, "use_gpu": use_gpu}
    if workers.most > workers.least:
        scaling |= {"num_workers": tuple(workers), "elastic_resize_monitor_interval_s": config.resize_every}
    # By its own rules Ray finds only some of the object stores that the environment names.
    system, path = filesystem(run.place.uri)
    trainer = TorchTrainer(
        worker,
        train_loop_config=payload,
        # Objects travel by way of main memory, with gloo, on any device.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=ceil(config.rank_timeout)),
        scaling_config=ScalingConfig(**scaling),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=None if run.place.is_local else system,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=list[Any](callbacks),
        ),
    )
    try:
        with messages.hearing(POLL_SECONDS):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        messages.raise_error()
        reason = " ".join(str(error).split())[-500:]
        remedy = f"Continue the run with `sibra-dist train --resume {run.name}`"
        raise TrainingError(f"the workers failed: {reason}. {remedy}") from error
    messages.raise_error()


def _train_worker(payload: dict[str, Any]) -> None:
    run = RunFolder(payload["run"])
    with Messages(str(run.place)).sending() as may_start:
        if not may_start:
            return
        config = validate(TrainConfig, payload["config"], where=run.name)
        shown, pause = -math.inf, 0.0 if run.place.is_local else REMOTE_SECONDS

        def show(progress: Progress) -> None:
            nonlocal shown
            if time.monotonic() - shown < pause:
                return
            shown = time.monotonic()
            with suppress(OSError):  # a bar is no reason to stop
                run.progress.write_text(json.dumps(asdict(progress)))

        def report(metrics: dict[str, float]) -> None:
            if payload["saved_first"]:
                trainer.saver.wait()
            ray.train.report(metrics)

        stop = stop_request(run)
        callbacks = Callbacks(progress=show, evaluated=report, leaving=_leaving)
        dataset = open_dataset(config.dataset)
        validator = ActorValidator(payload["evaluator"]) if payload["evaluator"] is not None else None
        settings: dict[str, Any] = {"profile": payload["profile"], "stop": stop, "validator": validator}
        trainer = Trainer(config, dataset, run, callbacks, _device(), **settings)
        trainer.fit()


def _leaving() -> frozenset[str]:
    """The machines of workers that are about to be taken away; a barrier of all workers."""
    found = ray.train.get_preemption_info()
    return frozenset(found.preempted_node_ids if found is not None else ())


def _share_worker(payload: dict[str, Any]) -> None:
    run = RunFolder(payload["run"])
    with Messages(str(run.place)).sending() as may_start:
        if may_start:
            payload["act"](run, device=_device())


def _device() -> torch.device:
    device = get_device()
    return device[0] if isinstance(device, list) else device


@contextmanager
def _following(run: RunFolder, show: Callable[[Progress], None]) -> Iterator[None]:
    """While the workers train, show what rank 0 writes about its progress."""
    done = threading.Event()

    def follow() -> None:
        seen = None
        while not done.wait(POLL_SECONDS if run.place.is_local else REMOTE_SECONDS):
            try:
                text = run.progress.read_text()
            except OSError:
                continue
            if text != seen:
                seen = text
                show(Progress(**json.loads(text)))

    follower = threading.Thread(target=follow, name="progress", daemon=True)
    run.progress.unlink()
    follower.start()
    try:
        yield
    finally:
        done.set()
        follower.join()
        with suppress(OSError):
            run.progress.unlink()
