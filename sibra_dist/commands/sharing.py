"""How a command has something done to a run: by this process, by those that were started with it, or by Ray workers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from sibra_dist.errors import ConfigError
from sibra_dist.terminal import counting

if TYPE_CHECKING:
    from sibra_dist.training.config import TrainConfig
    from sibra_dist.training.run_folder import RunFolder

Act = Callable[..., object]


def share(
    run: "RunFolder", settings: "TrainConfig", act: Act, workers: int, doing: tuple[str, str], away: Act | None = None
) -> bool:
    """Have ranks do something together; whether this process is the one that tells of it.

    Args:
        run: what it is done to.
        settings: the run's configuration.
        act: called as `act(run, progress=show)`, or by Ray workers as `act(run, device=device)`.
        workers: Ray workers; 0 for this process and those that were started with it.
        doing: what is shown of progress: `evaluating`, `users`. Ray workers show none.
        away: what Ray workers call instead, as their working folder is another.

    Raises:
        ConfigError: Ray workers are asked for by one of several processes.
    """
    from sibra_dist.training.launch import process_group

    with (
        process_group(settings.training) as ranks,
        counting(*doing) if ranks.leads else nullcontext(lambda done, total: None) as show,
    ):
        if workers == 0:
            act(run, progress=show)
        elif ranks.world > 1:
            raise ConfigError("--workers starts workers with Ray, and these processes were started already: leave it out")
        else:
            from sibra_dist.training.ray_train import share_on_ray

            share_on_ray(run, settings, away or act, workers)
    return ranks.leads
