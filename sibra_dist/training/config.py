"""What `sibra-dist train`, `evaluate` and `tune` are told."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sibra_dist.config import Config
from sibra_dist.data.batches import Labels
from sibra_dist.data.negatives import SamplerConfig
from sibra_dist.data.presence import Shares
from sibra_dist.errors import ConfigError, nearest
from sibra_dist.evaluation.config import EvaluationConfig
from sibra_dist.evaluation.metrics import USER_METRICS, split_metrics
from sibra_dist.losses import LOSSES, POOL_LOSSES
from sibra_dist.models import AnyModelConfig

Positive = Annotated[int, Field(ge=1)]


class TrainingConfig(Config):
    """How the model is optimised."""

    examples: Literal["pairs", "users"] = "pairs"
    """`pairs`: an example is a training interaction, with negatives of its own. `users`: it is a user; a step shows a share of
    all interactions to the encoders and asks for the others, against one pool of items."""
    batch_size: Positive = 2048
    """Examples in a global batch, which the ranks share."""
    shown_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Of the interactions, what a step shows; for examples that are users."""
    item_pool: Positive | None = None
    """Training items in a step, drawn anew in each; null: all of them. For examples that are users."""
    negatives: Positive = 10
    """Negatives for every positive: training items that the user has not interacted with."""
    sampler: SamplerConfig = SamplerConfig()
    """How negatives are drawn."""
    loss: str = "bpr"
    labels: Labels = "binary"
    """Of the positives, for the loss `bce`: 1, or with `weights` the interaction's weight over the largest of all."""
    hide: Shares = {}
    """Share of the entities from which a modality is hidden in training, by name: `items.genres: 0.25`."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    scale_learning_rate: Literal["none", "sqrt", "linear"] = "none"
    """How the learning rate grows with the batch: `learning_rate` is meant for `reference_batch_size`, and is multiplied by the
    ratio of `batch_size` to it, or by its square root, which suits Adam (Malladi et al. 2022)."""
    reference_batch_size: Positive = 256
    """The batch that `learning_rate` is meant for, where it is scaled."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`cosine`: the learning rate falls to 0 over `epochs` along half a cosine (Loshchilov and Hutter 2017)."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs, or a fraction of one, over which the learning rate first grows in a straight line from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's (Loshchilov and Hutter 2019)."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """The gradient of a step is scaled down to this length where it is longer; null: never."""
    accumulate: Positive = 1
    """Parts that each rank computes its share of a step in, one after the other, so that activations need the memory of one.
    Histories that several parts read are summed once. The step is what as many more ranks would make of it, but that the
    contrast of users sees a part at a time."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16`: products of matrices in that type (automatic mixed precision); parameters and their sums stay float32."""
    interaction_table: Literal["replicated", "row_sharded"] = "replicated"
    """Of interactions and ids, with a row for each user or item. `replicated`: each rank holds all rows. `row_sharded`: each
    holds an equal share of them, with their optimizer state, and asks the others for what it reads."""
    table_updates: Literal["dense", "lazy"] = "dense"
    """`lazy`: of these tables a step updates only the rows that it touches, and the others neither decay nor move on with their
    momentum: see `sibra_dist.training.optimizers.LazyAdamW`. Its cost does not grow with the table."""
    compile: bool = False
    """Whether torch.compile fuses the layers of the branches. Pays where they are wide; the first steps wait for it."""
    epochs: Annotated[int, Field(ge=0)] = 50
    """At most so many."""
    evaluate_every: Positive = 1
    """Epochs between two evaluations on the validation split."""
    evaluate_every_steps: Positive | None = None
    """Steps between two evaluations, where epochs are too long to wait for; `evaluate_every` is not read then."""
    evaluate_on: Literal["ranks", "apart"] = "ranks"
    """`ranks`: training waits while all ranks evaluate. `apart`: a further process, or worker, evaluates while they train on,
    and what it finds counts when the next evaluation falls due. Early stopping stops one evaluation later then."""
    monitor: str = "ndcg@10"
    """Metric of the validation split that early stopping maximises, and that decides which checkpoint is the best."""
    patience: Annotated[int, Field(ge=-1)] = 5
    """Evaluations in a row without a better one after which training stops; -1 or 0: never."""
    checkpoint_every: int = -1
    """Steps between two checkpoints; -1: only at the end of each epoch."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes without a checkpoint after which one is written, wherever training is; 0: never for that reason."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept, besides the best."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data_device: Literal["auto", "same", "cpu"] = "auto"
    """Where histories and features lie: `same`, on the device that trains; `cpu`, memory-mapped, so that each step fetches
    what it reads. auto: on the device when they need at most half of its free memory."""
    read_ahead: bool | None = None
    """Whether a thread reads the data of the next step while a step is computed; null: on a GPU."""
    max_failures: int = 3
    """Times that failed workers are replaced and training goes on from the last checkpoint; -1: without limit."""
    resize_every: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two looks at whether the cluster has room for more workers, where their number may change. They then
    start again from the last checkpoint."""
    rank_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a rank waits for the others before it says which one it waits for, and gives up."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        if self.loss not in LOSSES:
            raise ValueError(f"loss {self.loss!r} is not known; {nearest(self.loss, LOSSES)}")
        try:
            averaged, _ = split_metrics([self.monitor])
        except ConfigError as error:
            raise ValueError(f"monitor: {error}") from error
        if not averaged:
            raise ValueError(f"monitor {self.monitor!r} is none of {', '.join(USER_METRICS)}, such as ndcg@10")
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> Self:
        if self.examples == "users":
            if self.loss not in POOL_LOSSES:
                raise ValueError(f"with examples users the loss is one of {', '.join(POOL_LOSSES)}, not {self.loss}")
            if self.labels != "binary" or self.sampler != SamplerConfig():
                raise ValueError(
                    "sampler and labels weights are for examples pairs: with examples users, the negatives are all items of "
                    "item_pool. Leave both out, or set examples to pairs"
                )
        elif self.item_pool is not None or self.shown_share != 0.5:
            raise ValueError("item_pool and shown_share are for examples users: set examples, or leave them out")
        if self.labels == "weights" and self.loss != "bce":
            raise ValueError(
                f"labels weights are read by the loss bce, not by {self.loss}: set loss to bce, or labels to binary"
            )
        if self.sampler.log_q and self.loss != "sampled_softmax":
            raise ValueError(
                f"sampler.log_q corrects the loss sampled_softmax, not {self.loss}: set loss to sampled_softmax, or "
                "sampler.log_q to false"
            )
        if self.sampler.pool is not None and self.sampler.pool < self.negatives:
            raise ValueError(
                f"the {self.negatives} negatives are to be the highest-scored of sampler.pool, which is {self.sampler.pool}: "
                "make sampler.pool the larger"
            )
        return self


