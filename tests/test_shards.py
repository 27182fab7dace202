"""Shards: round trip, only the needed bytes, and every kind of damage named at opening."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.write import npy_bytes, write_shard
from ifvit.shards import (
    EncoderIdentity,
    LatentSample,
    Manifest,
    SampleMetadata,
    ShardError,
    ShardReader,
    TextEncoding,
    read_manifest,
    write_manifest,
)

MOMENTS_SHAPE = (8, 4, 4)
CONTEXT_SHAPE = (5, 6)
NUM_SAMPLES = 7


def make_samples() -> list[LatentSample]:
    generator = np.random.default_rng(0)
    samples = []
    for number in range(NUM_SAMPLES):
        captions = tuple(f"{number} Käse, caption {k}" for k in range(number % 3 + 1))
        samples.append(
            LatentSample(
                key=f"{number:012d}",
                moments=generator.standard_normal(MOMENTS_SHAPE).astype(np.float16),
                context=generator.standard_normal((len(captions), *CONTEXT_SHAPE)).astype("f2"),
                metadata=SampleMetadata(image_id=number, captions=captions, width=9, height=8),
            )
        )
    return samples


@pytest.fixture
def samples() -> list[LatentSample]:
    return make_samples()


@pytest.fixture
def dataset(tmp_path: Path, samples: list[LatentSample]) -> Path:
    """Shards of 3, 3 and 1 samples with a manifest."""
    folder = tmp_path / "shards"
    shards = tuple(
        write_shard(folder, f"shard-{k:05d}", samples[3 * k : 3 * k + 3]) for k in range(3)
    )
    null_context = npy_bytes(np.ones(CONTEXT_SHAPE, np.float16))
    (folder / "null_context.npy").write_bytes(null_context)
    manifest = Manifest(
        vae=EncoderIdentity(name="vae", sha256="0" * 64),
        text=TextEncoding(
            encoder=EncoderIdentity(name="clip", sha256="1" * 64),
            context_shape=CONTEXT_SHAPE,
            null_context_sha256=hashlib.sha256(null_context).hexdigest(),
        ),
        image_size=32,
        dtype="float16",
        moments_shape=MOMENTS_SHAPE,
        num_samples=NUM_SAMPLES,
        num_captions=sum(len(sample.context) for sample in samples),
        latent_mean=0.1,
        latent_std=4.0,
        shards=shards,
    )
    write_manifest(str(folder), manifest)
    return folder


def test_reader_returns_what_was_written(dataset: Path, samples: list[LatentSample]) -> None:
    reader = ShardReader(str(dataset))
    assert len(reader) == NUM_SAMPLES
    assert reader.manifest.scaling_factor == 0.25
    np.testing.assert_array_equal(reader.null_context, np.ones(CONTEXT_SHAPE))
    for number, sample in enumerate(samples):
        assert reader.metadata(number) == sample.metadata
        assert reader.num_captions(number) == len(sample.context)
        assert reader.moments(number).dtype == np.float16
        np.testing.assert_array_equal(reader.moments(number), sample.moments)
        for caption, context in enumerate(sample.context):
            np.testing.assert_array_equal(reader.context(number, caption), context)


def test_manifest_survives_a_round_trip(dataset: Path) -> None:
    manifest = read_manifest(str(dataset))
    write_manifest(str(dataset / "copy"), manifest)
    assert read_manifest(str(dataset / "copy")) == manifest


def test_only_the_chosen_captions_bytes_are_read(
    dataset: Path, samples: list[LatentSample]
) -> None:
    chosen = samples[2].context[1]
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


@pytest.mark.parametrize("sample", [-1, NUM_SAMPLES])
def test_a_sample_out_of_range_is_refused(dataset: Path, sample: int) -> None:
    with pytest.raises(IndexError, match=str(sample)):
        ShardReader(str(dataset)).moments(sample)


def test_a_caption_out_of_range_is_refused(dataset: Path) -> None:
    with pytest.raises(IndexError, match="has 2 captions, asked for number 2"):
        ShardReader(str(dataset)).context(1, 2)


def cut_tar(folder: Path) -> None:
    path = folder / "shard-00001.tar"
    path.write_bytes(path.read_bytes()[:-1])


def remove_tar(folder: Path) -> None:
    (folder / "shard-00001.tar").unlink()


def remove_index(folder: Path) -> None:
    (folder / "shard-00001.index.npz").unlink()


def flip_index(folder: Path) -> None:
    path = folder / "shard-00001.index.npz"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def swap_index(folder: Path) -> None:
    data = (folder / "shard-00002.index.npz").read_bytes()
    (folder / "shard-00001.index.npz").write_bytes(data)


def flip_null_context(folder: Path) -> None:
    (folder / "null_context.npy").write_bytes(npy_bytes(np.zeros(CONTEXT_SHAPE, np.float16)))


def edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"latent_std": 4.0', '"latent_std": 5.0'))


def cut_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def raise_format_version(folder: Path) -> None:
    write_manifest(str(folder), replace(read_manifest(str(folder)), format_version=3))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (cut_tar, "shard-00001.tar: 10239 bytes, the manifest says 10240"),
        (remove_tar, "shard-00001.tar: no such shard"),
        (remove_index, "shard-00001.index.npz: no such index"),
        (flip_index, "shard-00001.index.npz: index does not match"),
        (swap_index, "shard-00001.index.npz: index does not match"),
        (flip_null_context, "null_context.npy"),
        (edit_manifest, "manifest.json: damaged"),
        (cut_manifest, "manifest.json: damaged"),
        (remove_manifest, "manifest.json: no such file"),
        (raise_format_version, "format_version is 3"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_named_when_the_dataset_is_opened(
    dataset: Path, damage: object, named: str
) -> None:
    assert callable(damage)
    damage(dataset)
    with pytest.raises(ShardError, match=named) as caught:
        ShardReader(str(dataset))
    assert "\n" not in str(caught.value)


def test_any_changed_character_of_the_manifest_shows(dataset: Path) -> None:
    path = dataset / "manifest.json"
    intact = path.read_bytes()
    manifest = read_manifest(str(dataset))
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
