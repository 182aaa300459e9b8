"""Small configurations of every model for the contract in `test_models.py`, and what it takes to train and judge one."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sibra_dist.config import validate
from sibra_dist.data.dataset import Dataset
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.loop import Trainer
from sibra_dist.training.progress import Callbacks
from sibra_dist.training.run_folder import RunFolder
from tests.planted import GROUPS

TRAINING = {"batch_size": 128, "negatives": 5, "epochs": 12, "evaluate_every": 12, "learning_rate": 0.01, "device": "cpu"}
ALL_LOSSES = ("bpr", "bce", "sampled_softmax")


class Case(NamedTuple):
    model: dict[str, Any]
    learns: tuple[str, ...] = ("random",)
    """Protocols under which it can tell whom it ranks, and what, apart."""
    losses: tuple[str, ...] = ("bpr",)
    training: dict[str, Any] = {}


INTERACTIONS = ["interactions"]
SIDE = {"input_size": 16, "hidden_sizes": [16, 16]}
LINEAR = {
    "modalities": INTERACTIONS,
    "input_size": 32,
    "hidden_sizes": [],
    "normalize_input": False,
    "batch_norm_every": -1,
    "output_activation": False,
}
IDS = {**LINEAR, "modalities": ["id"], "input_size": 16, "hidden_sizes": None, "input_dropout": 0.0}
CONTRAST = {"weight": 1e-3, "temperature": 0.2}
NETWORK = {"input_size": 16, "hidden_sizes": [16], "input_dropout": 0.1}
# Contents that are alike in all of a group cannot be told apart: the contrast must not outweigh the scores.
CONTENT = {**NETWORK, "content": None, "contrast": {"weight": 0.01, "temperature": 0.2}}
LONGER = {"epochs": 16, "evaluate_every": 16}
REGULARIZATION = {"users": 0.01, "positives": 0.01, "negatives": 0.01, "bias": 0.001}

BOTH_COLD = ("random", "cold_item", "cold_user")


def single_branch(users: dict[str, Any], items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    sides = {"users": {**SIDE, **users}, "items": {**SIDE, **items}}
    return {"type": "single_branch", "embedding_size": 32, **sides, **changes}


def neumf(side: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "type": "neumf",
        "embedding_size": 16,
        "gmf_size": 8,
        "mlp_hidden_sizes": [16, 8],
        "users": side,
        "items": side,
        **changes,
    }


def clcrec(**sides: Any) -> dict[str, Any]:
    return {"type": "clcrec", "embedding_size": 16, **sides}


TWO = {"draws": 2, "contrast": CONTRAST}
CASES: dict[str, Case] = {
    "SiBraR, items": Case(
        single_branch({"modalities": INTERACTIONS}, TWO, exclude_target=True),
        ("random", "cold_item"),
        ("bpr", "sampled_softmax"),
    ),
    "SiBraR, users": Case(single_branch(TWO, {"modalities": INTERACTIONS}), ("random", "cold_user")),
    "SiBraR, both": Case(single_branch(TWO, {**TWO, "encoders": {"cover": {"input_dropout": 0.2}}}), BOTH_COLD),
    "SiBraR, central": Case(
        single_branch({"modalities": INTERACTIONS}, {**TWO, "contrast": {**CONTRAST, "central": "interactions"}}),
        ("cold_item",),
    ),
    "SiBraR, one drawn": Case(single_branch({}, {})),
    "SiBraR, all drawn": Case(single_branch({}, {"draws": "all", "modality_dropout": {"interactions": 0.5}}), ("cold_item",)),
    "SiBraR, maximum": Case(single_branch({}, {"draws": 2, "aggregation": "max"}), ("cold_item",)),
    "SiBraR, with ids": Case(
        single_branch({}, {"modalities": ["id", "interactions", "tags", "cover"]}), ("random", "cold_item")
    ),
    "SiBraR, capped histories": Case(
        single_branch({"modalities": INTERACTIONS, "encoders": {"interactions": {"max_history": 4}}}, {}, exclude_target=True),
        ("cold_item",),
    ),
    "CoBraR, cosine": Case(single_branch(LINEAR, LINEAR, share_branch=True, score="cosine"), losses=("bce",)),
    "CoBraR, dot": Case(single_branch(LINEAR, LINEAR, share_branch=True), losses=ALL_LOSSES),
    "DMF": Case(single_branch(LINEAR, LINEAR, score="cosine"), losses=("bce",)),
    "universal": Case(single_branch(TWO, TWO, share_branch=True), ("cold_item", "cold_user")),
    "MF": Case({"type": "mf", "embedding_size": 16, "regularization": REGULARIZATION}, losses=ALL_LOSSES, training=LONGER),
    "MF, without bias": Case({"type": "mf", "embedding_size": 16, "item_bias": False, "regularization": REGULARIZATION}),
    "MF, without regularization": Case({"type": "mf", "embedding_size": 8}),
    "NeuMF": Case(neumf(LINEAR), losses=ALL_LOSSES),
    "NeuMF, single branch": Case(neumf(LINEAR, share_branch=True), losses=("bce",)),
    "NeuMF, ids": Case(neumf(IDS), losses=("bce",), training={**LONGER, "weight_decay": 0.3}),
    "DropoutNet": Case({"type": "dropoutnet", "embedding_size": 16, "users": NETWORK, "items": NETWORK}, BOTH_COLD, ALL_LOSSES),
    "CLCRec, items": Case(clcrec(users={}, items=CONTENT), ("random", "cold_item"), ALL_LOSSES),
    "CLCRec, users": Case(clcrec(users=CONTENT, items={"content": []}), ("random", "cold_user")),
    "CLCRec, both": Case(clcrec(users=CONTENT, items=CONTENT), BOTH_COLD),
    "Pop": Case({"type": "pop"}, ()),
    "Random": Case({"type": "random", "seed": 3}, ()),
}
# With examples that are users; one of every model that trains.
WHOLE_USERS = {
    "SiBraR, items": "sampled_softmax",
    "CoBraR, dot": "sampled_softmax",
    "MF": "sampled_softmax",
    "NeuMF": "sampled_softmax",
    "DropoutNet": "sampled_softmax",
    "CLCRec, items": "bce",
}
LONG = {"epochs": 20, "evaluate_every": 20}
TRAINED = [name for name, case in CASES.items() if case.learns]


def with_side_keys(model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration with keys of both sides changed, where the model's sides have them."""
    fields = MODELS[model["type"]][1].model_fields
    changed = dict(model)
    for side in ("users", "items"):
        if side in fields:
            known = fields[side].annotation.model_fields
            changed[side] = {**model.get(side, {}), **{key: value for key, value in changes.items() if key in known}}
    return changed


