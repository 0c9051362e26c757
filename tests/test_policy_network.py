import itertools
import math
import threading

import numpy as np
import pytest
import torch
from conftest import save_policy
from gymnasium import spaces

from vecpg.config import Config
from vecpg.envs import make_envs
from vecpg.policy import Policy
from vecpg.policy import network as network_module
from vecpg.policy.network import Encoder, Normalizer, drawn_from, fully_connected, through
from vecpg.rollout import collect
from vecpg.run.checkpoint import load_policy
from vecpg.update import update


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- Encoders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (4, 1, 2)])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_box_is_flattened_in_its_own_order(shape, rows):
    encoder = Encoder(spaces.Box(-1, 1, shape))
    obs = torch.randn(rows, *shape, generator=generator())
    features = encoder(obs)
    assert (encoder.features, encoder.shape, encoder.dtype) == (math.prod(shape), shape, obs.dtype)
    assert features.tolist() == [one.reshape(-1).tolist() for one in obs]
    assert list(encoder.parameters()) == []


@pytest.mark.parametrize("n", [1, 5, (2, 3)])
def test_zeros_and_ones_are_a_box_of_them(n):
    space, box = spaces.MultiBinary(n), spaces.Box(0, 1, spaces.MultiBinary(n).shape)
    encoder, other = Encoder(space, normalize=True), Encoder(box, normalize=True)
    obs = torch.randint(0, 2, (4, 3, *space.shape), generator=generator()).float()
    for each in (encoder, other):
        assert torch.equal(each(obs[0]), obs[0].reshape(3, -1))
        each.observe(obs, torch.ones(4, 3, dtype=bool))
    assert torch.equal(encoder(obs[1]), other(obs[1]))
    assert encoder.features == other.features == math.prod(space.shape)


@pytest.mark.parametrize("start", [0, 3, -2])
def test_a_discrete_observation_is_looked_up(start):
    encoder = Encoder(spaces.Discrete(4, start=start), embedding_size=3)
    obs = torch.tensor([2, 0, 3, 3, 1]) + start
    assert torch.equal(encoder(obs), encoder.table.weight[[2, 0, 3, 3, 1]])
    assert (encoder.features, encoder.shape, encoder.dtype) == (3, (), torch.int64)
    assert encoder.table.weight.shape == (4, 3)


SPACES = [
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiDiscrete([2, 3, 4], start=[5, -1, 0]),
    spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[0, 7], [-9, 2]]),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_every_component_of_a_multi_discrete_has_its_own_vectors(space):
    encoder = Encoder(space, embedding_size=2)
    tables = torch.split(encoder.table.weight, space.nvec.reshape(-1).tolist())
    ranges = [
        range(first, first + count)
        for first, count in zip(space.start.reshape(-1), space.nvec.reshape(-1), strict=True)
    ]
    for values in itertools.product(*ranges):
        obs = torch.tensor(values).reshape(1, *space.shape)
        expected = [
            table[value - numbers[0]]
            for table, value, numbers in zip(tables, values, ranges, strict=True)
        ]
        assert torch.equal(encoder(obs)[0], torch.cat(expected))
    assert encoder.features == 2 * len(tables)
    assert encoder.shape == space.shape


@pytest.mark.parametrize("space", [spaces.Discrete(3), *SPACES], ids=str)
def test_no_rows_at_all_are_encoded(space):
    encoder = Encoder(space, embedding_size=2)
    assert encoder(torch.zeros(0, *encoder.shape, dtype=torch.int64)).shape == (0, encoder.features)


def test_only_the_vectors_that_were_looked_up_get_a_gradient():
    encoder = Encoder(spaces.Discrete(4), embedding_size=2)
    encoder(torch.tensor([1, 1, 3])).sum().backward()
    assert encoder.table.weight.grad.tolist() == [[0, 0], [2, 2], [0, 0], [1, 1]]


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Tuple([spaces.Discrete(2)])])
def test_another_space_is_refused_with_what_is_supported(space):
    with pytest.raises(ValueError, match="is not supported; supported: Box, Discrete, MultiBinary"):
        Encoder(space)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3])])
