"""SiBRA-Dist: a distributed trainer for single-branch recommender models."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sibra_dist.loaded import load_run

__all__ = ["__version__", "load_run"]


def __getattr__(name: str) -> object:
    """`load_run`, imported when it is first asked for: the package itself loads nothing."""
    if name == "load_run":
        from sibra_dist.loaded import load_run

        return load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
