"""The parts of the benchmark: which contenders, in which settings."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench import MEMORY, Contender, Part, Ratio
from benchmarks.environments import ENVIRONMENTS, interpreter
from benchmarks.experiment import Laboratory
from benchmarks.measure import sibra_dist
from sibra_dist.data.dataset import open_dataset

RATE = "positives_per_second"
BATCHES = (256, 1024, 8192)
OURS = ("-m", "benchmarks.training.ours")
DENSE = ("-m", "benchmarks.training.dense_training")
THRESHOLDS = (0.16, 0.18, 0.22, 0.24)
SEEDS = ("0", "1", "2", "3", "4")
EVALUATED_PAIRS = 4096
"""An evaluation takes a tenth of the time of a step on 8192, and twice that of one on 256."""
RECIPE = (
    *("training.learning_rate=1e-3", "training.reference_batch_size=256", "training.scale_learning_rate=sqrt"),
    "training.warmup_epochs=0.1",
)
"""Of all batch sizes alike: the learning rate grows with the square root of the batch."""


class Workshop:
    """Where datasets and environments are, which are made when they are asked for."""

    def __init__(self, data: Path, work: Path, threads: int) -> None:
        """Use the files of MovieLens 1M in `data`, and the folder `work`; every contender gets so many threads."""
        self.work, self.threads = work.resolve(), threads
        self.laboratory = Laboratory(data, self.work)

    def interactions(self) -> Path:
        """The training interactions of MovieLens 1M, as RecBole reads them."""
        path = self.work / "interactions" / "interactions.inter"
        if not path.exists():
            users = open_dataset(self.laboratory.dataset("random", 0)).users
            owners = torch.repeat_interleave(torch.arange(users.count), users.histories.lengths())
            lines = (f"{user}\t{item}\n" for user, item in zip(owners.tolist(), users.histories.indices.tolist(), strict=True))
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".part")
            scratch.write_text("".join(["user_id:token\titem_id:token\n", *lines]))
            scratch.rename(path)
        return path

    def synthetic(self) -> Path:
        """200,000 users, 100,000 items, 20 million interactions."""
        folder = self.work / "datasets" / "synthetic"
        asked: dict[str, int | str] = {"users": 200_000, "items": 100_000, "interactions": 20_000_000, "evaluated-users": 1000}
        asked |= {"user-features": "none", "item-features": "tags,vector", "missing": 0, "vector-size": 384}
        if not (folder / "manifest.json").exists():
            options = [f"--{option}={value}" for option, value in asked.items()]
            sibra_dist("synthesize", *options, "--to", str(folder), log=folder.with_suffix(".log"))
        return folder


def engine(shop: Workshop) -> Part:
    """SiBraR as it was published, on the shape of MovieLens 1M, ours and dense."""
    return _engine(shop, "model.exclude_target=false", (3, None, 10))


def excluding(shop: Workshop) -> Part:
    """Likewise as the recipe has it, which leaves the pair that is asked for out of the rows."""
    return _engine(shop, "model.exclude_target=true", (None, None, None))


def _engine(shop: Workshop, setting_of_all: str, targets: tuple[float | None, ...]) -> Part:
    dataset = shop.laboratory.dataset("random", 0)
    contenders, ratios = [], []
    for batch, target in zip(BATCHES, targets, strict=True):
        setting = f"batch {batch}"
        arguments = (*_sibrar(dataset, ("interactions", "genres", "plot"), batch), setting_of_all)
        contenders += [
            Contender(setting, name, program, arguments, shop.threads) for name, program in (("ours", OURS), ("dense", DENSE))
        ]
        ratios.append(Ratio(f"positives/s, {setting}, ours over dense", RATE, (setting, "ours"), (setting, "dense"), target))
        ratios.append(Ratio(f"peak RSS, {setting}, ours over dense", MEMORY, (setting, "ours"), (setting, "dense")))
    return Part(contenders, ratios=ratios)


def scale(shop: Workshop) -> Part:
    """SiBraR on 200,000 users, 100,000 items and 20 million interactions, ours and dense."""
    data, modalities = shop.synthetic(), ("interactions", "tags", "vector")
    dense = ((1024, 1), (2816, 1))  # in the second it needs some 20 GB
    ours = ((256, 1), (1024, 1), (8192, 1), (8192, 16), (16_384, 32), (32_768, 1), (32_768, 64))
    contenders = [
        Contender(
            f"batch {batch}" if parts == 1 else f"batch {batch} in {parts} parts",
            name,
            program,
            (*_sibrar(data, modalities, batch), "model.exclude_target=false", f"training.accumulate={parts}"),
            shop.threads,
        )
        for name, program, settings in (("dense", DENSE, dense), ("ours", OURS, ours))
        for batch, parts in settings
    ]
    *_, largest = (contender.key for contender in contenders if contender.name == "dense")
    ratios = [
        Ratio(f"{what}, ours at {ours.setting} over dense at {largest[0]}", figure, ours.key, largest, target)
        for what, figure, target in (("positives/s", RATE, 50), ("peak RSS", MEMORY, 0.1))
        for ours in contenders
        if ours.name == "ours"
    ]
    return Part(contenders, repeats=1, seconds=10, ratios=ratios)


def peers(shop: Workshop) -> Part:
    """DMF and matrix factorization on MovieLens 1M, ours and other libraries'."""
    dataset, interactions = shop.laboratory.dataset("random", 0), str(shop.interactions())
    of = {name: str(interpreter(ENVIRONMENTS[name], shop.work / "environments")) for name in ("recbole", "implicit", "cornac")}
    size, batch, negatives = 64, 2048, 4
    sides = [f"model.{side}.{key}" for side in ("users", "items") for key in (f"input_size={size}", f"hidden_sizes=[{size}]")]
    ours = ("training.batch_size=2048", f"dataset={dataset}")
    dmf = ("dmf", *ours, f"model.embedding_size={size}", f"training.negatives={negatives}", *sides)
    # As RecBole's BPR is: embeddings and nothing else.
    plain = ("model.item_bias=false", "model.regularization={users: 0, positives: 0, negatives: 0, bias: 0}")
    mf = ("mf", *ours, f"model.embedding_size={size}", "training.negatives=1", *plain)
    recbole = ("-m", "benchmarks.training.peers.run_recbole")
    draws = {"distribution": "uniform", "alpha": 1.0, "dynamic": False, "candidate_num": 0}
    hidden = {f"{side}_{key}": value for side in ("user", "item") for key, value in _dmf_sizes(size).items()}
    # RecBole counts rows, of which a positive and its negatives are as many as they are.
    rows = {"train_batch_size": batch * (1 + negatives), "train_neg_sample_args": {**draws, "sample_num": negatives}}
    bpr = {"train_batch_size": batch, "embedding_size": size, "train_neg_sample_args": {**draws, "sample_num": 1}}
    contenders = [
        Contender("DMF", "ours", OURS, dmf, shop.threads),
        Contender("DMF", "RecBole", recbole, ("DMF", interactions, json.dumps(hidden | rows)), shop.threads, of["recbole"]),
        Contender("MF", "ours", OURS, mf, shop.threads),
        Contender("MF", "RecBole", recbole, ("BPR", interactions, json.dumps(bpr)), shop.threads, of["recbole"]),
    ]
    for library in ("implicit", "cornac"):
        arguments = (library, interactions, str(size), str(shop.threads))
        program = ("-m", "benchmarks.training.peers.run_sgd")
        contenders.append(Contender("MF", library, program, arguments, shop.threads, of[library]))
    ratios = [
        Ratio(f"{model}: positives/s, ours over {name}", RATE, (model, "ours"), (model, name), target)
        for model, name, target in (
            ("DMF", "RecBole", 10),
            ("MF", "RecBole", 1),
            ("MF", "implicit", None),
            ("MF", "cornac", None),
        )
    ]
    return Part(contenders, ratios=ratios)