def test_only_a_box_can_be_normalized(space):
    with pytest.raises(ValueError, match="normalize_obs: expected a Box or MultiBinary observ"):
        Encoder(space, normalize=True)


# -- uint8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("high", "largest"), [(255, 255), (10, 10), (1, 1), (0, 1), ([3, 200], 200)], ids=str
)
def test_uint8_is_divided_by_the_largest_that_the_space_allows(high, largest):
    bounds = np.zeros(2, np.uint8), np.broadcast_to(high, 2).astype(np.uint8)
    space = spaces.Box(*bounds, dtype=np.uint8)
    encoder = Encoder(space)
    assert (encoder.dtype, encoder.network) == (torch.uint8, "mlp")
    obs = torch.tensor([[0, 1], [3, 200], [255, 7]], dtype=torch.uint8)
    expected = [[np.float32(value) / np.float32(largest) for value in row] for row in obs.tolist()]
    found = encoder(obs)
    assert found.dtype == torch.float32
    assert found.tolist() == expected
    # Real numbers are scaled alike, and not cut off to whole ones.
    assert torch.equal(encoder(obs.float()), found)
    halves = encoder(torch.tensor([[0.5, -2.0], [300.0, 1e6]]))
    assert halves.tolist() == (torch.tensor([[0.5, -2.0], [300.0, 1e6]]) / largest).tolist()


def test_only_uint8_is_scaled():
    for of in (np.int8, np.uint16, np.float32):
        encoder = Encoder(spaces.Box(0, 100, (2,), of))
        assert encoder.dtype == torch.float32
        assert encoder(torch.tensor([[50.0, 100.0]])).tolist() == [[50.0, 100.0]]


@pytest.mark.parametrize("block", [1, 50, 2**16])
def test_statistics_of_uint8_are_of_scaled_numbers(monkeypatch, block):
    monkeypatch.setattr(network_module, "_ROWS", block)
    encoder = Encoder(spaces.Box(0, 50, (3, 2), np.uint8), normalize=True)
    g = generator()
    obs = torch.randint(0, 51, (40, 5, 3, 2), generator=g).to(torch.uint8)
    mask = torch.rand(40, 5, generator=g) < 0.6
    obs[~mask] = 255
    encoder.observe(obs, mask)
    whole = obs[mask].double().reshape(-1, 6).numpy() / 50
    expected = (whole - whole.mean(axis=0)) / whole.std(axis=0)
    np.testing.assert_allclose(encoder(obs[mask]).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected).max() > 1


def test_images_are_normalized_pixel_by_pixel():
    space = spaces.Box(0, 255, (9, 8, 3), np.uint8)
    encoder = Encoder(space, normalize=True)
    assert encoder.network == "cnn"
    obs = torch.randint(0, 256, (6, 4, 9, 8, 3), generator=generator()).to(torch.uint8)
    encoder.observe(obs, torch.ones(6, 4, dtype=bool))
    numbers = obs.reshape(24, -1).double() / 255
    scaled = (numbers - numbers.mean(dim=0)) / numbers.std(dim=0, correction=0)
    expected = encoder.body(scaled.float().reshape(24, 9, 8, 3))
    torch.testing.assert_close(encoder(obs[0]), expected[:4], rtol=1e-4, atol=1e-4)


def test_statistics_of_large_observations_are_taken_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(network_module, "_MOST_OBSERVED", 30)
    encoder = Encoder(spaces.Box(-1, 1, (7,)), normalize=True)
    seen, real = [], network_module.moments
    monkeypatch.setattr(network_module, "moments", lambda x: seen.append(len(x)) or real(x))
    obs = torch.randn(5, 3, 7, generator=generator())
    encoder.observe(obs, torch.ones(5, 3, dtype=bool))
    assert max(seen) == 4
    flat = obs.reshape(15, 7).double()
    torch.testing.assert_close(encoder.normalizer.mean, flat.mean(dim=0))


