"""The models, by name. A new one is a file with a class and its configuration, and a line in `MODELS`."""

from typing import TYPE_CHECKING, Annotated, Union

import torch
from pydantic import Field

from sibra_dist.data.dataset import Dataset
from sibra_dist.models.base import ModelConfig, Recommender
from sibra_dist.models.baselines import Pop, PopConfig, Random, RandomConfig
from sibra_dist.models.clcrec import CLCRec, CLCRecConfig
from sibra_dist.models.dropoutnet import DropoutNet, DropoutNetConfig
from sibra_dist.models.factorization import MatrixFactorization, MatrixFactorizationConfig
from sibra_dist.models.neumf import NeuMF, NeuMFConfig
from sibra_dist.models.single_branch import SingleBranch, SingleBranchConfig
from sibra_dist.models.tables import WHOLE_TABLES, TableLayout, tables_held_as

MODELS: dict[str, tuple[type[Recommender], type[ModelConfig]]] = {
    "single_branch": (SingleBranch, SingleBranchConfig),
    "mf": (MatrixFactorization, MatrixFactorizationConfig),
    "neumf": (NeuMF, NeuMFConfig),
    "dropoutnet": (DropoutNet, DropoutNetConfig),
    "clcrec": (CLCRec, CLCRecConfig),
    "pop": (Pop, PopConfig),
    "random": (Random, RandomConfig),
}

if TYPE_CHECKING:
    AnyModelConfig = ModelConfig
else:
    AnyModelConfig = Annotated[Union[tuple(config for _, config in MODELS.values())], Field(discriminator="type")]  # noqa: UP007


def build_model(config: ModelConfig, dataset: Dataset, seed: int, layout: TableLayout = WHOLE_TABLES) -> Recommender:
    """A model for a dataset, its parameters drawn from `seed`; torch's global generator is left as it was.

    Its tables are held as `layout` says; by default this process has all of each.
    """
    kind, _ = MODELS[config.type]
    with torch.random.fork_rng(devices=[]), tables_held_as(layout):
        torch.manual_seed(seed)
        return kind(config, dataset)
