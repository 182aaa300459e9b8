"""implicit's best items of a model that is given.

    python -m benchmarks.evaluation.peers.run_implicit --result FILE lists TASK USERS

Runs in implicit's environment.
"""

import numpy as np
from implicit.cpu.matrix_factorization_base import MatrixFactorizationBase

from benchmarks.contender import tell
from benchmarks.evaluation.task import LONGEST, Clock, Task, parse, told


class Given(MatrixFactorizationBase):  # type: ignore[misc]
    """A model that is not fitted, with factors from elsewhere."""

    def __init__(self, task: Task) -> None:
        """Use the embeddings of a task."""
        super().__init__(num_threads=1)
        self.user_factors, self.item_factors = task.users, task.items

    def fit(self, *_: object) -> None:
        """There is nothing to fit."""

    def save(self, *_: object) -> None:
        """There is nothing to save."""


def best(task: Task) -> tuple[Clock, float]:
    """The best items of every user, all users at once; their mean score."""
    model = Given(task)
    clock = Clock()
    _, scores = model.recommend(np.arange(len(task.users)), None, N=LONGEST, filter_already_liked_items=False)
    return clock, float(scores.mean(dtype=np.float64))


def main() -> None:
    """List the best."""
    arguments, task = parse(__doc__, "lists")
    best(task.first(1))
    clock, mean = best(task)
    tell(arguments.result, told(arguments, clock.result(len(task.users)), {"mean score": mean}))


if __name__ == "__main__":
    main()
