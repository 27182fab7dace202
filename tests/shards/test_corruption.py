"""Each of 2,000 random corruptions is an error that names file and remedy, or changes nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from made_shards import make_samples, write_shards

from ifvit.arrays import Array
from ifvit.shards.format import LatentSample, ShardError
from ifvit.shards.reader import ShardReader

NUM_CORRUPTIONS = 2000
NUM_SAMPLES = 4

Corruption = Callable[[bytearray, np.random.Generator], bytes]


def flip_bit(data: bytearray, random: np.random.Generator) -> bytes:
    data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    return data


def overwrite(data: bytearray, random: np.random.Generator) -> bytes:
    start, length = random.integers(len(data)), random.integers(1, 4096)
    end = min(start + length, len(data))
    data[start:end] = random.bytes(end - start)
    return data


def blank(data: bytearray, random: np.random.Generator) -> bytes:
    start, length = random.integers(len(data)), random.integers(1, 4096)
    end = min(start + length, len(data))
    data[start:end] = bytes(end - start)
    return data


def cut(data: bytearray, random: np.random.Generator) -> bytes:
    return data[: random.integers(len(data))]


def extend(data: bytearray, random: np.random.Generator) -> bytes:
    return bytes(data) + random.bytes(int(random.integers(1, 600)))


def swap_pages(data: bytearray, random: np.random.Generator) -> bytes:
    """Two blocks change places, as when a file system mixes up its map."""
    size = min(512, len(data) // 2)
    first, second = (random.integers(len(data) // size, size=2) * size).tolist()
    data[first : first + size], data[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return data


CORRUPTIONS: list[Corruption] = [flip_bit, overwrite, blank, cut, extend, swap_pages]


def read_everything(folder: Path) -> tuple[Array, Array, list[object]]:
    """Read what training and evaluation use: moments, both ways, contexts and metadata."""
    reader = ShardReader(str(folder))
    samples = np.arange(NUM_SAMPLES)
    moments = np.empty((2, NUM_SAMPLES, *reader.manifest.moments_shape), np.float16)
    for hflip, out in enumerate(moments):
        reader.read_moments(samples, out, np.full(NUM_SAMPLES, bool(hflip)))
    counts = reader.caption_counts(samples)
    every_caption = np.concatenate([np.arange(-1, count) for count in counts])
    contexts = np.empty((len(every_caption), *reader.text.context_shape), np.float16)
    reader.read_contexts(np.repeat(samples, counts + 1), every_caption, contexts)
    return moments, contexts, [reader.metadata(number) for number in range(NUM_SAMPLES)]


@pytest.fixture
def samples() -> list[LatentSample]:
    return make_samples(NUM_SAMPLES, moments_shape=(8, 4, 4), context_shape=(5, 6), flipped=True)


def test_no_corruption_reaches_a_batch(tmp_path: Path, samples: list[LatentSample]) -> None:
    write_shards(tmp_path, samples, (3, 1))
    intact = read_everything(tmp_path)
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    random = np.random.default_rng(0)
    harmless = 0
    for number in range(NUM_CORRUPTIONS):
        path = files[number % len(files)]
        before = path.read_bytes()
        corrupt = CORRUPTIONS[number // len(files) % len(CORRUPTIONS)]
        path.write_bytes(corrupt(bytearray(before), random))
        try:
            found = read_everything(tmp_path)
        except ShardError as error:
            message = str(error)
            assert path.name in message
            assert "again" in message
            assert "\n" not in message
        else:
            harmless += 1
            np.testing.assert_array_equal(found[0], intact[0])
            np.testing.assert_array_equal(found[1], intact[1])
            assert found[2] == intact[2]
        path.write_bytes(before)
    # Tar headers, padding, npy headers, blank space of the manifest: a fifth of such small shards.
    assert 0 < harmless < NUM_CORRUPTIONS / 2
