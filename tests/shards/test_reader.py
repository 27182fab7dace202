"""Datasets round-trip, reads touch only the needed bytes, and opening names every damage."""

import hashlib
import io
import json
import os
import pickle
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from made_shards import make_samples, write_shards

from ifvit import storage
from ifvit.arrays import npy_bytes
from ifvit.shards.cache import read_index
from ifvit.shards.format import (
    LatentSample,
    ShardError,
    parse_metadata,
    read_manifest,
    write_manifest,
)
from ifvit.shards.index import parse_index
from ifvit.shards.reader import ShardReader

MOMENTS_SHAPE = (8, 4, 4)
CONTEXT_SHAPE = (5, 6)
NUM_SAMPLES = 7


@pytest.fixture
def samples() -> list[LatentSample]:
    return make_samples(
        NUM_SAMPLES, moments_shape=MOMENTS_SHAPE, context_shape=CONTEXT_SHAPE, flipped=True
    )


@pytest.fixture
def dataset(tmp_path: Path, samples: list[LatentSample]) -> Path:
    """Shards of 3, 3 and 1 samples with a manifest."""
    folder = tmp_path / "shards"
    write_shards(folder, samples, (3, 3, 1))
    return folder


def test_reader_returns_what_was_written(dataset: Path, samples: list[LatentSample]) -> None:
    reader = ShardReader(str(dataset))
    assert len(reader) == NUM_SAMPLES
    assert reader.manifest.scaling_factor == pytest.approx(1 / 1.5)
    np.testing.assert_array_equal(reader.null_context, np.ones(CONTEXT_SHAPE))
    for number, sample in enumerate(samples):
        assert reader.metadata(number) == sample.metadata
        assert reader.num_captions(number) == len(sample.contexts)
        assert reader.moments(number).dtype == np.float16
        np.testing.assert_array_equal(reader.moments(number), sample.moments)
        np.testing.assert_array_equal(reader.moments(number, hflip=True), sample.flipped)
        for caption, context in enumerate(sample.contexts):
            np.testing.assert_array_equal(reader.context(number, caption), context)


def test_labels_are_read_as_written(tmp_path: Path) -> None:
    samples = make_samples(5, labelled=True)
    write_shards(tmp_path, samples, (3, 2))
    reader = ShardReader(str(tmp_path))
    assert [reader.label(number) for number in range(5)] == [0, 1, 0, 1, 0]
    assert reader.metadata(3) == samples[3].metadata
    with pytest.raises(ShardError, match="holds class labels, not captions"):
        reader.context(0, 0)
    with pytest.raises(ShardError, match="holds no horizontally flipped images"):
        reader.moments(0, hflip=True)


def test_a_batch_is_read_into_its_rows(dataset: Path, samples: list[LatentSample]) -> None:
    reader = ShardReader(str(dataset))
    chosen, captions = np.array([6, 2, 2, 0, 5]), np.array([0, 2, -1, 0, -1])
    np.testing.assert_array_equal(reader.caption_counts(chosen), [1, 3, 3, 1, 3])
    moments = np.empty((5, *MOMENTS_SHAPE), np.float16)
    reader.read_moments(chosen, moments, np.array([True, False, True, False, True]))
    contexts = np.empty((5, *CONTEXT_SHAPE), np.float16)
    reader.read_contexts(chosen, captions, contexts)
    for row, (number, caption) in enumerate(zip(chosen, captions, strict=True)):
        sample = samples[number]
        expected = sample.moments if row % 2 else sample.flipped
        np.testing.assert_array_equal(moments[row], expected)
        expected = np.ones(CONTEXT_SHAPE) if caption < 0 else sample.contexts[caption]
        np.testing.assert_array_equal(contexts[row], expected)


@pytest.mark.parametrize("flipped", [False, True])
def test_features_of_a_batch_are_read_into_its_rows(tmp_path: Path, flipped: bool) -> None:
    samples = make_samples(5, flipped=flipped, feature_shape=(4, 6))
    write_shards(tmp_path, samples, (3, 0, 2))
    reader = ShardReader(str(tmp_path))
    chosen, hflip = np.array([4, 0, 0, 2]), np.array([True, False, True, False])
    features = np.empty((4, 4, 6), np.float16)
    reader.read_features(chosen, features, hflip if flipped else None)
    for row, number in enumerate(chosen):
        is_flipped = flipped and hflip[row]
        expected = samples[number].flipped_features if is_flipped else samples[number].features
        np.testing.assert_array_equal(features[row], expected)


