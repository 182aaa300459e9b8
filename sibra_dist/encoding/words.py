"""Words of texts, their weights and main directions, in numbers: what `texts.py` encodes with. Arrow, NumPy, torch.

A sparse matrix of texts by words is three arrays here: of each entry its row, ascending, its word and its value.
"""

from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]
Floats = NDArray[np.float64]

BETWEEN_WORDS = r"[^\p{L}\p{M}\p{N}]+\p{M}*"
LEAST_EIGENVALUE = 1e-10
"""Relative to the largest. Smaller ones are rounding error: the matrix has no such direction."""
BLOCK, LEAST_BLOCKS = 32, 16


def split_words(texts: pa.Array) -> tuple[Integers, Hashes]:
    """The words of texts, in their order: of each the position of its text, and its hash (64 bits of BLAKE2b).

    Words are runs of letters, marks and digits, in compatibility form (NFKC) and lower case. A Han character is one by itself.
    """
    plain = pc.utf8_lower(pc.utf8_normalize(texts, "NFKC"))
    parted = pc.replace_substring_regex(plain, BETWEEN_WORDS, " ")
    lists = pc.utf8_split_whitespace(pc.replace_substring_regex(parted, r"(\p{Han})", r" \1 "))
    rows = np.repeat(np.arange(len(texts)), pc.list_value_length(lists).to_numpy())
    words = lists.flatten()
    # Space at the beginning or end of a text has an empty word beside it.
    real = pc.not_equal(words, "").to_numpy(zero_copy_only=False)
    coded = words.dictionary_encode()
    digests = b"".join(blake2b(word.encode(), digest_size=8).digest() for word in coded.dictionary.to_pylist())
    hashes = np.frombuffer(digests, "<u8").astype(np.uint64)
    return rows[real], hashes[coded.indices.to_numpy()[real]]


def count_words(texts: pa.Array) -> tuple[Integers, Hashes, Integers]:
    """The distinct words of each text, in the order of their hashes: row, hash, and how often it occurs."""
    rows, hashes = split_words(texts)
    distinct, places = np.unique(hashes, return_inverse=True)
    pairs, counts = np.unique(rows * len(distinct) + places, return_counts=True)
    return pairs // max(1, len(distinct)), distinct[pairs % max(1, len(distinct))], counts


def count_buckets(texts: pa.Array, buckets: int) -> tuple[Integers, Integers, Integers]:
    """The distinct buckets of each text, ascending: row, bucket, and how many of the text's words fall into it."""
    rows, hashes = split_words(texts)
    found, counts = np.unique(rows * buckets + (hashes % np.uint64(buckets)).astype(np.int64), return_counts=True)
    return found // buckets, found % buckets, counts


def damped(counts: Integers) -> Floats:
    """1 + ln of counts. Through float32, so that no other logarithm of another processor shows in the last bit."""
    return (1 + np.log(counts)).astype(np.float32).astype(np.float64)


def smooth_idf(texts: int, frequencies: Integers) -> NDArray[np.float32]:
    """ln((1 + n) / (1 + df)) + 1 of words that `frequencies` of n `texts` have."""
    return (np.log((1 + texts) / (1 + frequencies)) + 1).astype(np.float32)


def weigh(rows: Integers, counts: Integers, idf: NDArray[np.float32]) -> Floats:
    """tf-idf of the entries of a matrix, each row scaled to length 1; `idf` is that of each entry."""
    values = damped(counts) * idf
    # Entries of a row are added one after the other, whatever other rows there are; so are those below.
    lengths = np.sqrt(np.bincount(rows, values * values))
    return values / lengths[rows]