def test_fewer_images_go_through_at_once():
    atari = Encoder(spaces.Box(0, 255, (210, 160, 3), np.uint8))
    # The image, and twice what comes out of 32, 64 and 64 channels.
    kept = 210 * 160 * 3 + 2 * (32 * 51 * 39 + 64 * 24 * 18 + 64 * 22 * 16)
    assert atari.rows_at_once(4096) == 2**24 // kept == 51
    assert atari.rows_at_once(10) == 10
    assert Encoder(spaces.Box(0, 255, (10, 10, 3), np.uint8)).rows_at_once(4096) > 1000
    assert Encoder(spaces.Box(-1, 1, (4096,))).rows_at_once(4096) == 4096
    assert Encoder(spaces.Box(-1, 1, (2**24 + 1,))).rows_at_once(4096) == 1
    assert Encoder(spaces.Discrete(5), embedding_size=100).rows_at_once(4096) == 4096


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.Box(-1, 1, (4,))], ids=str)
def test_convolutions_are_for_images(space):
    with pytest.raises(ValueError, match="--network cnn: expected images, a Box of shape"):
        Encoder(space, network="cnn")


# -- Normalization -------------------------------------------------------------------------------


def poisoned(shape, mean, deviation, seed):
    """Observations (T, N, 2), and which of them count; the others are NaN."""
    g = generator(seed)
    obs = torch.randn(*shape, 2, generator=g) * deviation + torch.tensor([mean, -1.0])
    mask = torch.rand(shape, generator=g) < 0.6
    obs[~mask] = math.nan
    return obs, mask


@pytest.mark.parametrize("block", [1, 50, 2**16])
def test_statistics_are_those_of_all_counted_rows_so_far(monkeypatch, block):
    monkeypatch.setattr(network_module, "_ROWS", block)
    encoder = Encoder(spaces.Box(-1, 1, (2,)), normalize=True)
    seen = []
    for iteration, rows in enumerate((7, 1, 30)):
        obs, mask = poisoned((rows, 5), 100.0 * iteration, 3.0, iteration)
        encoder.observe(obs, mask)
        seen.append(obs[mask].double().numpy())
        whole = np.concatenate(seen)
        x = torch.randn(9, 2, generator=generator()) * 5 + 100
        expected = (x.double().numpy() - whole.mean(axis=0)) / whole.std(axis=0)
        np.testing.assert_allclose(encoder(x).numpy(), expected.clip(-10, 10), rtol=1e-6, atol=1e-6)
        assert encoder.normalizer.count == len(whole)


def test_a_large_mean_takes_no_digits_from_the_deviation():
    normalizer = Normalizer(1)
    rng = np.random.default_rng(0)
    blocks = [rng.normal(1e6, 1.0, (n, 1)) for n in (1000, 3, 40_000, 1)]
    for block in blocks:
        normalizer.observe(torch.from_numpy(block))
    whole = np.concatenate(blocks)
    deviation = math.sqrt(normalizer.squares.item() / normalizer.count.item())
    assert deviation == pytest.approx(whole.std(), rel=1e-9)
    assert normalizer.mean.item() == pytest.approx(whole.mean(), rel=1e-14)
    x = torch.tensor([[1e6 + 0.5]])
    expected = (1e6 + 0.5 - whole.mean()) / whole.std()
    assert normalizer(x).item() == pytest.approx(expected, rel=1e-6)


def test_a_feature_that_never_changed_is_only_shifted():
    normalizer = Normalizer(2)
    value = torch.tensor(0.1).item()
    for rows in (3, 1000, 7):
        x = torch.full((rows, 2), value)
        x[:, 1] = torch.arange(rows)
        normalizer.observe(x)
    assert normalizer.squares[0] == 0
    shifted = normalizer(torch.tensor([[value, 0.0], [value + 2, 0.0]]))[:, 0].tolist()
    assert shifted == [0.0, pytest.approx(2.0)]


