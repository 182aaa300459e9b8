"""What a configuration asks of a dataset and a model, checked before anything is written."""

import torch

from sibra_dist.data.batches import ModalitySampling, label_weights
from sibra_dist.data.dataset import Dataset
from sibra_dist.data.presence import Hidden, parse_hide
from sibra_dist.models.base import Recommender
from sibra_dist.training.config import TrainConfig


def require_served(config: TrainConfig, dataset: Dataset, model: Recommender) -> None:
    """Check that the dataset has the labels, and the model the modalities, that the configuration names.

    Raises:
        ConfigError: one is not there.
    """
    if config.training.labels == "weights":
        label_weights(dataset)
    _hidden_in_training(config, model)
    parse_hide(config.evaluation.hide, model.modalities(), config.seed, "evaluation.hide")


def visible_sampling(config: TrainConfig, model: Recommender) -> tuple[ModalitySampling, ModalitySampling]:
    """How a model draws modalities of users and of items in training, from what is there and not hidden."""
    hidden, names, drawn = _hidden_in_training(config, model), model.modalities(), model.sampling()
    users, items = (_visible(drawn[side], names[side], hidden[side]) for side in range(2))
    return users, items


def _hidden_in_training(config: TrainConfig, model: Recommender) -> tuple[Hidden, Hidden]:
    return parse_hide(config.training.hide, model.modalities(), config.seed, "training.hide")


def _visible(drawn: ModalitySampling, names: tuple[str, ...], hidden: Hidden) -> ModalitySampling:
    entities = torch.arange(len(drawn.present), device=drawn.present.device)
    return drawn._replace(present=drawn.present & hidden.visible(names, entities))
