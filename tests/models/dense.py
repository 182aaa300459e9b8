"""What networks over encodings side by side compute, densely in float64 and one entity at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sibra_dist.data.dataset import Csr, Dataset
from sibra_dist.models.concatenation import Concatenation


def encoding(side: Concatenation, dataset: Dataset, name: str, entity: int) -> Tensor:
    """f_m(x_m(e)), from the dataset and the parameters alone; interactions are linear."""
    users = side.encoders.side == "users"
    entities, others = (dataset.users, dataset.items) if users else (dataset.items, dataset.users)
    encoder = side.encoders.encoders[name]
    if name == "interactions":
        row = torch.zeros(others.count, dtype=torch.float64)
        row[entities.histories.gather(torch.tensor([entity]))[0].long()] = 1
        return row @ encoder.table.weight + encoder.bias
    values = entities.features[name].values
    if isinstance(values, Csr):
        row = F.one_hot(values.gather(torch.tensor([entity]))[0].long(), entities.features[name].spec.size).double().sum(0)
        return row @ encoder.embedding.weight
    if entities.features[name].spec.kind == "category":
        return F.one_hot(values[entity].long(), entities.features[name].spec.size).double() @ encoder.embedding.weight
    return torch.relu(encoder.linear.weight @ values[entity].double() + encoder.linear.bias)


def network(side: Concatenation, dataset: Dataset, entity: int, seen: list[str], width: int) -> Tensor:
    """linear, ReLU, ..., linear of all encodings side by side, zeros for what is not seen."""
    parts = [
        encoding(side, dataset, name, entity) if name in seen else torch.zeros(width, dtype=torch.float64)
        for name in side.encoders.modalities
    ]
    hidden = torch.cat(parts)
    *layers, last = (layer for layer in side.network.layers if isinstance(layer, torch.nn.Linear))
    for layer in layers:
        hidden = torch.relu(layer.weight @ hidden + layer.bias)
    return last.weight @ hidden + last.bias


def seen_names(names: tuple[str, ...], drawn: Tensor) -> list[str]:
    """The names of drawn modalities, int64 [D]."""
    return [names[number] for number in drawn.tolist() if 0 <= number < len(names)]