def build(plain: dict[str, Any], dataset: Dataset, seed: int = 0) -> Recommender:
    config = validate(TrainConfig, {"dataset": "here", "model": plain}, where="test")
    return build_model(config.model, dataset, seed)


def all_scores(model: Recommender, dataset: Dataset) -> Tensor:
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    return model.score(model.encode_users(users), model.encode_items(items))


def train(plain: dict[str, Any], dataset: Dataset, folder: Path, **training: Any) -> tuple[Recommender, list[float]]:
    """Train as `sibra-dist train` does in one process: the model, and the loss of each step."""
    values = {"dataset": str(dataset.place), "model": plain, "training": {**TRAINING, **training}}
    config = validate(TrainConfig, values, where="test")
    run = RunFolder(folder)
    run.create(config, dataset)
    losses: list[float] = []
    trainer = Trainer(config, dataset, run, Callbacks(stepped=lambda epoch, step, loss: losses.append(loss)))
    trainer.fit()
    return trainer.model.eval(), losses


def told_apart(model: Recommender, dataset: Dataset) -> float:
    """How often an item of the user's own group goes before one of another, ties counted half, where neither was trained on.

    The planted structure is that of the groups: users like any item of their own, so the optimum is 1, and chance 1/2.
    Cold users and items are judged alone, and only if a feature tells their group.
    """
    users, items = (torch.arange(side.count) for side in (dataset.users, dataset.items))
    if dataset.manifest.protocol.cold_items:
        known = torch.stack([feature.present for feature in dataset.items.features.values()]).any(0)
        items = items[(dataset.items.split != 0) & known]
    if dataset.manifest.protocol.cold_users:
        users = users[(dataset.users.split != 0) & dataset.users.features["club"].present]
    scores = model.score(model.encode_users(users), model.encode_items(items))
    shares = []
    for row, user in enumerate(users.tolist()):
        seen = dataset.users.histories.gather(torch.tensor([user]))[0]
        unseen = ~torch.isin(items, seen)
        own = items % GROUPS == user % GROUPS
        first, second = scores[row, own & unseen][:, None], scores[row, ~own & unseen]
        shares.append(((first > second).double() + 0.5 * (first == second)).mean())
    return float(torch.stack(shares).nanmean())
