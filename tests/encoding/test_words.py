"""Words and their main directions, against plain Python and NumPy."""

from collections import Counter
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from sibra_dist.encoding.words import Floats, count_buckets, count_words, main_directions, project, split_words, weigh


def hash_of(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Toy Story, 1995: it's OK!", "toy story 1995 it s ok"),
        ("  snake_case\tand\u00a0more\n", "snake case and more"),
        ("Amélie AME\u0301LIE", "am\u00e9lie am\u00e9lie"),  # composed, and a letter with its accent apart
        ("\uff26\uff55\uff4c\uff4c \ufb01ne", "full fine"),  # wide letters, a ligature
        ("ВОЙНА И МИР", "война и мир"),
        ("Ωmega ΩMEGA", "ωmega ωmega"),
        ("हिन्दी, தமிழ்", "हिन्दी தமிழ்"),  # vowel signs belong to the word
        ("حب، وحرب؟", "حب وحرب"),
        ("東京タワー", "東 京 タワー"),
        ("สวัสดีชาวโลก", "สวัสดีชาวโลก"),  # not parted without a dictionary
        ("☕\ufe0f ... -- 🎬", ""),  # a mark that belongs to no letter is no word
        ("", ""),
    ],
)
def test_words_are_those_of_any_alphabet(text: str, words: str) -> None:
    rows, hashes = split_words(pa.array(["before", text, "after"]))
    assert hashes.tolist() == [hash_of(word) for word in ["before", *words.split(), "after"]]
    assert rows.tolist() == [0, *[1] * len(words.split()), 2]


def test_hashes_of_words_never_change() -> None:
    # Datasets that were encoded with them are extended later.
    assert split_words(pa.array(["toy"]))[1].tolist() == [14527196104900615309]


def test_counts_are_those_of_plain_python_whatever_is_beside_a_text() -> None:
    texts = ["b a b", "...", "c", "a a a b d"]
    for stretch in (texts, texts[2:], texts[:1], texts[1:2], []):
        expected = [sorted(Counter(hash_of(word) for word in text.replace(".", "").split()).items()) for text in stretch]
        triples = list(zip(*(array.tolist() for array in count_words(pa.array(stretch, pa.string()))), strict=True))
        assert triples == [(row, *pair) for row, pairs in enumerate(expected) for pair in pairs]
    rows, buckets, counts = count_buckets(pa.array(texts), 2)
    bucketed = [sorted(Counter(hash_of(word) % 2 for word in text.replace(".", "").split()).items()) for text in texts]
    assert list(zip(rows.tolist(), buckets.tolist(), counts.tolist(), strict=True)) == [
        (row, *pair) for row, pairs in enumerate(bucketed) for pair in pairs
    ]


def entries(dense: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    rows, columns = np.nonzero(dense)
    return rows, columns, dense[rows, columns]


def sparse_matrix(height: int, width: int, seed: int) -> Floats:
    draw = np.random.default_rng(seed)
    dense = draw.random((height, width)) * (draw.random((height, width)) < 4 / np.arange(4, width + 4))
    dense[np.arange(height), np.arange(height) % width] += 0.1
    dense[np.arange(width) % height, np.arange(width)] += 0.1
    return np.asarray(dense)


@pytest.mark.parametrize(("height", "width", "size"), [(1, 3, 2), (40, 25, 25), (300, 700, 8), (900, 150, 12), (1500, 1100, 6)])
def test_main_directions_are_those_of_a_full_svd(height: int, width: int, size: int) -> None:
    dense = sparse_matrix(height, width, seed=size)
    found = main_directions(*entries(dense), size)
    assert found.dtype == np.float32
    _, values, directions = np.linalg.svd(dense, full_matrices=False)
    expected = dense @ directions[:size].T
    rank = min(height, width, size)
    # No two values are alike, so that a direction is defined but for its sign, which is ours.
    assert np.all(values[: rank - 1] - values[1:rank] > 1e-6 * values[0])
    signs = np.sign(directions[:rank, :].T[np.argmax(np.abs(directions[:rank]), axis=1), np.arange(rank)])
    np.testing.assert_allclose(found[:, :rank], directions[:rank].T * signs, atol=2e-5)
    assert not found[:, rank:].any()
    np.testing.assert_allclose((dense @ found) @ (dense @ found).T, expected @ expected.T, atol=1e-5 * values[0] ** 2)


@pytest.mark.parametrize("height", [30, 2000])
def test_a_matrix_of_low_rank_has_no_more_directions_than_that(height: int) -> None:
    # 30 rows are done at once; of 2000 the method looks for more directions than the three that there are.
    distinct = np.array([[1.0, 0, 0, 2, 0], [0, 1, 0, 0, 3], [0, 0, 1, 1, 1]])
    dense = distinct[np.arange(height) ** 2 % 3 + (np.arange(height) % 7 == 0)]
    found = main_directions(*entries(dense), 5)
    assert not found[:, 3:].any()
    np.testing.assert_allclose(found[:, :3].T @ found[:, :3], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(dense @ found @ found.T, dense, atol=1e-5)


def test_main_directions_do_not_hang_on_threads() -> None:
    dense = sparse_matrix(900, 300, seed=0)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(main_directions(*entries(dense), 16).tobytes())
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_a_projection_is_the_matrix_product_and_each_row_its_own_affair() -> None:
    dense = sparse_matrix(20, 30, seed=1)
    dense[[3, 19]] = 0
    components = np.random.default_rng(2).standard_normal((30, 7)).astype(np.float32)
    whole = project(*entries(dense), components, 20)
    np.testing.assert_allclose(whole, dense @ components, atol=1e-12)
    for row in range(20):
        assert project(*entries(dense[row : row + 1]), components, 1).tobytes() == whole[row].tobytes()


def test_weights_of_a_row_have_length_one() -> None:
    rows, counts = np.array([0, 0, 3]), np.array([1, 4, 9])
    weights = weigh(rows, counts, np.array([2, 1, 5], np.float32))
    raw = np.array([2, 1 + np.log(4)])
    np.testing.assert_allclose(weights, [*(raw / np.linalg.norm(raw)), 1], rtol=1e-7)