def workers(shop: Workshop) -> Part:
    """SiBraR on one process, and on two with a core each; one thread for a process."""
    films = _sibrar(shop.laboratory.dataset("random", 0), ("interactions", "genres", "plot"), 2048)
    large = *_sibrar(shop.synthetic(), ("interactions", "tags", "vector"), 8192), "model.exclude_target=false"
    divided = "training.interaction_table=row_sharded"
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *OURS)
    contenders, ratios = [], []
    for setting, arguments, of_two in (
        ("MovieLens 1M, batch 2048", films, ()),
        ("MovieLens 1M, batch 8192", (*films, "training.batch_size=8192"), ()),
        ("200,000 users, batch 8192, tables divided", large, (divided,)),
    ):
        one = Contender(setting, "1 process", OURS, ("--pin", *arguments), 1)
        both = Contender(setting, "2 processes", two, ("--pin", *arguments, *of_two), 1)
        contenders += [one, both]
        ratios.append(Ratio(f"positives/s, {setting}, 2 over 1", RATE, both.key, one.key, 1.5))
    return Part(contenders, ratios=ratios)


def quality(shop: Workshop) -> Part:
    """Time to validation ndcg@10 of cold items, by batch size."""
    dataset = shop.laboratory.dataset("cold_item", 0)
    common = ("training.schedule=constant", "training.patience=-1", "training.epochs=1")
    contenders = []
    for batch in BATCHES:
        often = f"training.evaluate_every_steps={max(EVALUATED_PAIRS // batch, 1)}"
        settings = (f"dataset={dataset}", f"training.batch_size={batch}", often, *common, *RECIPE)
        arguments = ("--thresholds", *map(str, THRESHOLDS), "--seeds", *SEEDS, "--", "sibrar-cold-item", *settings)
        contenders.append(Contender(f"batch {batch}", "ours", ("-m", "benchmarks.training.quality"), arguments, shop.threads))
    return Part(contenders, repeats=1)


def _sibrar(dataset: Path, modalities: tuple[str, ...], batch: int) -> tuple[str, ...]:
    chosen = f"model.items.modalities=[{', '.join(modalities)}]"
    return "sibrar-cold-item", f"dataset={dataset}", chosen, f"training.batch_size={batch}"


def _dmf_sizes(size: int) -> dict[str, object]:
    return {"embedding_size": size, "hidden_size_list": [size, size]}


PARTS: dict[str, Callable[[Workshop], Part]] = {
    "engine": engine,
    "excluding": excluding,
    "peers": peers,
    "scale": scale,
    "workers": workers,
    "quality": quality,
}
