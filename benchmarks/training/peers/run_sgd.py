"""BPR of implicit or Cornac: stochastic gradient descent in compiled code, a positive at a time.

    python -m benchmarks.training.peers.run_sgd --seconds S --result FILE LIBRARY INTERACTIONS SIZE THREADS

Runs in the library's environment. Neither tells how long its epochs take, so trainings of few and of more epochs are compared:
what comes before the first epoch drops out.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.contender import contender, rates, tell

Fit = Callable[[int], None]
"""Trains for so many epochs from the beginning."""
Pairs = npt.NDArray[np.int64]


def implicit(pairs: Pairs, size: int, threads: int) -> Fit:
    """implicit: hogwild, in C++."""
    from implicit.cpu.bpr import BayesianPersonalizedRanking
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(pairs), np.float32), (pairs[:, 0], pairs[:, 1])))

    def fit(epochs: int) -> None:
        model = BayesianPersonalizedRanking(factors=size, iterations=epochs, num_threads=threads, random_state=0)
        model.fit(matrix, show_progress=False)

    return fit


def cornac(pairs: Pairs, size: int, threads: int) -> Fit:
    """Cornac: likewise, in Cython."""
    from cornac.data import Dataset
    from cornac.models import BPR

    dataset = Dataset.from_uir([(user, item, 1.0) for user, item in pairs.tolist()])

    def fit(epochs: int) -> None:
        BPR(k=size, max_iter=epochs, num_threads=threads, seed=0).fit(dataset)

    return fit


LIBRARIES: dict[str, Callable[[Pairs, int, int], Fit]] = {"implicit": implicit, "cornac": cornac}


def timed(fit: Fit, epochs: int) -> tuple[float, float]:
    """Seconds of the clock, and of processors."""
    wall, processor = time.perf_counter(), time.process_time()
    fit(epochs)
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Train for one epoch, and for so many more that they take long enough."""
    parser = contender(__doc__)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("interactions", type=Path)
    parser.add_argument("size", type=int)
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    pairs: Pairs = np.loadtxt(arguments.interactions, dtype=np.int64, skiprows=1)
    fit = LIBRARIES[arguments.library](pairs, arguments.size, arguments.threads)
    fit(1)  # loads and warms what there is to
    one = timed(fit, 1)
    epochs = 2
    while (several := timed(fit, 1 + epochs))[0] - one[0] < arguments.seconds:
        epochs *= 2
    told = rates("positives", epochs * len(pairs), several[0] - one[0], several[1] - one[1])
    tell(arguments.result, told | {"threads": arguments.threads, "positives": len(pairs)})


if __name__ == "__main__":
    main()
