"""The parts of the benchmark that are contests: which contenders, in which settings."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bench import MEMORY, Contender, Part, Ratio
from benchmarks.environments import ENVIRONMENTS, interpreter
from benchmarks.evaluation.task import FEW, SOME, write

RATE, GROWN = "users_per_second", "grown_mebibytes"
OURS = ("-m", "benchmarks.evaluation.ours")
PEERS = "benchmarks.evaluation.peers.run_"
USERS, ITEMS, MANY_ITEMS = 50_000, 20_000, 200_000
SETTINGS = {"six": "six metrics", "six-named": "six metrics", "ten": "ten metrics", "auc": "six metrics and auc"}
DIFFERENT = {
    ("ranx", "map"): "divides by the number of relevant items, ours by the smaller of it and the cutoff",
    ("ranx, by name", "map"): "likewise",
    ("torchmetrics", "map"): "divides by the number of hits among the first k, and takes no score below 0 for a hit",
    ("torchmetrics", "auc"): "puts scores through a sigmoid first, in float32, where the highest become equal",
}
"""Where a peer's definition is another one."""


@dataclass(frozen=True)
class Workshop:
    """Where tasks and environments are, which are made when they are asked for."""

    work: Path

    def task(self, users: int, items: int) -> str:
        """The file of a task."""
        return str(write(self.work / "tasks", users, items))

    def python(self, environment: str) -> str:
        """The interpreter of an environment."""
        return str(interpreter(ENVIRONMENTS[environment], self.work / "environments"))


def metrics(shop: Workshop) -> Part:
    """From scores to averages: six metrics that all have; ten, or as many as there are of these; and auc beside the six."""
    task = shop.task(USERS, ITEMS)
    ranx, recbole = shop.python("ranx"), shop.python("recbole")

    def contender(name: str, what: str, users: int, program: str, python: str | None = None) -> Contender:
        of = OURS if python is None and program == "ours" else ("-m", PEERS + program)
        named = {} if python is None else {"python": python}
        return Contender(SETTINGS[what], name, of, (what, task, str(users)), 1, **named)

    contenders = [
        contender("ours", "six", USERS, "ours"),
        contender("ours, a tenth of the users", "six", SOME, "ours"),
        contender("ranx", "six", USERS, "ranx", ranx),
        contender("ranx, by name", "six-named", SOME, "ranx", ranx),
        contender("RecBole", "six", USERS, "recbole", recbole),
        contender("torchmetrics", "six", FEW, "torchmetrics"),
        contender("ours", "ten", USERS, "ours"),
        contender("ranx", "ten", USERS, "ranx", ranx),
        contender("torchmetrics", "ten", FEW, "torchmetrics"),
        contender("ours", "auc", SOME, "ours"),
        contender("RecBole", "auc", SOME, "recbole", recbole),
        contender("torchmetrics", "auc", FEW, "torchmetrics"),
    ]
    ratios = []
    for setting in dict.fromkeys(SETTINGS.values()):
        ours = (setting, "ours")
        peers = [each for each in contenders if each.setting == setting and not each.name.startswith("ours")]
        ratios += [Ratio(f"users/s, {setting}, ours over {peer.name}", RATE, ours, peer.key, 1) for peer in peers]
        ratios += [Ratio(f"peak RSS, {setting}, ours over {peer.name}", MEMORY, ours, peer.key) for peer in peers]
    ten, recboles = (SETTINGS["ten"], "ours"), (SETTINGS["six"], "RecBole")
    ratios.append(Ratio("users/s, ours with ten metrics over RecBole with its six", RATE, ten, recboles, 1))
    few = (SETTINGS["six"], "ours, a tenth of the users")
    ratios.append(Ratio("peak RSS of ours, all users over a tenth", MEMORY, (SETTINGS["six"], "ours"), few))
    return Part(contenders, seconds=None, ratios=ratios)


def topk(shop: Workshop) -> Part:
    """From embeddings to the 100 best items of each user."""
    implicit = shop.python("implicit")
    contenders, ratios = [], []
    for users, items in ((USERS, ITEMS), (SOME, MANY_ITEMS)):
        setting, task = f"{users:,} users, {items:,} items", shop.task(users, items)
        ours = Contender(setting, "ours", OURS, ("lists", task, str(users)), 1)
        peer = Contender(setting, "implicit", ("-m", f"{PEERS}implicit"), ("lists", task, str(users)), 1, implicit)
        contenders += [ours, peer]
        ratios.append(Ratio(f"users/s, {setting}, ours over implicit", RATE, ours.key, peer.key, 1))
        ratios.append(Ratio(f"peak RSS, {setting}, ours over implicit", MEMORY, ours.key, peer.key))
    return Part(contenders, seconds=None, ratios=ratios)


CONTESTS: dict[str, Callable[[Workshop], Part]] = {"metrics": metrics, "topk": topk}