def test_before_anything_was_observed_and_far_away():
    normalizer = Normalizer(1)
    assert normalizer(torch.tensor([[3.0], [-7.5]])).tolist() == [[3.0], [-7.5]]
    normalizer.observe(torch.empty(0, 1))
    assert normalizer.count == 0
    normalizer.observe(torch.tensor([[1.0], [3.0]]))
    x = torch.tensor([[11.9], [12.1], [1e30], [-7.9], [-8.1], [-1e30]])
    expected = [9.9, 10.0, 10.0, -9.9, -10.0, -10.0]
    assert normalizer(x)[:, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("first", [True, False])
def test_groups_of_rows_are_merged_and_one_without_rows_changes_nothing(first):
    encoder, other = (Encoder(spaces.Box(-1, 1, (2,)), normalize=True) for _ in range(2))
    if not first:
        for each in (encoder, other):
            each.observe(*poisoned((4, 3), 3.0, 2.0, 7))
    groups = [poisoned((rows, 5), 100.0 * k, 3.0, k) for k, rows in enumerate((7, 1, 30))]
    none = encoder.moments(torch.empty(0, 5, 2), torch.empty(0, 5, dtype=bool))
    counted_by_nobody = encoder.moments(groups[0][0], torch.zeros(7, 5, dtype=bool))
    found = [encoder.moments(*group) for group in groups]
    encoder.merge([none, found[0], counted_by_nobody, *found[1:], none])
    for group in groups:
        other.observe(*group)
    for name, expected in other.named_buffers():
        assert torch.equal(encoder.get_buffer(name), expected)
    assert encoder.normalizer.squares.isfinite().all()


def test_it_takes_part_in_no_gradient():
    encoder = Encoder(spaces.Box(-1, 1, (2,)), normalize=True)
    encoder.observe(torch.randn(4, 3, 2, generator=generator()), torch.ones(4, 3, dtype=bool))
    assert list(encoder.parameters()) == []
    assert not encoder(torch.zeros(1, 2)).requires_grad


def test_without_normalization_nothing_is_observed():
    encoder = Encoder(spaces.Box(-1, 1, (2,)))
    encoder.observe(torch.ones(4, 3, 2), torch.ones(4, 3, dtype=bool))
    assert encoder.state_dict() == {}


def test_statistics_change_after_the_update_only():
    """An iteration sees one and the same normalization, and the next one what it counted."""
    envs = make_envs("environments:Pay-v0", 3)
    torch.manual_seed(0)
    spaces_ = envs.single_observation_space, envs.single_action_space
    policy = Policy(*spaces_, hidden_sizes=(4,), normalize_obs=True)
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    seen, calls = [], []

    def noticed(module, args, output):
        calls.append((args[0].clone(), output.detach().clone()))

    policy.encoder.normalizer.register_forward_hook(noticed)
    for iteration in range(3):
        calls.clear()
        rollout = collect(envs, policy, num_steps=8, seed=1, iteration=iteration)
        collected = len(calls)
        rollout.obs[~rollout.mask] = math.nan
        update(policy, optimizer, rollout, torch.zeros(rollout.mask.shape), Config())
        assert 0 < collected < len(calls)
        whole = np.concatenate(seen) if seen else None
        for x, output in calls:
            expected = x.double().numpy()
            if seen:
                expected = (expected - whole.mean(axis=0)) / whole.std(axis=0)
            np.testing.assert_allclose(output, expected.clip(-10, 10), rtol=1e-5, atol=1e-5)
        seen.append(rollout.obs[rollout.mask].double().numpy())
        assert policy.encoder.normalizer.count == sum(map(len, seen))


def test_statistics_are_saved_with_the_policy(tmp_path):
    box = spaces.Box(-np.inf, np.inf, (2,))
    policy = Policy(box, spaces.Box(-1, 1, (3,)), normalize_obs=True)
    policy.observe(*poisoned((20, 3), 1e6, 0.5, 0))
    save_policy(tmp_path / "checkpoints" / "1", policy)
    again = load_policy(tmp_path)
    obs = np.random.default_rng(0).normal([1e6, 0.0], 1.0, (50, 2))
    assert np.array_equal(again.act(obs), policy.act(obs))
    fresh = Policy.from_description(policy.description())
    fresh.network.load_state_dict(policy.network.state_dict())
    assert not np.array_equal(fresh.act(obs), policy.act(obs))
    for name in ("count", "mean", "squares"):
        one, other = (getattr(each.encoder.normalizer, name) for each in (again, policy))
        assert torch.equal(one, other)
        assert one.dtype == torch.float64


# -- Layers and dropout --------------------------------------------------------------------------


def test_parameters_are_drawn_by_one_thread_at_a_time():
    def two_layers(between):
        first = torch.nn.Linear(2, 2).weight
        between()
        return [first, torch.nn.Linear(2, 2).weight]

    with drawn_from(1):
        expected = two_layers(lambda: None)
    inside, done = threading.Event(), threading.Event()

    def other():
        with drawn_from(2):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)

    def between():
        thread.start()
        assert not inside.wait(0.2)

    torch.manual_seed(3)
    with drawn_from(1):
        found = two_layers(between)
    done.set()
    thread.join(10)
    assert inside.is_set()
    assert all(map(torch.equal, found, expected))
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)


