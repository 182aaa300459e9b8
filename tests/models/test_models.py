"""What every model of `MODELS` promises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sibra_dist.config import to_plain, validate
from sibra_dist.data.batches import Batches, TrainBatch
from sibra_dist.data.dataset import Dataset, open_dataset
from sibra_dist.data.presence import NOTHING_HIDDEN, Hidden
from sibra_dist.data.storage import Place
from sibra_dist.data.transfer import map_tensors
from sibra_dist.data.user_batches import AnyBatch, UserBatches
from sibra_dist.losses import LOSSES, POOL_LOSSES
from sibra_dist.models import MODELS, build_model
from sibra_dist.models.base import Recommender
from sibra_dist.training.batching import batch_losses, make_batches
from sibra_dist.training.checkpoint import load_newest, state_of
from sibra_dist.training.config import TrainConfig
from sibra_dist.training.position import Position
from sibra_dist.training.ranks import Ranks
from sibra_dist.training.saver import Saver
from tests.models.cases import CASES, LONG, TRAINED, TRAINING, WHOLE_USERS, all_scores, build, told_apart, train, with_side_keys
from tests.planted import write_planted

NEAR_THE_OPTIMUM = 0.95
LOSSES_OF = [*(("pairs", loss) for loss in LOSSES), *(("users", loss) for loss in POOL_LOSSES)]
OpenPlanted = Callable[[str], Dataset]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> OpenPlanted:
    folder = tmp_path_factory.mktemp("models")
    opened: dict[str, Dataset] = {}

    def open_planted(protocol: str) -> Dataset:
        if protocol not in opened:
            place = write_planted(folder / protocol, protocol=protocol, users=100, per_user=15)
            opened[protocol] = open_dataset(place)
        return opened[protocol]

    return open_planted


@pytest.mark.parametrize("name", ["pop", "random"])
def test_baselines_embed_on_their_device_wherever_the_data_are(planted: OpenPlanted, name: str) -> None:
    model = build({"type": name}, planted("random")).to("meta")
    users, items = model.encode_users(torch.arange(3)), model.encode_items(torch.arange(4))
    assert (users.device.type, items.device.type) == ("meta", "meta")
    assert model.score(users, items).shape == (3, 4)


@pytest.fixture(params=["random", "cold_item"])
def dataset(request: pytest.FixtureRequest, planted: OpenPlanted) -> Dataset:
    return planted(request.param)


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, dataset: Dataset) -> Recommender:
    return build(CASES[request.param].model, dataset).eval()


@pytest.fixture(params=TRAINED)
def trained_model(request: pytest.FixtureRequest, dataset: Dataset) -> Recommender:
    return build(CASES[request.param].model, dataset)


def test_every_model_has_a_case() -> None:
    assert {case.model["type"] for case in CASES.values()} == MODELS.keys()


@pytest.mark.parametrize(
    ("case", "protocol", "loss"),
    [(name, protocol, CASES[name].losses[0]) for name in TRAINED for protocol in CASES[name].learns]
    + [(name, CASES[name].learns[-1], loss) for name in TRAINED for loss in CASES[name].losses[1:]],
)
def test_it_finds_the_planted_structure(planted: OpenPlanted, tmp_path: Path, case: str, protocol: str, loss: str) -> None:
    dataset = planted(protocol)
    model, losses = train(CASES[case].model, dataset, tmp_path / "run", loss=loss, **CASES[case].training)
    found = told_apart(model, dataset)
    assert found > NEAR_THE_OPTIMUM, f"{found:.3f}, loss from {losses[0]:.3f} to {losses[-1]:.3f}"


@pytest.mark.parametrize(("case", "loss"), WHOLE_USERS.items())
def test_it_finds_it_from_batches_of_whole_users(planted: OpenPlanted, tmp_path: Path, case: str, loss: str) -> None:
    dataset = planted(CASES[case].learns[-1])
    model, _ = train(CASES[case].model, dataset, tmp_path / "run", loss=loss, examples="users", batch_size=20, **LONG)
    assert told_apart(model, dataset) > NEAR_THE_OPTIMUM


@pytest.mark.parametrize(
    ("case", "protocol"),
    [(name, "cold_item") for name in ("MF", "CoBraR, dot", "DMF", "NeuMF", "NeuMF, ids", "CLCRec, users", "Pop")]
    + [(name, "cold_user") for name in ("MF", "CoBraR, dot", "DMF", "NeuMF", "NeuMF, ids", "CLCRec, items", "Pop")],
)
def test_who_is_read_by_interactions_alone_is_not_told_apart_when_cold(planted: OpenPlanted, case: str, protocol: str) -> None:
    """Cold items tie, so that ranking them is chance; cold users are all given the same list."""
    dataset = planted(protocol)
    model = build(CASES[case].model, dataset).eval()
    side, encode = (dataset.items, model.encode_items) if protocol == "cold_item" else (dataset.users, model.encode_users)
    cold = encode(torch.nonzero(side.histories.lengths() == 0).flatten())
    assert len(cold) > 1
    assert torch.equal(cold, cold[:1].expand_as(cold))
    if protocol == "cold_item":
        assert told_apart(model, dataset) == 0.5


@pytest.mark.parametrize("case", TRAINED)
def test_the_loss_is_finite_with_every_modality_hidden_in_turn_and_all(planted: OpenPlanted, tmp_path: Path, case: str) -> None:
    dataset, plain = planted("cold_item"), CASES[case].model
    users, items = build(plain, dataset).modalities()
    names = [*(f"users.{name}" for name in users), *(f"items.{name}" for name in items)]
    hides = [*({name: 1.0} for name in names), dict.fromkeys(names, 0.5), dict.fromkeys(names, 1.0)]
    for number, hide in enumerate(hides):
        model, losses = train(
            plain,
            dataset,
            tmp_path / str(number),
            hide=hide,
            epochs=1,
            evaluate_every=1,
            batch_size=600,
            loss=CASES[case].losses[0],
        )
        assert losses
        assert all_scores(model, dataset).isfinite().all()


def test_embeddings_are_defined_whatever_is_hidden(model: Recommender, dataset: Dataset) -> None:
    for side, names, encode, count in (
        ("users", model.modalities()[0], model.encode_users, dataset.users.count),
        ("items", model.modalities()[1], model.encode_items, dataset.items.count),
    ):
        for share in (0.5, 1.0):
            for hidden in [{}, *({name: share} for name in names), dict.fromkeys(names, share)]:
                embeddings = encode(torch.arange(count), Hidden(side, hidden))
                assert embeddings.isfinite().all()
        if names:
            everything = Hidden(side, dict.fromkeys(names, 1.0))
            assert model.without_modality(side == "items", everything) == count
            assert model.without_modality(side == "items") < count
            first = model.seen(side == "items", Hidden(side, dict.fromkeys(names[1:], 1.0)))
            assert first.shape == (count, len(names))
            assert first[:, 0].equal(model.seen(side == "items")[:, 0])
            assert not first[:, 1:].any()


def test_scores_do_not_depend_on_what_is_scored_beside(model: Recommender, dataset: Dataset) -> None:
    users, items = torch.arange(dataset.users.count), torch.arange(dataset.items.count)
    whole = all_scores(model, dataset)
    assert whole.shape == (len(users), len(items))
    part = model.score(model.encode_users(users[7:9]), model.encode_items(items[[40, 3]]))
    torch.testing.assert_close(part, whole[7:9][:, [40, 3]])
    tiles = [
        torch.cat([model.score(model.encode_users(rows), model.encode_items(tile)) for tile in items.split(33)], dim=1)
        for rows in users.split(13)
    ]
    torch.testing.assert_close(torch.cat(tiles), whole)


def test_training_scores_do_not_depend_on_the_rest_of_the_batch(trained_model: Recommender, dataset: Dataset) -> None:
    """With the statistics of batch normalisation gathered so far; dropout and draws are as in training."""
    model = trained_model.eval()
    batch = Batches(dataset, *model.sampling(), seed=0, batch_size=20, negatives=4).batch(0, 0)
    torch.testing.assert_close(model(rows_of(batch, slice(5, 8))).scores, model(batch).scores[5:8])


def rows_of(batch: TrainBatch, rows: slice) -> TrainBatch:
    changed = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **changed)


@pytest.mark.parametrize("case", CASES)
def test_saved_and_loaded_it_is_the_same_to_the_bit(planted: OpenPlanted, tmp_path: Path, case: str) -> None:
    dataset = planted("cold_item")
    model, loaded = (build(CASES[case].model, dataset, seed).eval() for seed in (0, 1))
    saver = Saver(Place.at(tmp_path / "checkpoints"), Place.at(tmp_path / "best"), "digest", {})
    saver.save(Position(epoch=1), state_of(model))
    saver.wait()
    checkpoint = load_newest(tmp_path / "checkpoints", "digest")
    assert checkpoint is not None
    checkpoint.restore(loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert torch.equal(all_scores(model, dataset), all_scores(loaded, dataset))


@pytest.mark.parametrize("case", CASES)
def test_config_round_trips(case: str) -> None:
    config = validate(TrainConfig, {"dataset": "here", "model": CASES[case].model}, where="here")
    assert validate(TrainConfig, to_plain(config), where="here") == config
    assert type(config.model) is MODELS[CASES[case].model["type"]][1]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_settings_can_be_built(planted: OpenPlanted, name: str) -> None:
    assert all_scores(build({"type": name}, planted("cold_item")).eval(), planted("cold_item")).isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_same_seed_same_model_and_no_trace_in_the_global_generator(planted: OpenPlanted, case: str) -> None:
    before = torch.random.get_rng_state()
    one, other, third = (build(CASES[case].model, planted("random"), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    for value, again in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again)
    if one.trainable:
        assert any(not torch.equal(*pair) for pair in zip(one.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize(("examples", "loss"), LOSSES_OF)
def test_every_parameter_has_a_finite_gradient(planted: OpenPlanted, examples: str, loss: str) -> None:
    """Of the second of two ranks, which has padding."""
    dataset = planted("cold_item")
    for case in TRAINED:
        model, batch = model_and_batch(case, dataset, Ranks(1, 2), examples=examples, loss=loss)
        output = model(batch)
        assert output.scores.shape == (len(batch.users), batch.items.shape[-1])
        losses = batch_losses(loss, batch, output.scores) + sum(output.auxiliary_losses.values())
        assert losses.shape == batch.users.shape
        (losses * batch.weights).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{case}: {name}"
            assert parameter.grad.isfinite().all(), f"{case}: {name}"


@pytest.mark.parametrize(("examples", "loss"), LOSSES_OF)
def test_a_step_waits_for_no_number(planted: OpenPlanted, examples: str, loss: str) -> None:
    """Forward and backward, with tensors that have shapes and no content: to read a number, which waits for a GPU, raises."""
    dataset = planted("cold_item")
    for case in TRAINED:
        model, batch = model_and_batch(case, dataset, Ranks(1, 2), examples=examples, loss=loss)
        read = model.read(batch)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            faked = map_tensors((batch, read), mode.from_tensor)
            output = model.step(*faked)
            losses = batch_losses(loss, faked[0], output.scores) + sum(output.auxiliary_losses.values())
            total = (losses * faked[0].weights).sum()
            gradients = torch.autograd.grad(total, list(model.parameters()))
            assert [gradient.shape for gradient in gradients] == [parameter.shape for parameter in model.parameters()]
            with pytest.raises(DataDependentOutputException):
                total.item()


@pytest.mark.parametrize("case", TRAINED)
def test_forward_agrees_with_score(planted: OpenPlanted, case: str) -> None:
    """When all that is present is drawn, and nothing dropped, capped or left out, training scores are those of evaluation."""
    dataset = planted("cold_item")
    plain = with_side_keys(CASES[case].model, input_dropout=0.0, replace_id=0.0, encoders={})
    model = build({key: value for key, value in plain.items() if key != "exclude_target"}, dataset).eval()
    draw_all = [part._replace(draws=None, first=None, dropout=None) for part in model.sampling()]
    expected = all_scores(model, dataset)
    batch = Batches(dataset, *draw_all, seed=0, batch_size=64, negatives=4).batch(0, 0)
    torch.testing.assert_close(model(batch).scores, expected[batch.users[:, None], batch.items])
    whole_users = UserBatches(dataset, *draw_all, seed=0, batch_size=64, shown=1.0, pool=30).batch(0, 0)
    torch.testing.assert_close(model(whole_users).scores, expected[whole_users.users][:, whole_users.items])


@pytest.mark.parametrize("name", [name for name, (kind, _) in MODELS.items() if not kind.trainable])
def test_what_is_not_trained_says_so(planted: OpenPlanted, name: str) -> None:
    model = build({"type": name}, planted("random"))
    assert model.modalities() == ((), ())
    assert model.without_modality(items=True, hidden=NOTHING_HIDDEN) == 0
    with pytest.raises(TypeError, match="nothing to train"):
        model.sampling()


def test_gradients_of_two_ranks_sum_to_those_of_one(planted: OpenPlanted, tmp_path: Path) -> None:
    """With dropout, user and item contrasts, and padding on the second rank; batch normalisation is each rank's own."""
    dataset = planted("random")
    arguments = (str(tmp_path / "meeting"), str(dataset.place), str(tmp_path / "gradients"))
    torch.multiprocessing.start_processes(rank_gradients, args=arguments, nprocs=2, start_method="spawn")
    found = load_file(tmp_path / "gradients")
    expected = gradients(dataset, Ranks())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
        assert value.any() or name.endswith(".unknown"), name


