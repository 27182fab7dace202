"""Random numbers follow the published generator and depend on nothing but their arguments."""

import math

import numpy as np
import pytest
import torch

from ifvit.rng import (
    Stream,
    normal,
    permutation,
    philox,
    uniform,
    uniform_array,
)

# kat_vectors of the Random123 library, philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    sampled = philox(torch.tensor([words(counter)]), low | high << 32)
    assert sampled[0].tolist() == words(result)


def test_a_random_number_depends_on_its_position_and_not_on_its_neighbours() -> None:
    together = normal(5, 17, torch.arange(10), Stream.NOISE, (3, 2))
    alone = [normal(5, 17, torch.tensor([i]), Stream.NOISE, (3, 2)) for i in (9, 0, 4)]
    assert torch.equal(torch.cat(alone), together[[9, 0, 4]])
    assert torch.equal(normal(5, 17, torch.arange(10), Stream.NOISE, (6,)), together.flatten(1))


def test_normal_numbers_are_box_and_mullers_of_the_published_words() -> None:
    first, second, *_ = philox(torch.tensor([[0, 3, 17, Stream.NOISE]]), 5)[0].tolist()
    radius = math.sqrt(-2 * math.log(((first >> 8) + 1) / 2**24))
    angle = 2 * math.pi * (second >> 8) / 2**24
    sampled = normal(5, 17, torch.tensor([3]), Stream.NOISE, (2,))[0]
    assert sampled.tolist() == pytest.approx([radius * math.cos(angle), radius * math.sin(angle)])


def test_numpy_and_torch_give_equal_numbers() -> None:
    positions = torch.tensor([0, 1, 7, 2**31, 2**32 - 1])
    for seed in (0, 1234, 2**40 + 7):
        by_torch = uniform(seed, 10**6, positions, Stream.FLIP, 1)[:, 0]
        np.testing.assert_array_equal(
            uniform_array(seed, 10**6, positions.numpy(), Stream.FLIP), by_torch.numpy()
        )


@pytest.mark.parametrize("change", ["seed", "step", "position", "stream"])
def test_every_part_of_the_counter_changes_the_number(change: str) -> None:
    arguments = {"seed": 1, "step": 2, "position": 3, "stream": Stream.NOISE}
    other = {**arguments, change: Stream.CAPTION if change == "stream" else 9}

    def sample(seed: int, step: int, position: int, stream: Stream) -> torch.Tensor:
        return uniform(seed, step, torch.tensor([position]), stream, 8)

    assert not torch.equal(sample(**arguments), sample(**other))  # type: ignore[arg-type]


def test_moments_are_those_of_the_distribution() -> None:
    z = normal(0, 0, torch.arange(1000), Stream.NOISE, (200,)).double()
    size = z.numel()
    assert z.mean().abs() < 4 / math.sqrt(size)
    assert (z.var() - 1).abs() < 4 * math.sqrt(2 / size)
    assert (z**4).mean().item() == pytest.approx(3, abs=4 * math.sqrt(96 / size))
    correlation = (z[:, 0::2] * z[:, 1::2]).mean()
    assert correlation.abs() < 4 / math.sqrt(size / 2)
    u = uniform(0, 0, torch.arange(1000), Stream.NOISE, 200)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / size))


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_the_outermost_random_bits_give_finite_numbers(
    word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.rng._words", lambda *_: torch.full((1, 8), word))
    assert normal(0, 0, torch.arange(1), Stream.NOISE, (8,)).isfinite().all()
    assert 0 <= uniform(0, 0, torch.arange(1), Stream.NOISE, 8).max() < 1


def test_a_permutation_holds_everything_once() -> None:
    order = permutation(7, 2, 1000)
    assert sorted(order.tolist()) == list(range(1000))
    others = [
        permutation(7, 3, 1000),
        permutation(7, 2, 1000, Stream.SHARD_ORDER),
        permutation(7, 2, 1000, start=1000),
    ]
    assert not any(torch.equal(order, other) for other in others)