class SearchConfig(Config):
    """The values that a hyperparameter may take: exactly one of the three is given."""

    choice: tuple[Any, ...] | None = None
    """One of these."""
    uniform: tuple[float, float] | None = None
    """Between these."""
    log_uniform: tuple[float, float] | None = None
    """Between these, uniform in the logarithm."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if [self.choice, self.uniform, self.log_uniform].count(None) != 2:
            raise ValueError("give exactly one of choice, uniform, log_uniform")
        if self.choice == ():
            raise ValueError("choice needs at least one value")
        for low, high in filter(None, (self.uniform, self.log_uniform)):
            if not low < high or (self.log_uniform and low <= 0):
                raise ValueError("the first bound must be below the second, and above 0 for log_uniform")
        return self


class TuneConfig(Config):
    """A hyperparameter search over dotted paths of the configuration it stands in."""

    search: dict[str, SearchConfig]
    """By dotted path, for example `training.learning_rate: {log_uniform: [1e-5, 1e-2]}`."""
    method: Literal["random", "grid"] = "random"
    """`grid` tries every combination of the choices."""
    trials: Positive = 16
    """random: how many."""
    concurrent: Positive = 1
    """Trials that run at once."""
    grace_epochs: Positive = 3
    """ASHA (Li et al. 2020) stops no trial before so many epochs ..."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """... and then lets about one in so many go on."""


class TrainConfig(Config):
    """One experiment: a dataset, a model, and how it is trained and evaluated."""

    dataset: str
    """Folder of a prepared dataset."""
    seed: int = 0
    """Of the parameters, the order of the positives, negatives, drawn modalities, dropout, and who loses a hidden modality."""
    model: AnyModelConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tune: TuneConfig | None = None
    """Read by `sibra-dist tune` alone."""