def test_generators_of_other_devices_are_left_alone(monkeypatch):
    """Nobody would restore them; and the numbers are those that torch's own seed gives."""
    torch.manual_seed(2**40 + 7)
    expected = fully_connected(3, (5,), 2, "tanh", 1.0), torch.nn.Embedding(3, 2), torch.rand(3)
    for name in ("manual_seed", "manual_seed_all", "seed_all", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, None)
    with drawn_from(2**40 + 7):
        found = fully_connected(3, (5,), 2, "tanh", 1.0), torch.nn.Embedding(3, 2), torch.rand(3)
    assert all(map(torch.equal, found[0].parameters(), expected[0].parameters()))
    assert torch.equal(found[1].weight, expected[1].weight)
    assert torch.equal(found[2], expected[2])


def test_layers_are_as_asked_for():
    network = fully_connected(3, (7, 5), 2, "relu", last_gain=0.01)
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    gains = [math.sqrt(2), math.sqrt(2), 0.01]
    for layer, gain in zip(network[::2], gains, strict=True):
        short = layer.weight if layer.out_features <= layer.in_features else layer.weight.t()
        torch.testing.assert_close(short @ short.t(), gain**2 * torch.eye(len(short)))
        assert not layer.bias.any()
    assert [type(layer).__name__ for layer in fully_connected(3, (), 2, "tanh", 1.0)] == ["Linear"]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("hidden_sizes", [(4,), (5, 3), ()])
def test_dropout_is_that_of_a_loop(hidden_sizes, activation):
    torch.manual_seed(0)
    network = fully_connected(3, hidden_sizes, 2, activation, last_gain=1.0)
    rows, p = 6, 0.375
    features = torch.randn(rows, 3)
    uniforms = torch.rand(sum(hidden_sizes), rows)
    if hidden_sizes:
        uniforms[0, 0], uniforms[0, 1] = p, p - 2**-24  # kept, and dropped
    result = through(network, features, p, uniforms)
    for row in range(rows):
        below, unit = features[row].double().tolist(), 0
        for number, layer in enumerate(network[::2]):
            above = [
                sum(w * x for w, x in zip(weights, below, strict=True)) + bias
                for weights, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
            if number < len(hidden_sizes):
                for i, value in enumerate(above):
                    value = max(value, 0.0) if activation == "relu" else math.tanh(value)
                    above[i] = 0.0 if uniforms[unit, row] < p else value / (1 - p)
                    unit += 1
            below = above
        assert result[row].tolist() == pytest.approx(below, rel=1e-5, abs=1e-6)


def test_dropout_keeps_expectations():
    network = fully_connected(1, (4,), 1, "relu", last_gain=1.0)
    x = torch.ones(200_000, 1)
    outputs = through(network, x, 0.5, torch.rand(4, len(x), generator=generator()))
    error = outputs.std().item() / math.sqrt(len(x))
    assert abs(outputs.mean().item() - network(x[:1]).item()) < 4 * error
    assert error > 0
