"""The encoder of the modality that every recommender has: training interactions, read as sparse rows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sibra_dist.data.batches import SHOWN, stream
from sibra_dist.data.dataset import Entities
from sibra_dist.data.user_batches import Shown
from sibra_dist.models.bag_sums import Bags, Whole
from sibra_dist.models.encoder import Encoder, EncoderConfig, Input, layers, list_inputs
from sibra_dist.models.histories import Entries
from sibra_dist.models.linear import initialize_bias, weight_bound
from sibra_dist.models.sharing import Wanted, taken, wanted
from sibra_dist.models.tables import Lookup, Table
from sibra_dist.models.weighting import weigh


class LeftOut(NamedTuple):
    """Rows that are read whole, each once, from which single entries are taken away again."""

    inverse: Tensor
    """int64 [n]: the row that was read of each that is asked for"""
    rows: Tensor
    """int64 [m]: which of those asked for lose an entry"""
    columns: Lookup
    """m of them: and which one"""
    values: Tensor | None
    """[m]: what it counts; None: 1"""


class InteractionsRead(NamedTuple):
    """What the encoder reads of n entities."""

    bags: Bags | Wanted
    scale: Tensor | None = None
    """float32 [n]: times each sum, where not all was read"""
    left_out: LeftOut | None = None


class InteractionsEncoder(Encoder):
    """A linear layer, and by default a ReLU, on the row of training interactions, without ever making the row.

    The product of a row and a weight matrix is the sum of those rows of the matrix that the row's entries select, each
    times what the entry counts: a bag sum.
    """

    def __init__(
        self, entities: Entities, other: Entities, width: int, config: EncoderConfig | None = None, where: str = "encoder"
    ) -> None:
        """Read the histories of `entities` over the `other` side; `other.histories` is the same matrix transposed.

        Raises:
            ConfigError: the dataset has not got the weights that are asked for; `where` is the encoder's key.
        """
        super().__init__()
        config = config or EncoderConfig()
        self._histories = weigh(config.weighting, entities, other, f"{where}.weighting")
        inner = (*config.hidden_sizes, width)[0]
        bound = weight_bound(config.initialization, other.known, inner)
        self.table = Table(other.known, inner, lambda weight: weight.uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(inner))
        initialize_bias(self.bias, config.initialization, other.known)
        self.layers = layers(config, width, activation=True)
        longest = int(self._histories.rows.lengths().max()) if entities.count else 0
        # A cap that no row reaches is none: whole rows are faster to read.
        self._max_history = config.max_history if config.max_history is not None and config.max_history < longest else None

    def read(
        self, entities: Tensor, key: int | None = None, excluded: Tensor | None = None, shown: Shown | None = None
    ) -> InteractionsRead:
        """See `Encoder`. Where something is excluded entities may repeat, and it must be in their rows.

        The other entries count what they did: document lengths and frequencies are the dataset's. With `shown` only those
        entries are read that it says of, and nothing is excluded; their sum is divided by the share that is shown, so that
        that of all is its expected value.
        """
        if shown is not None:
            return self._read_shown(entities, shown, key)
        if key is not None and self._max_history is not None:
            entries, available = self._histories.drawn(entities, excluded, self._max_history, key)
            scale = (available / self._max_history).clamp(min=1)
            return InteractionsRead(Bags(entries, self.table.plan(entries)), scale)
        if excluded is None:
            return InteractionsRead(self._read_whole(entities, key))
        # What is read is each distinct row, once and whole; then one row of the table is taken away again.
        distinct, inverse = torch.unique(entities, return_inverse=True)
        rows = torch.nonzero(excluded >= 0).flatten()
        columns, values = excluded[rows], self._histories.values
        if values is not None:
            values = values[self._histories.find(entities[rows], columns)]
        left_out = LeftOut(inverse, rows, self.table.plan_lookup(columns), values)
        return InteractionsRead(self._read_whole(distinct, key), left_out=left_out)

    def inputs(self) -> tuple[Input, ...]:
        """See `Encoder`."""
        lists = list_inputs(self.table.rows, "numbers of those interacted with: their rows in the other side's embeddings.npy")
        if self._histories.values is None:
            return lists
        return (*lists, Input(".values", torch.float32, ("entries",), "what each entry counts, weighted as the dataset's are"))

    def given(self, *tensors: Tensor) -> InteractionsRead:
        """See `Encoder`."""
        return InteractionsRead(Bags(Entries(*tensors)))

    def encode(self, read: InteractionsRead) -> Tensor:
        """See `Encoder`."""
        sums = taken(self, read.bags) if isinstance(read.bags, Wanted) else self.sum_together(read.bags)
        if read.scale is not None:
            sums = sums * read.scale.to(sums.dtype)[:, None]
        if read.left_out is not None:
            inverse, rows, columns, values = read.left_out
            left_out = self.table.lookup(columns)
            if values is not None:
                left_out = left_out * values[:, None]
            # To distinct rows, so in any order the same.
            sums = F.embedding(inverse, sums).index_add(0, rows, left_out, alpha=-1)
        encoded: Tensor = self.layers(sums + self.bias)
        return encoded

    def read_together(self, rows: Tensor) -> Bags:
        """See `Sharer`."""
        entries = self._histories.whole(rows)
        # The transposed histories would travel with every step where they are not on the table's device.
        resident = rows.device == self.table.weight.device
        return Bags(entries, self.table.plan(entries, Whole(rows, self._histories) if resident else None))

    def sum_together(self, bags: Bags) -> Tensor:
        """See `Sharer`."""
        return self.table.bag_sum(bags)

    def _read_whole(self, entities: Tensor, key: int | None) -> Bags | Wanted:
        if key is None:
            return Bags(self._histories.whole(entities))
        return wanted(self, entities) or self.read_together(entities)

    def _read_shown(self, entities: Tensor, shown: Shown, key: int | None) -> InteractionsRead:
        entries, available = self._histories.some(entities, shown)
        scale = torch.full_like(available, 1 / shown.share, dtype=torch.float32)
        if key is not None and self._max_history is not None:
            entries = entries.at_most(self._max_history, stream(key, SHOWN), entities)
            scale *= (available / self._max_history).clamp(min=1)
        return InteractionsRead(Bags(entries, None if key is None else self.table.plan(entries)), scale)
