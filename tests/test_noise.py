import numpy as np
import pytest
import torch

from vecpg.noise import KeyedNoise, Purpose, StepNoise, Stream, philox, steps_at_once
from vecpg.policy import sampling

# The known answers that come with Random123 (kat_vectors, philox4x32-10).
VECTORS = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, words):
    assert [int(word) for word in philox([torch.tensor(c) for c in counter], key)] == words


def test_philox_agrees_with_plain_integers():
    generator = np.random.default_rng(0)
    counters = generator.integers(0, 2**32, (50, 4))
    key = (0x12345678, 0x9ABCDEF0)
    many = torch.stack(philox(list(torch.from_numpy(counters).T), key), dim=1)

    def one(c, k0, k1):
        c0, c1, c2, c3 = (int(x) for x in c)
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
            c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        return [c0, c1, c2, c3]

    assert many.tolist() == [one(c, *key) for c in counters]


def test_uniforms_are_uniform():
    numbers = Stream(3, 5, 0, 200).uniforms(range(1000), Purpose.ACTION).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for power in (1, 2, 3):
        expected, spread = 1 / (power + 1), (1 / (2 * power + 1) - 1 / (power + 1) ** 2) ** 0.5
        error = (numbers**power).mean().item() - expected
        assert abs(error) < 4 * spread / numbers.numel() ** 0.5


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"iteration": 6},
        {"first_env": 1},
        {"steps": range(1, 9)},
        {"purpose": Purpose.EVALUATION_RESET},
    ],
)
def test_every_part_of_the_key_matters(other):
    given = {
        "seed": 3,
        "iteration": 5,
        "first_env": 0,
        "steps": range(8),
        "purpose": Purpose.ACTION,
    }

    def draw(seed, iteration, first_env, steps, purpose):
        return Stream(seed, iteration, first_env, 8).uniforms(steps, purpose)

    assert not torch.isclose(draw(**given), draw(**given | other)).any()


def test_a_number_does_not_depend_on_what_is_drawn_with_it():
    whole = Stream(3, 5, 0, 8).uniforms(range(100), Purpose.ACTION)
    assert torch.equal(whole[40:64, :5], Stream(3, 5, 0, 5).uniforms(range(40, 64), Purpose.ACTION))


def test_numbers_taken_step_by_step_are_the_same():
    whole = Stream(3, 5, 0, 4).uniforms(range(200), Purpose.ACTION)
    noise = StepNoise(Stream(3, 5, 0, 4), Purpose.ACTION, torch.device("cpu"))
    for t in (0, 1, 63, 64, 65, 130, 2, 199):
        assert torch.equal(noise(t), whole[t][None])


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_several_numbers_for_a_step_are_those_of_the_words_in_turn(count):
    steps, envs = torch.tensor([0, 7, 200]), torch.tensor([2, 0, 1])
    numbers = Stream(3, 5, 0, 3).uniforms_at(steps, envs, Purpose.DROPOUT, count)
    assert numbers.shape == (count, 3)
    for i in range(count):
        for j in range(3):
            purpose = Purpose.DROPOUT + 256 * (i // 4)
            words = philox([steps[j], int(envs[j]), 5, purpose], (3, 0))
            assert numbers[i, j] == (int(words[i % 4]) >> 8) / 2**24
    noise = StepNoise(Stream(3, 5, 0, 3), Purpose.DROPOUT, torch.device("cpu"), count)
    for j in (2, 0, 1):
        assert torch.equal(noise(int(steps[j]))[:, envs[j]], numbers[:, j])


def test_environments_draw_different_numbers():
    numbers = Stream(3, 5, 0, 50).uniforms(range(50), Purpose.ACTION)
    assert numbers.unique().numel() == numbers.numel()


def test_reset_seeds_differ_between_environments_iterations_seeds_and_purposes():
    seeds = [
        one
        for seed in (1, 2)
        for iteration in range(50)
        for purpose in (Purpose.TRAINING_RESET, Purpose.CONFIRMATION_RESET)
        for one in Stream(seed, iteration, 0, 64).reset_seeds(purpose)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(type(one) is int and 0 <= one < 2**32 for one in seeds)


def test_a_part_of_the_environments_draws_what_it_draws_among_all():
    whole = Stream(2**64 - 1, 5, 0, 12)
    part = whole.part(4, 6).part(3, 2)
    assert part == Stream(2**64 - 1, 5, 7, 2)
    many = whole.uniforms(range(9), Purpose.START)
    assert torch.equal(part.uniforms(range(9), Purpose.START), many[:, 7:9])
    noise = StepNoise(part, Purpose.START, torch.device("cpu"))
    assert torch.equal(noise(8)[0], many[8, 7:9])
    seeds = whole.reset_seeds(Purpose.TRAINING_RESET)
    assert part.reset_seeds(Purpose.TRAINING_RESET) == seeds[7:9]
    # One seed for all of them is the same for every part.
    assert part.common_seed(Purpose.TRAINING_RESET) == seeds[0]


def test_the_first_reset_seeds_do_not_depend_on_how_many_there_are():
    few = Stream(7, 3, 0, 5).reset_seeds(Purpose.TRAINING_RESET)
    assert Stream(7, 3, 0, 500).reset_seeds(Purpose.TRAINING_RESET)[:5] == few


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**64 - 1])
def test_machine_code_draws_the_same_bits(seed):
    purpose = Purpose.EVALUATION_RESET
    stream = Stream(seed, 2**32 - 1, 0, 100)
    key = stream.key(purpose)
    many = stream.uniforms(range(5, 9), purpose)
    for t in range(5, 9):
        ours = [sampling.uniform(key, t, n) for n in range(100)]
        assert np.array_equal(np.array(ours, np.float32), many[t - 5].numpy())


def test_machine_code_makes_the_published_words():
    """The test vectors of Random123, "kat_vectors", philox4x32 with ten rounds."""
    word = 2**32 - 1
    for counter, seed, expected in (
        ([0] * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ([word] * 4, (word, word), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        key = np.array([*seed, counter[2], counter[3]], np.uint64)
        assert sampling.philox(key, counter[0], counter[1]) == expected


@pytest.mark.parametrize("seed", [5, 2**64 - 1])
def test_from_a_key_on_the_device_come_the_numbers_of_the_stream(seed):
    counts = {Purpose.ACTION: 1, Purpose.DROPOUT: 9, Purpose.START: 5}
    stream, starts = Stream(seed, 3, 7, 6), Stream(2**32 - 1, 0, 7, 6)
    noise = KeyedNoise(counts, 4, 6, torch.device("cpu"))
    key = torch.tensor([seed % 2**32, seed >> 32, 3, 2**32 - 1, 0, 7])
    for t in (0, 130):
        found = noise(key, torch.tensor([t]))
        rows, envs = torch.arange(t, t + 4)[:, None], torch.arange(6)
        for numbers, (purpose, count) in zip(found, counts.items(), strict=True):
            whose, after = (starts, 1) if purpose == Purpose.START else (stream, 0)
            wanted = whose.uniforms_at(rows + after, envs, purpose, count)
            assert torch.equal(numbers, wanted)
    assert KeyedNoise({}, 4, 6, torch.device("cpu"))(key, torch.tensor([0])) == []


def test_a_gpu_draws_far_more_numbers_at_once_than_a_cpu():
    host, device = torch.device("cpu"), torch.device("cuda")
    assert [steps_at_once(n, host) for n in (1, 2**14, 2**30)] == [64, 16, 1]
    assert [steps_at_once(n, device) for n in (1, 2**16, 2**30)] == [256, 128, 1]