def test_a_damaged_feature_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, make_samples(2, feature_shape=(4, 6)), (2,))
    reader = ShardReader(str(tmp_path))
    offset = reader._index(0).features[1, 0]
    path = tmp_path / "shard-00000.tar"
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"000000000001\.features is damaged"):
        reader.read_features(np.array([0, 1]), np.empty((2, 4, 6), np.float16))


def test_shards_without_features_are_the_files_that_they_were(
    dataset: Path, samples: list[LatentSample]
) -> None:
    stored = np.load(dataset / "shard-00000.index.npz")
    names = (
        *("keys", "moments", "flipped", "metadata", "label"),
        *("first_caption", "context", "source"),
    )
    assert tuple(stored) == names
    assert "features" not in json.loads((dataset / "manifest.json").read_text())
    with pytest.raises(ShardError, match="holds no features; encode with --image_encoder"):
        ShardReader(str(dataset)).read_features(np.array([0]), np.empty((1, 4, 6), np.float16))


def num_open() -> int:
    """File descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def limit_of_macos() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("limit_of_macos")
def test_few_files_are_open_however_many_shards(tmp_path: Path) -> None:
    samples = make_samples(300)
    write_shards(tmp_path, samples, [1] * 300)
    before = num_open()
    reader = ShardReader(str(tmp_path))
    for number, sample in enumerate(samples):
        np.testing.assert_array_equal(reader.moments(number), sample.moments)
    assert num_open() == before + 64
    del reader
    assert num_open() == before


def test_damage_within_a_batch_is_named(tmp_path: Path) -> None:
    samples = make_samples(6)
    write_shards(tmp_path, samples, [1] * 6)
    tar = tmp_path / "shard-00005.tar"
    moments = samples[5].moments.tobytes()
    tar.write_bytes(tar.read_bytes().replace(moments, bytes(len(moments))))
    out = np.empty((6, *samples[0].moments.shape), np.float16)
    with pytest.raises(ShardError, match=r"shard-00005\.tar: 000000000005\.moments is damaged"):
        ShardReader(str(tmp_path)).read_moments(np.arange(6), out)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"captions": 3}', b'{"captions": []}'])
def test_damaged_metadata_is_named(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"^shard-00001 sample 3: "):
        parse_metadata(data, "shard-00001 sample 3")


def test_an_index_of_another_format_is_refused_and_nothing_unpickled(dataset: Path) -> None:
    manifest = read_manifest(str(dataset))
    entry = manifest.shards[0]
    buffer = io.BytesIO()
    np.savez(buffer, keys=np.zeros(1))
    with pytest.raises(ShardError, match=r"x: not an index of this format; encode again"):
        parse_index(buffer.getvalue(), "x", manifest, entry)
    index = vars(read_index(dataset, manifest, entry))
    buffer = io.BytesIO()
    np.savez(buffer, **{**index, "keys": np.array([{}], dtype=object)})  # type: ignore[arg-type]
    with pytest.raises(ShardError, match=r"x, keys\.npy: not an array of numbers or texts"):
        parse_index(buffer.getvalue(), "x", manifest, entry)


def test_a_tar_that_is_truncated_while_it_is_open_is_damage_not_a_crash(dataset: Path) -> None:
    reader = ShardReader(str(dataset))
    reader.moments(0)
    os.truncate(dataset / "shard-00000.tar", 2000)
    with pytest.raises(ShardError, match=r"shard-00000\.tar: 000000000002\.moments is damaged"):
        reader.moments(2)


def test_output_with_gaps_is_refused_and_not_filled_as_a_copy(dataset: Path) -> None:
    out = np.empty((1, *MOMENTS_SHAPE[:-1], MOMENTS_SHAPE[-1] + 1), np.float16)[..., :-1]
    with pytest.raises(ValueError, match="copy"):
        ShardReader(str(dataset)).read_moments(np.array([0]), out)


def test_only_the_chosen_captions_bytes_are_read(
    dataset: Path, samples: list[LatentSample]
) -> None:
    chosen = samples[2].contexts[1]
    path = dataset / "shard-00000.tar"
    data = path.read_bytes()
    start = data.index(chosen.tobytes())
    poisoned = b"\xff" * start + chosen.tobytes() + b"\xff" * (len(data) - start - chosen.nbytes)
    path.write_bytes(poisoned)
    np.testing.assert_array_equal(ShardReader(str(dataset)).context(2, 1), chosen)


def test_reader_travels_to_a_worker_without_its_data(dataset: Path) -> None:
    reader = ShardReader(str(dataset))
    expected = reader.moments(4)
    travelling = pickle.dumps(reader)
    assert len(travelling) < 1000
    np.testing.assert_array_equal(pickle.loads(travelling).moments(4), expected)


@pytest.mark.parametrize(
    ("sample", "caption", "named"),
    [(-1, 0, "-1"), (7, 0, "7"), (1, 2, "has 2 captions, asked .* 2")],
)
def test_a_number_out_of_range_is_an_index_error(
    sample: int, caption: int, named: str, dataset: Path
) -> None:
    with pytest.raises(IndexError, match=named):
        ShardReader(str(dataset)).context(sample, caption)


CHANGED_FILES: list[tuple[str, Callable[[bytes], bytes] | None, str]] = [
    ("shard-00001.tar", lambda data: data[:-1], "20479 bytes, the manifest says 20480"),
    ("shard-00001.tar", None, "no such file"),
    ("shard-00001.index.npz", None, "no such file"),
    ("shard-00001.index.npz", lambda data: data[:-1] + b"?", "index does not match"),
    ("null_context.npy", lambda data: data[:-1] + b"?", "damaged null context"),
    ("manifest.json", lambda data: data.replace(b'std": 1.5', b'std": 5.0'), "damaged"),
    ("manifest.json", lambda data: data[:100], "EOF"),
    ("manifest.json", None, "no such file"),
]


@pytest.mark.parametrize(("name", "change", "named"), CHANGED_FILES)
def test_a_changed_file_is_named_when_the_dataset_is_opened_or_its_shard_is_first_read(
    name: str, change: Callable[[bytes], bytes] | None, named: str, dataset: Path
) -> None:
    if change is None:
        (dataset / name).unlink()
    else:
        (dataset / name).write_bytes(change((dataset / name).read_bytes()))
    with pytest.raises(ShardError, match=rf"{name}: .*{named}") as caught:
        open_and_count_captions(dataset)
    assert "\n" not in str(caught.value)


def open_and_count_captions(folder: Path) -> None:
    ShardReader(str(folder)).caption_counts(np.arange(NUM_SAMPLES))


def exchange_indexes(folder: Path) -> None:
    data = (folder / "shard-00002.index.npz").read_bytes()
    (folder / "shard-00001.index.npz").write_bytes(data)


def add_key(folder: Path) -> None:
    url = str(folder / "manifest.json")
    storage.write_sealed(url, {**json.loads(storage.read_bytes(url)), "colour": "red"})


def change_manifest(folder: Path, **changes: object) -> None:
    """Change keys and seal again, as an attacker can."""
    url = str(folder / "manifest.json")
    storage.write_sealed(url, {**json.loads(storage.read_bytes(url)), **changes})


def reshape_null_context(folder: Path) -> None:
    data = npy_bytes(np.zeros((1, 2), np.float16))
    (folder / "null_context.npy").write_bytes(data)
    text = read_manifest(str(folder)).text
    assert text is not None
    sha256 = hashlib.sha256(data).hexdigest()
    change_manifest(folder, text=asdict(replace(text, null_context_sha256=sha256)))


@pytest.mark.parametrize(
    ("contradict", "named"),
    [
        (exchange_indexes, "shard-00001.index.npz: index does not match"),
        (partial(change_manifest, format_version=2), "format_version is 2"),
        (partial(change_manifest, format_version=[[["\x1b"]]]), r"format_version is .*x1b"),
        (partial(change_manifest, num_samples=8), "num_samples is not the sum over its shards"),
        (add_key, "manifest.json: colour"),
        (reshape_null_context, "null_context.npy: null context has dtype and shape"),
    ],
)
def test_files_that_contradict_each_other_are_named(
    contradict: Callable[[Path], None], named: str, dataset: Path
) -> None:
    contradict(dataset)
    with pytest.raises(ShardError, match=named):
        open_and_count_captions(dataset)


def test_a_manifest_round_trips_and_any_changed_character_shows(dataset: Path) -> None:
    path = dataset / "manifest.json"
    intact = path.read_bytes()
    manifest = read_manifest(str(dataset))
    write_manifest(str(dataset / "copy"), manifest)
    assert read_manifest(str(dataset / "copy")) == manifest
    generator = np.random.default_rng(0)
    for place in generator.integers(0, len(intact), 200):
        data = bytearray(intact)
        data[place] ^= 1 << int(generator.integers(0, 7))
        path.write_bytes(bytes(data))
        try:
            assert read_manifest(str(dataset)) == manifest  # blank became another blank
            assert json.loads(bytes(data)) == json.loads(intact)
        except ShardError:
            continue
