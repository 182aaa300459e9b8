"""What is compared: models, ways of splitting, and the figures that were published."""

from typing import Literal, NamedTuple

Setting = Literal["warm", "cold items", "cold users"]
Figures = dict[Setting, dict[str, float]]


class Split(NamedTuple):
    """A way of splitting MovieLens 1M, several times."""

    protocol: str
    """`split.protocol`"""
    seeds: tuple[int, ...]
    """Each is the seed of a split, and of the training on it."""


SPLITS: dict[Setting, Split] = {
    "warm": Split("random", (0, 1, 2)),
    # The published draw of 330 items cannot be rebuilt, and draws differ by half: so more of them.
    "cold items": Split("cold_item", (0, 1, 2, 3, 4)),
    "cold users": Split("cold_user", (0, 1, 2)),
}


class Entry(NamedTuple):
    """A row of the table."""

    runs: dict[Setting, tuple[str, ...]]
    """For each setting the recipe, then what differs from it, chosen on validation."""
    published: Figures = {}
    """Test split; supplement of the SiBraR paper."""


def _everywhere(*run: str) -> dict[Setting, tuple[str, ...]]:
    return dict.fromkeys(SPLITS, run)


def _interactions_alone(*run: str, cold_users: tuple[str, ...] = ()) -> dict[Setting, tuple[str, ...]]:
    """Of cold items such a model knows nothing: all are alike to it, after one epoch as after many.

    Nor of cold users, all of whom are given one list; `cold_users` is what that takes.
    """
    return {"warm": run, "cold items": (*run, "training.epochs=1"), "cold users": (*run, *cold_users)}


def _published(warm: tuple[float, float, float, float], cold_items: tuple[float, float, float], cold_users: float) -> Figures:
    names = ("precision@10", "recall@10", "map@10", "coverage@10")
    return {
        "warm": dict(zip(names, warm, strict=True)),
        "cold items": dict(zip(names[:3], cold_items, strict=True)),
        "cold users": {"recall@10": cold_users},
    }


WHOLE_USERS = ("training.examples=users", "training.batch_size=512", "training.loss=sampled_softmax")
CONTENT = (
    "model.items.encoders.plot.input_dropout=0.5",
    "model.items.encoders.release_year={hidden_sizes: [64], activation: true}",
)
"""How features of items are encoded: the hidden units are shared by all years of release, where an embedding is of one."""
SIBRAR_WARM = (
    "sibrar-warm",
    *WHOLE_USERS,
    *CONTENT[1:],
    "model.items.draws=4",
    "training.epochs=20",
    "training.evaluate_every=4",
)
SIBRAR: dict[Setting, tuple[str, ...]] = {
    "warm": SIBRAR_WARM,
    "cold items": (
        "sibrar-cold-item",
        *WHOLE_USERS,
        *CONTENT,
        "model.items.draws=3",
        "model.items.input_dropout=0.5",
        "training.epochs=20",
        "training.evaluate_every=2",
        "training.weight_decay=3",
    ),
    # Of a cold user there is nothing but side information.
    "cold users": (*SIBRAR_WARM, "model.users.modalities=null", "training.epochs=10", "training.evaluate_every=2"),
}
SIBRAR_PUBLISHED = _published((0.1941, 0.1806, 0.0947, 0.4986), (0.2350, 0.1869, 0.1134), 0.0522)
COSINE = ("training.schedule=cosine", "training.epochs=16", "training.evaluate_every=2")
CLCREC_WARM = (
    "clcrec",
    *WHOLE_USERS,
    *CONTENT[1:],
    *COSINE,
    "model.initial_deviation=0.1",
    "model.items.replace_id=0.1",
    "model.items.contrast.weight=0.1",
    "training.learning_rate=1.0e-2",
    "training.weight_decay=0.3",
)
DROPOUTNET = ("dropoutnet", *WHOLE_USERS, *COSINE)
NO_YEAR = (
    "sibrar-cold-item",
    *WHOLE_USERS,
    *CONTENT[:1],
    "model.items.modalities=[interactions, genres, plot]",
    "model.items.draws=2",
    "model.items.input_dropout=0.5",
    "training.epochs=20",
    "training.evaluate_every=2",
    "training.weight_decay=3",
)
UNIVERSAL_WARM = (
    "universal",
    *WHOLE_USERS,
    *CONTENT[1:],
    "model.users.modalities=[interactions]",
    "model.items.draws=4",
    "training.epochs=20",
    "training.evaluate_every=4",
)
UNIVERSAL: dict[Setting, tuple[str, ...]] = {
    "warm": UNIVERSAL_WARM,
    # Of a user's modalities interactions alone are read where all users have them: that was the better on validation.
    "cold items": (
        "universal",
        *WHOLE_USERS,
        *CONTENT,
        "model.users.modalities=[interactions]",
        "model.items.draws=3",
        "model.items.input_dropout=0.3",
        "model.users.input_dropout=0.3",
        "training.weight_decay=1",
        "training.epochs=20",
        "training.evaluate_every=4",
    ),
    "cold users": (*UNIVERSAL_WARM, "model.users.modalities=null", "training.epochs=10", "training.evaluate_every=2"),
}
UNKNOWN = ("model.users.modality_dropout.interactions=0.1", "training.evaluate_every=1")
"""Training shows some users as what a cold one is, unknown; otherwise nobody is, and what stands for it is never learned."""
COBRAR = (
    *WHOLE_USERS,
    "training.learning_rate=3.0e-3",
    "training.schedule=cosine",
    "training.epochs=40",
    "training.evaluate_every=8",
)
NEUMF = (
    "training.batch_size=4096",
    "training.learning_rate=2.0e-3",
    "training.schedule=cosine",
    "training.epochs=8",
    "training.evaluate_every=2",
)
MF = (
    "mf",
    *WHOLE_USERS,
    "training.learning_rate=1.0e-2",
    "training.schedule=cosine",
    "training.weight_decay=0.3",
    "training.epochs=24",
    "training.evaluate_every=2",
    "model.regularization={}",
)

