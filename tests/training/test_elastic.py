"""Workers that come and go with the machines of a cluster: real nodes of Ray, on this machine."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from sibra_dist.data.dataset import open_dataset
from sibra_dist.errors import TrainingStopped
from sibra_dist.training import ray_train
from sibra_dist.training.launch import Workers
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.ray_train import start_ray, train_on_ray
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config

pytestmark = pytest.mark.ray
WAIT_SECONDS = 300


def test_workers_come_and_go_with_the_machines_and_see_the_same_batches(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One machine, then two, then one again, which is announced. Each step's loss is that of an undisturbed run."""
    config = make_config(
        planted,
        training__epochs=1000,
        training__patience=-1,
        training__evaluate_every=1000,
        training__resize_every=1,
        model__users__batch_norm_every=-1,
        model__items__batch_norm_every=-1,
    )
    steps, announced = tmp_path / "steps", tmp_path / "announced"
    steps.mkdir()
    original = ray_train._train_worker

    def noting(payload: dict[str, Any]) -> None:
        """Note what each step's loss was, and on how many ranks; and where it was told that a machine leaves."""
        step, save = Trainer._step, Trainer._save_checkpoint

        def noted(self: Trainer, parts: Any, number: int) -> None:
            epoch = self.position.epoch
            step(self, parts, number)
            if self.ranks.leads:
                (steps / f"{epoch:04}-{number:04}.json").write_text(json.dumps([self.ranks.world, float(self.losses[number])]))

        def saved(self: Trainer, **how: bool) -> None:
            save(self, **how)
            if self.requests._known:
                announced.touch()

        Trainer._step, Trainer._save_checkpoint = noted, saved  # type: ignore[method-assign]
        original(payload)

    def worlds() -> list[int]:
        texts = [path.read_text() for path in sorted(steps.glob("*.json"))]
        return [json.loads(text)[0] for text in texts if text]

    raised: list[Exception] = []

    def train() -> None:
        try:
            train_on_ray(run, config, Workers(1, 2))
        except Exception as error:
            raised.append(error)

    def wait_until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert training.is_alive(), raised
            assert time.monotonic() < end
            time.sleep(0.1)

    monkeypatch.setattr(ray_train, "_train_worker", noting)
    run, dataset = RunFolder(tmp_path / "run"), open_dataset(planted)
    run.create(config, dataset)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    start_ray(2)
    training = threading.Thread(target=train)
    try:
        training.start()
        wait_until(lambda: 1 in worlds())
        node = cluster.add_node(num_cpus=1)
        wait_until(lambda: 2 in worlds())
        command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address, "--node-id", node.node_id]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "wanted elsewhere"]
        subprocess.run([*command, *reason, "--deadline-remaining-seconds", "60"], capture_output=True, check=True)
        wait_until(announced.exists)
        cluster.remove_node(node)
        wait_until(lambda: worlds()[-1] == 1)
    finally:
        run.stop.write_text("")
        training.join()
        ray.shutdown()
        cluster.shutdown()
    assert [type(error) for error in raised] == [TrainingStopped]

    found = [json.loads(path.read_text()) for path in sorted(steps.glob("*.json"))]
    wanted: list[float] = []
    epochs = -(-len(found) // len({path.name[5:] for path in steps.glob("*.json")}))
    alone = RunFolder(tmp_path / "alone")
    config = config.model_copy(update={"training": config.training.model_copy(update={"epochs": epochs})})
    alone.create(config, dataset)
    Trainer(config, dataset, alone, Callbacks(stepped=lambda epoch, step, loss: wanted.append(loss))).fit()
    assert [loss for _, loss in found] == pytest.approx(wanted[: len(found)], rel=1e-2)