def project(rows: Integers, places: Integers, values: Floats, components: NDArray[np.float32], count: int) -> Floats:
    """The product of a sparse matrix of `count` rows and a dense one, [count, components.shape[1]]; places are its rows."""
    projected = np.zeros((count, components.shape[1]))
    present, starts = np.unique(rows, return_index=True)
    ends = np.append(starts, len(rows))[1:]
    for row, start, end in zip(present, starts, ends, strict=True):
        # No matrix product of NumPy's: its bits would hang on the machine's processor and threads.
        np.add.reduce(components[places[start:end]] * values[start:end, None], axis=0, out=projected[row])
    return projected


def main_directions(rows: Integers, columns: Integers, values: Floats, size: int) -> NDArray[np.float32]:
    """The first right singular vectors of a sparse matrix, as columns [number of columns, `size`]; 0 beyond its rank.

    A block Krylov method (Musco & Musco 2015) from a fixed random start (Halko et al. 2011). Up to 512 rows it is exact,
    beyond as near as matters. In each vector the largest number is positive. Every row and every column must have an entry.
    One thread, so that one machine always comes to the same bits; another kind of processor or version of torch may not.
    """
    import torch

    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    order = np.argsort(columns, kind="stable")
    blocks = max(LEAST_BLOCKS, -(-4 * size // BLOCK))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix, transposed = _Sparse(rows, columns, values), _Sparse(columns[order], rows[order], values[order])
        if height <= blocks * BLOCK:
            basis = torch.eye(height, dtype=torch.float64)
            images = torch.cat([matrix.times(transposed.times(part)) for part in basis.split(BLOCK, 1)], 1)
        else:
            basis = torch.empty(height, blocks * BLOCK, dtype=torch.float64)
            images = torch.empty_like(basis)
            ahead, largest = matrix.times(_random_signs(width)), 0.0
            for start in range(0, blocks * BLOCK, BLOCK):
                found = basis[:, :start]
                left = ahead - found @ (found.T @ ahead)
                if float(left.norm()) <= LEAST_EIGENVALUE * largest:
                    basis, images = found, images[:, :start]
                    break
                ahead = torch.linalg.qr(left).Q
                # Once more: where little was left, its rounding error counts, which is not at right angles to what was found.
                ahead = torch.linalg.qr(ahead - found @ (found.T @ ahead)).Q
                basis[:, start : start + BLOCK] = ahead
                ahead = matrix.times(transposed.times(ahead))
                images[:, start : start + BLOCK] = ahead
                largest = max(largest, float(ahead.norm()))
        small = basis.T @ images
        eigenvalues, turns = torch.linalg.eigh((small + small.T) / 2)
        eigenvalues, turns = eigenvalues.flip(0), turns.flip(1)
        rank = min(size, int((eigenvalues > LEAST_EIGENVALUE * eigenvalues[0]).sum()))
        right = (transposed.times(basis @ turns[:, :rank]) / eigenvalues[:rank].sqrt()).numpy()
    finally:
        torch.set_num_threads(threads)
    largest = right[np.argmax(np.abs(right), axis=0), np.arange(rank)]
    directions = np.zeros((width, size), np.float32)
    directions[:, :rank] = right * np.sign(largest)
    return directions


class _Sparse:
    """A sparse matrix without an empty row, to be multiplied from the left."""

    def __init__(self, rows: Integers, columns: Integers, values: Floats) -> None:
        import torch

        self._starts = torch.tensor(np.flatnonzero(np.diff(rows, prepend=-1)))
        self._columns, self._values = torch.tensor(columns), torch.tensor(values)

    def times(self, dense: "Tensor") -> "Tensor":
        import torch

        return torch.nn.functional.embedding_bag(
            self._columns, dense.contiguous(), self._starts, mode="sum", per_sample_weights=self._values
        )


def _random_signs(rows: int) -> "Tensor":
    """1 or -1, [rows, BLOCK], always the same."""
    import torch

    bits = np.random.Philox(0).random_raw(rows * BLOCK) & np.uint64(1)
    return torch.tensor(bits.astype(np.float64) * 2 - 1).reshape(rows, BLOCK)
