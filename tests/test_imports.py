"""Who may import whom: the plan of the rooms, checked on the source, and that importing does no work."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sibra_dist

PACKAGE = Path(sibra_dist.__file__).parent

# A room is a folder or a module of the package. Every room may import itself and what is in EVERYWHERE.
EVERYWHERE = ("config", "errors", "phases")
ROOMS = {
    "config": ("errors",),
    "errors": (),
    "phases": (),
    "losses": (),
    "data": (),
    "encoding": ("data.manifest", "data.storage"),
    "etl": ("encoding", "data.manifest", "data.publish", "data.storage"),
    "models": ("data", "losses"),
    "evaluation": ("models", "data"),
    "training": ("evaluation", "models", "losses", "data"),
    "recommending": ("training", "evaluation", "models", "encoding", "data"),
    "exporting": ("training", "evaluation", "models", "data"),
    "description": ("data",),
    "describe": ("description", "data"),
    "catalogue": ("models", "data"),
    "report": ("training", "evaluation", "data", "describe", "description"),
    "report_groups": (),
    "report_modalities": ("report_groups",),
    "comparison": ("training", "evaluation", "data"),
    "estimate": ("training", "data"),
    "terminal": ("training", "data"),
    "loaded": ("recommending", "training", "evaluation", "models", "data"),
    "cli": ("commands", "terminal"),
    "commands": (
        *("terminal", "etl", "data", "training", "evaluation", "recommending", "exporting", "comparison"),
        *("describe", "report", "report_groups", "report_modalities", "catalogue", "estimate"),
    ),
}
ENGINES = {
    "pyspark": ("etl",),
    "ray": ("training.ray_train", "training.ray_messages", "training.ray_validation", "training.tune", "cli"),
}


def module_name(path: Path) -> str:
    """The dotted name inside the package: `etl.filters`, `etl` for its `__init__.py`, empty for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Every module that module `name` imports, at its top, in a function or for types only; `from a import b` gives `a.b`."""
    path = MODULES[name]
    package = ["sibra_dist", *name.split(".")] if name else ["sibra_dist"]
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module.split(".") if node.module else []
            if node.level:
                source = package[: len(package) - node.level + 1] + source
            yield from (".".join([*source, alias.name]) for alias in node.names)


def lies_in(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def imported_within(name: str) -> list[str]:
    """What module `name` imports of this package, without the package's name in front: `data.manifest.Shard`."""
    inside = [target.removeprefix("sibra_dist.") for target in imported(name) if lies_in(target, ("sibra_dist",))]
    return [target for target in inside if target not in ("sibra_dist", "__version__")]


def test_every_room_has_modules_and_every_module_a_room() -> None:
    for room in ("encoding", "etl", "data", "models", "training", "evaluation", "comparison", "recommending", "exporting"):
        assert [name for name in MODULES if name.startswith(f"{room}.")], f"{room} is empty"
    assert {name.split(".")[0] for name in MODULES if name} <= set(ROOMS)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_room_imports_only_those_below_it(name: str) -> None:
    room = name.split(".")[0]
    allowed = (room, *EVERYWHERE, *ROOMS[room]) if room not in EVERYWHERE else (room, *ROOMS[room])
    assert [target for target in imported_within(name) if not lies_in(target, allowed)] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_stays_in_its_place(engine: str) -> None:
    users = [name for name in MODULES if any(lies_in(target, (engine,)) for target in imported(name))]
    assert users, f"nothing imports {engine}: this test looks in the wrong place"
    assert [name for name in users if not lies_in(name, ENGINES[engine])] == []


def test_losses_need_torch_only() -> None:
    others = {target.split(".")[0] for target in imported("losses")} - sys.stdlib_module_names
    assert others <= {"torch", "sibra_dist"}


def test_significance_needs_numpy_and_scipy_only() -> None:
    others = {target.split(".")[0] for target in imported("comparison.significance")} - sys.stdlib_module_names
    assert others == {"numpy", "scipy"}


LOADED = (
    *("data", "models", "evaluation", "training.loop", "training.validation", "recommending.recommend", "recommending.score"),
    *("exporting.export", "etl.config", "report", "cli"),
)
COSTLY = ("torchmetrics", "transformers", "matplotlib", "scipy", "pandas")
"""What takes long to import, or much memory, and is needed by some processes only: those import it when they need it."""


def found_by(code: str) -> str:
    """What a new process that runs this code prints."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.mark.parametrize("module", LOADED)
def test_importing_does_no_work(module: str) -> None:
    """No thread is started, torch's random numbers are as they were, and neither an engine nor what is costly is imported."""
    code = f"""
import sys, threading
import torch
state = torch.get_rng_state()
import sibra_dist.{module}
assert torch.equal(torch.get_rng_state(), state), "drew random numbers"
assert threading.active_count() == 1, threading.enumerate()
assert not torch.cuda.is_initialized(), "woke the GPU"
print([name for name in {(*ENGINES, *COSTLY)} if name in sys.modules])
"""
    assert found_by(code) == "[]"


def test_what_starts_in_spark_workers_needs_no_torch() -> None:
    code = f"""
import sys
import sibra_dist.encoding.texts, sibra_dist.encoding.values, sibra_dist.etl.pipeline
print([name for name in {("torch", "ray", *COSTLY)} if name in sys.modules])
"""
    assert found_by(code) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_is_shown_without_what_commands_need(arguments: list[str]) -> None:
    code = f"""
import sys
from sibra_dist.cli import main
try:
    main({arguments})
except SystemExit:
    print([name for name in {("torch", "numpy", "pyarrow", *ENGINES, *COSTLY)} if name in sys.modules])
"""
    assert found_by(code).splitlines()[-1] == "[]"


def test_an_optimizer_does_not_bring_the_compiler() -> None:
    code = """
import sys, torch
from sibra_dist.training.optimizers import LazyAdamW
weight = torch.nn.Parameter(torch.ones(2))
optimizer = LazyAdamW([weight], 0.1, 0.0)
weight.sum().backward()
optimizer.step()
print(weight.tolist() != [1, 1], "torch._dynamo" in sys.modules)
"""
    assert found_by(code) == "True False"
