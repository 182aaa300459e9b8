"""What the parts of a step share, on whole models."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sibra_dist.data.dataset import open_dataset
from sibra_dist.models import build_model
from sibra_dist.models.sharing import summed_together
from sibra_dist.models.tables import Table
from sibra_dist.training.batching import make_batches
from sibra_dist.training.loop import Trainer
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.reading import read_step
from sibra_dist.training.run_folder import RunFolder
from tests.training.conftest import make_config


@pytest.mark.parametrize("exclude", [False, True])
def test_each_table_is_summed_once_in_a_step_of_many_parts(
    planted: Path, monkeypatch: pytest.MonkeyPatch, exclude: bool
) -> None:
    """And what parts take of the sums is what each would have summed for itself."""
    config = make_config(planted, training__accumulate=4, model__exclude_target=exclude)
    dataset = open_dataset(planted)
    model = build_model(config.model, dataset, 0)
    batches = make_batches(config, dataset, model, Ranks())
    calls: Counter[Any] = Counter()
    summed = Table.bag_sum

    def counted(table: Table, bags: Any) -> Tensor:
        calls[table] += 1
        return summed(table, bags)

    step = read_step(batches, model, 0, 0, 4, together=True)
    assert len(step.parts) == 4
    alone = [model.step(part.batch, model.read(part.batch)).scores for part in step.parts]
    monkeypatch.setattr(Table, "bag_sum", counted)
    with summed_together(step.together):
        for part, expected in zip(step.parts, alone, strict=True):
            scores = model.step(*part).scores
            torch.testing.assert_close(scores, expected)
            scores.sum().backward()
    assert set(calls.values()) == {1}
    assert len(calls) == 2


@pytest.mark.parametrize(("pool", "shares"), [(None, True), (8, False)])
def test_parts_of_a_pool_share_nothing(planted: Path, tmp_path: Path, pool: int | None, shares: bool) -> None:
    """Rows of candidates that are not trained on have no gradient, and lazy updates do not touch them."""
    config = make_config(planted, training__accumulate=2, training__sampler={"pool": pool}, training__table_updates="lazy")
    trainer = Trainer(config, open_dataset(planted), RunFolder(tmp_path / "run"))
    assert bool(next(trainer.reader.epoch(0, 0)).together) == shares
