"""Towers against the models that they are of: told what a dataset says, they give the model's embeddings."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sibra_dist.config import validate
from sibra_dist.data.dataset import Csr, Dataset, Entities, open_dataset
from sibra_dist.data.presence import Hidden
from sibra_dist.exporting.towers import trace
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import Recommender
from sibra_dist.models.encoders import ID, INTERACTIONS, presence
from sibra_dist.models.towers import Given, Tower
from tests.models.cases import CASES, single_branch
from tests.planted import write_planted

WEIGHTED = {"encoders": {"interactions": {"weighting": "raw"}}}
MODEL_CASES = {
    **{name: case.model for name, case in CASES.items() if case.model["type"] not in ("pop", "random")},
    "weighted": single_branch(WEIGHTED, WEIGHTED),
}
PROGRAMS = {
    "SiBraR, with ids": "items",
    "SiBraR, maximum": "items",
    "DropoutNet": "users",
    "CLCRec, both": "items",
    "MF": "items",
    "weighted": "users",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(write_planted(tmp_path_factory.mktemp("towers") / "dataset", columns=("weights",)))


def build(case: str, dataset: Dataset) -> Recommender:
    values = MODEL_CASES[case]
    model = build_model(validate(MODELS[values["type"]][1], values, where="test"), dataset, seed=3).eval()
    with torch.no_grad():  # a bias of zeros would hide that it is missing
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def csr_rows(matrix: Csr, entities: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Entries and offsets of some rows, one after the other, empty where they are not there."""
    rows = [
        matrix.indices[matrix.indptr[row] : matrix.indptr[row + 1]].long() if shown else torch.zeros(0, dtype=torch.int64)
        for row, shown in zip(entities.tolist(), there.tolist(), strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    return torch.cat([*rows, torch.zeros(0, dtype=torch.int64)]), lengths.cumsum(0) - lengths


def tell(tower: Tower, side: Entities, entities: Tensor, hidden: Hidden) -> tuple[Tensor, Given]:
    """What the dataset says of some entities, read without any part of the models; nonsense of what is missing."""
    names = tuple(tower.inputs())
    present = torch.stack([presence(name, side)[entities] for name in names], 1) & hidden.visible(names, entities)
    given: Given = {}
    for name, there in zip(names, present.unbind(1), strict=True):
        if name == ID:
            given[name] = torch.where(there, entities, 0)
        elif name == INTERACTIONS:
            given[f"{name}.indices"], given[f"{name}.offsets"] = csr_rows(side.histories, entities, there)
            if side.weights is not None and len(tower.inputs()[name]) == 3:
                values = side.weights / side.weights.square().mean(dtype=torch.float64).sqrt()
                positions = [
                    torch.arange(int(side.histories.indptr[row]), int(side.histories.indptr[row + 1]))
                    for row in entities[there]
                ]
                given[f"{name}.values"] = values[torch.cat([*positions, torch.zeros(0, dtype=torch.int64)])].float()
        elif isinstance(values := side.features[name].values, Csr):
            given[f"{name}.indices"], given[f"{name}.offsets"] = csr_rows(values, entities, there)
        elif values.is_floating_point():
            given[name] = torch.where(there[:, None], values[entities], torch.nan)
        else:
            given[name] = torch.where(there, values[entities].long(), 0)
    return present, given


def cases(tower: Tower, side: Entities, name: str) -> Iterator[tuple[Tensor, Hidden]]:
    """All entities, one, and none; and with each modality hidden, and all."""
    everyone = torch.arange(side.count)
    which = "users" if name == "users" else "items"
    for entities in (everyone, everyone.flip(0)[:1], everyone[:0]):
        yield entities, Hidden(which)
    for shares in [{modality: 1.0} for modality in tower.inputs()] + [
        dict.fromkeys(tower.inputs(), 0.5),
        dict.fromkeys(tower.inputs(), 1.0),
    ]:
        yield everyone[:7], Hidden(which, shares)


def sides(model: Recommender, dataset: Dataset) -> Iterator[tuple[str, Tower, Entities]]:
    for name, side in (("users", dataset.users), ("items", dataset.items)):
        tower = model.tower(items=name == "items")
        assert tower is not None
        yield name, tower.eval(), side


@torch.no_grad()
@pytest.mark.parametrize("case", MODEL_CASES)
def test_a_tower_gives_the_embeddings_of_its_model(dataset: Dataset, case: str) -> None:
    model = build(case, dataset)
    for name, tower, side in sides(model, dataset):
        encode = model.encode_users if name == "users" else model.encode_items
        for entities, hidden in cases(tower, side, name):
            torch.testing.assert_close(tower(*tell(tower, side, entities, hidden)), encode(entities, hidden))


def saved(tower: Tower) -> bytes:
    content = io.BytesIO()
    torch.export.save(trace(tower), content)
    return content.getvalue()


ALONE = """
import sys
sys.modules["sibra_dist"] = None  # to import it, should it be installed, is an error
import torch
programs, told, results = sys.argv[1:]
found = []
for path, cases in zip(programs.split(","), torch.load(told)):
    program = torch.export.load(path).module()
    found.append([program(present, given) for present, given in cases])
torch.save(found, results)
"""


@torch.no_grad()
def test_programs_run_where_the_package_is_not(dataset: Dataset, tmp_path: Path) -> None:
    programs, told, expected = [], [], []
    for number, (case, name) in enumerate(PROGRAMS.items()):
        model = build(case, dataset)
        tower, side = next((tower, side) for of, tower, side in sides(model, dataset) if of == name)
        (tmp_path / f"{number}.pt2").write_bytes(saved(tower))
        programs.append(f"{number}.pt2")
        told.append([tell(tower, side, *one) for one in cases(tower, side, name)])
        encode = model.encode_users if name == "users" else model.encode_items
        expected.append([encode(*one) for one in cases(tower, side, name)])
    torch.save(told, tmp_path / "told")
    command = [sys.executable, "-I", "-c", ALONE, ",".join(programs), "told", "results"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    torch.testing.assert_close(torch.load(tmp_path / "results"), expected)


def test_a_program_has_the_same_bytes_again_and_nothing_of_the_machine(dataset: Dataset) -> None:
    tower = build("SiBraR, items", dataset).tower(items=True)
    assert tower is not None
    content = saved(tower)
    assert content == saved(tower)
    assert str(Path(__file__).parents[2]).encode() not in content