def rank_gradients(rank: int, meeting: str, place: str, to: str) -> None:
    """What each process does; rank 0 leaves the summed gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    ranks = Ranks.current()
    found = gradients(open_dataset(place), ranks)
    if ranks.leads:
        save_file(found, to)
    ranks.wait()
    torch.distributed.destroy_process_group()


def gradients(dataset: Dataset, ranks: Ranks) -> dict[str, Tensor]:
    """Gradients of one step of every case and kind of batch, summed over the ranks, by case, kind and parameter."""
    found = {}
    for case in TRAINED:
        for examples in ("pairs", "users"):
            # Of the losses that all models and batches have, this one alone notices what is added to all scores.
            model, batch = model_and_batch(case, dataset, ranks, examples=examples, loss="bce", batch_size=31)
            output = model(batch)
            losses = batch_losses("bce", batch, output.scores) + sum(output.auxiliary_losses.values())
            mean = (losses * batch.weights).sum() / batch.total_weight
            mean.backward()
            unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
            assert not unused, f"{case}, {examples}: {unused}"
            found[f"{case}/{examples}/loss"] = ranks.reduce_step(model, mean)
            found |= {f"{case}/{examples}/{name}": parameter.grad for name, parameter in model.named_parameters()}
    return found


def model_and_batch(case: str, dataset: Dataset, ranks: Ranks, **training: object) -> tuple[Recommender, AnyBatch]:
    """A case's model, without batch normalisation, and the first batch that training gives it on a rank."""
    plain = with_side_keys(CASES[case].model, batch_norm_every=-1)
    values = {"dataset": "here", "model": plain, "training": {**TRAINING, **training}}
    config = validate(TrainConfig, values, where="test")
    model = build_model(config.model, dataset, seed=0).train()
    return model, make_batches(config, dataset, model, ranks).batch(0, 0)
