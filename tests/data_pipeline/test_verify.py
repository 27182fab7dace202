"""`ifvit shards verify | stats | inspect` on whole and damaged datasets."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import EncodeConfig, InspectConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_io import write_shard
from data_pipeline.shard_tools import inspect_shards, stats, verify
from ifvit.errors import UserError
from ifvit.shards import LatentSample, SampleMetadata, ShardError, read_manifest, write_manifest
from ifvit.shards.cache import read_index
from ifvit.shards.format import index_bytes


@pytest.fixture
def dataset(config: EncodeConfig) -> Path:
    encode(config)
    return Path(config.output)


def problems(dataset: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What verify prints; it must fail with the number of lines."""
    capsys.readouterr()
    with pytest.raises(UserError) as caught:
        verify(ShardsConfig(url=str(dataset)))
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(lines)} problems" in str(caught.value)
    return lines


def test_a_whole_dataset_passes(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    verify(ShardsConfig(url=str(dataset)))
    assert "3 shards, 10 images, 19 captions: every hash" in capsys.readouterr().out


def test_every_flipped_bit_of_shards_and_indexes_is_found(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    files = [*dataset.glob("*.tar"), *dataset.glob("*.npy")]
    for _ in range(40):
        path = files[generator.integers(len(files))]
        intact = path.read_bytes()
        data = bytearray(intact)
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        path.write_bytes(bytes(data))
        (line,) = problems(dataset, capsys)
        assert path.name in line
        path.write_bytes(intact)


def test_all_problems_are_listed_not_the_first(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = dataset / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    (dataset / "shard-00001.index.npz").unlink()
    (dataset / "shard-00002.tar").unlink()
    lines = problems(dataset, capsys)
    assert [name in line for name, line in zip(("00000", "00001", "00002"), lines, strict=True)]
    assert all("run the encode again" in line for line in lines)


def test_wrong_content_under_a_right_hash_is_found(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(str(dataset))
    sample = LatentSample(
        key="000000000001",
        moments=np.full((8, 4, 4), np.nan, np.float32),
        flipped=np.zeros((8, 4, 4), np.float16),
        label=3,
        context=np.zeros((1, 12, 15), np.float16),
        metadata=SampleMetadata(image_id=1, captions=("one", "two"), width=8, height=8),
    )
    entry = write_shard(dataset, "shard-00002", [sample])
    shards = (*manifest.shards[:2], replace(entry, num_samples=2))
    write_manifest(str(dataset), replace(manifest, shards=shards))
    text = "\n".join(problems(dataset, capsys))
    assert "moments.npy has values that are not finite" in text
    assert "moments.npy is float32 (8, 4, 4), not float16 (8, 4, 4)" in text
    assert "flipped.npy is present" in text
    assert "cls is 3, but there are 0 classes" in text
    assert "context.npy is float16 (1, 12, 15)" in text
    assert "index of 1 samples" in text
    assert "holds (samples, captions) (1, 2)" in text
    assert "num_captions is not the sum" in text


def test_an_index_that_points_elsewhere_is_found(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(str(dataset))
    first, *others = manifest.shards
    index = read_index(dataset, first)
    index.moments[0, 0] += 2
    data = index_bytes(index)
    (dataset / f"{first.name}.index.npz").write_bytes(data)
    first = replace(first, index_sha256=hashlib.sha256(data).hexdigest())
    write_manifest(str(dataset), replace(manifest, shards=(first, *others)))
    (line,) = problems(dataset, capsys)
    assert "shard-00000.tar: index does not point to the members" in line


def test_a_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: no such file"):
        verify(ShardsConfig(url=str(tmp_path)))


def test_stats_tell_counts_scaling_factor_and_bytes(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    stats(ShardsConfig(url=str(dataset)))
    text = capsys.readouterr().out
    total = sum(path.stat().st_size for path in dataset.glob("*.tar"))
    assert "10 in 3 shards" in text
    assert "19; 1 to 3, mean 1.90 per image" in text
    assert f"scaling factor   {read_manifest(str(dataset)).scaling_factor:.5f}" in text
    assert f"{total:,}" in text


def test_inspect_lists_samples_and_draws_their_latents(
    dataset: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    grid = tmp_path / "pictures" / "grid.png"
    inspect_shards(InspectConfig(url=str(dataset), num_samples=9, grid=str(grid)))
    text = capsys.readouterr().out
    assert "36x42" in text
    assert "3: a dog" in text
    assert Image.open(grid).size == (8 * 34 - 2, 2 * 34 - 2)


def test_inspect_draws_only_with_the_vae_that_made_the_latents(
    dataset: Path, other_encoders: Any, tmp_path: Path
) -> None:
    config = InspectConfig(
        url=str(dataset), grid=str(tmp_path / "grid.png"), vae=str(other_encoders.vae)
    )
    with pytest.raises(UserError, match="not the autoencoder that made"):
        inspect_shards(config)
