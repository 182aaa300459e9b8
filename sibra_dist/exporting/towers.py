"""Towers as programs of torch.export, which run with torch alone."""

import io
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from sibra_dist.data.manifest import Side
from sibra_dist.data.storage import Place
from sibra_dist.exporting.folder import write_file
from sibra_dist.exporting.manifest import TowerInput, TowerProgram
from sibra_dist.models.encoder import Input
from sibra_dist.models.towers import Given, Tower

EXAMPLES = {"n": 3, "entries": 5}
"""Sizes to trace with. They differ from each other and from 0 and 1, which a trace would take for special."""
# Where in the sources of this package, and in what modules, each step of a program was: paths of the machine that made it.
ORIGINS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def write_tower(place: Place, side: Side, tower: Tower) -> TowerProgram:
    """Write a tower, whose parameters are on the CPU, as `towers/<side>.pt2`; `OSError` if it cannot be written."""
    content = io.BytesIO()
    torch.export.save(trace(tower), content)
    told = tower.inputs()
    return TowerProgram(
        file=write_file(place, f"towers/{side}.pt2", [content.getbuffer()]),
        modalities=tuple(told),
        inputs=tuple(_described(modality, one) for modality, one in _each(told)),
    )


def trace(tower: Tower) -> ExportedProgram:
    """The program of a tower, for any number of entities and of entries of their lists."""
    tower.eval().requires_grad_(False)  # so that what it gives has no gradient either
    told = tower.inputs()
    present = torch.ones(EXAMPLES["n"], len(told), dtype=torch.bool)
    sizes = {"n": Dim("n"), **{modality: Dim(f"entries{number}") for number, modality in enumerate(told)}}
    given: Given = {}
    dynamic: dict[str, dict[int, object]] = {}
    for modality, one in _each(told):
        name = f"{modality}{one.suffix}"
        given[name] = _example(one)
        dynamic[name] = {0: sizes["n"] if one.shape[0] == "n" else sizes[modality]}
    with torch.no_grad():
        program = torch.export.export(tower, (present, given), dynamic_shapes=({0: sizes["n"]}, dynamic))
    for node in program.graph.nodes:
        for origin in ORIGINS:
            node.meta.pop(origin, None)
    return program


def _example(one: Input) -> Tensor:
    return torch.zeros([EXAMPLES[size] if isinstance(size, str) else size for size in one.shape], dtype=one.dtype)


def _each(told: dict[str, tuple[Input, ...]]) -> Iterator[tuple[str, Input]]:
    for modality, inputs in told.items():
        for one in inputs:
            yield modality, one


def _described(modality: str, one: Input) -> TowerInput:
    return TowerInput(
        name=f"{modality}{one.suffix}",
        modality=modality,
        dtype=str(one.dtype).removeprefix("torch."),
        shape=one.shape,
        meaning=one.meaning,
        bound=one.bound,
    )
