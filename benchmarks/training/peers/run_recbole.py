"""RecBole's BPR or DMF, with its own data loader and trainer.

    python -m benchmarks.training.peers.run_recbole --seconds S --result FILE MODEL INTERACTIONS SETTINGS

INTERACTIONS is an atomic file of RecBole, `<folder>/<name>/<name>.inter`; SETTINGS a JSON object of its settings. Runs in
RecBole's environment. All interactions are for training, and nothing is evaluated.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset
from recbole.data.utils import create_samplers, get_dataloader
from recbole.utils import InputType, get_model, get_trainer, init_seed

from benchmarks.contender import contender, tell
from benchmarks.training.pace import Pace


class Timed:
    """A data loader whose batches are timed, from one to the next, until it is enough."""

    def __init__(self, loader: Any, pace: Pace, rows_a_positive: int) -> None:
        """Watch a loader."""
        self.loader, self.pace, self.rows = loader, pace, rows_a_positive
        self.enough = False

    def __iter__(self) -> Iterator[Any]:
        self.pace.rest()
        for batch in self.loader:
            yield batch
            self.enough = self.pace.step(len(batch) // self.rows)
            if self.enough:
                return


def main() -> None:
    """Train until enough is timed."""
    parser = contender(__doc__)
    parser.add_argument("model")
    parser.add_argument("interactions", type=Path)
    parser.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    folder = arguments.interactions.parent
    settings = {
        "data_path": str(folder.parent),
        "load_col": {"inter": ["user_id", "item_id"]},
        "eval_args": {"split": {"RS": [1.0, 0.0, 0.0]}, "group_by": "none", "order": "RO", "mode": "full"},
        "use_gpu": False,
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(arguments.result.parent / "recbole"),
        **arguments.settings,
    }
    config = Config(model=arguments.model, dataset=folder.name, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    parts = dataset.build()
    sampler = create_samplers(config, dataset, parts)[0]
    loader = get_dataloader(config, "train")(config, parts[0], sampler, shuffle=config["shuffle"])
    model = get_model(config["model"])(config, parts[0])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    pace = Pace(arguments.seconds)
    negatives = config["train_neg_sample_args"]["sample_num"]
    timed = Timed(loader, pace, negatives + 1 if model.input_type == InputType.POINTWISE else negatives)
    epoch = 0
    while not timed.enough:
        trainer._train_epoch(timed, epoch)
        epoch += 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    more = {"threads": torch.get_num_threads(), "parameters": parameters, "positives": len(parts[0])}
    tell(arguments.result, pace.result() | more)


if __name__ == "__main__":
    main()