ENTRIES: dict[str, Entry] = {
    "Random": Entry(_everywhere("random")),
    "Pop": Entry(_everywhere("pop"), _published((0.1016, 0.0798, 0.0360, 0.0288), (0.0076, 0.0032, 0.0011), 0.0508)),
    "MF": Entry(_interactions_alone(*MF), _published((0.2011, 0.1806, 0.0924, 0.5156), (0.0292, 0.0152, 0.0048), 0.0520)),
    "DMF": Entry(
        _interactions_alone("dmf", *COBRAR, cold_users=(*UNKNOWN, "training.epochs=8")),
        _published((0.0989, 0.0774, 0.0312, 0.3741), (0.0090, 0.0042, 0.0012), 0.0510),
    ),
    "CoBraR": Entry(_interactions_alone("cobrar", *COBRAR, cold_users=(*UNKNOWN, "training.epochs=8"))),
    "NeuMF": Entry(_interactions_alone("neumf", *NEUMF, cold_users=(*UNKNOWN, "training.epochs=2"))),
    "NeuMF, single branch": Entry(
        _interactions_alone("neumf-single-branch", *NEUMF, cold_users=(*UNKNOWN, "training.epochs=2"))
    ),
    "DropoutNet": Entry(
        {
            "warm": (
                *DROPOUTNET,
                *CONTENT[1:],
                "model.users.modality_dropout.interactions=0.1",
                "model.items.modality_dropout.interactions=0.2",
                "training.learning_rate=2.0e-3",
                "training.weight_decay=0.1",
                "training.epochs=30",
            ),
            "cold items": (*DROPOUTNET, *CONTENT, "training.weight_decay=3", "model.users.modality_dropout.interactions=0"),
            "cold users": (*DROPOUTNET, *CONTENT[1:], "training.weight_decay=0.1"),
        },
        _published((0.1884, 0.1666, 0.0850, 0.4019), (0.1854, 0.1521, 0.0629), 0.0517),
    ),
    "CLCRec": Entry(
        {
            "warm": CLCREC_WARM,
            "cold items": (
                "clcrec",
                *WHOLE_USERS,
                *CONTENT,
                *COSINE,
                "training.weight_decay=3",
                "model.items.contrast.temperature=0.3",
            ),
            "cold users": (*CLCREC_WARM, "model.users.content=null"),
        },
        _published((0.2069, 0.1851, 0.0975, 0.4765), (0.1644, 0.1153, 0.0498), 0.0527),
    ),
    "SiBraR, one modality": Entry(
        {setting: (*run, "model.items.draws=1", "model.items.contrast=null") for setting, run in SIBRAR.items()},
        _published((0.1983, 0.1836, 0.0948, 0.5008), (0.2108, 0.1736, 0.0898), 0.0529),
    ),
    "SiBraR, best": Entry(
        SIBRAR,
        SIBRAR_PUBLISHED,
    ),
    # What the published models read, if they had no year of release: compare it with the published figures.
    "SiBraR, no year": Entry({"cold items": NO_YEAR}, SIBRAR_PUBLISHED),
    "universal": Entry(UNIVERSAL),
}
