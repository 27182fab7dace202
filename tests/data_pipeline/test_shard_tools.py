"""`ifvit shards verify | stats | inspect | merge` on intact and damaged datasets."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoded_files import finish, flip_bit
from PIL import Image

from data_pipeline.config import EncodeConfig, InspectConfig, MergeConfig, ShardsConfig
from data_pipeline.shard_io import write_shard
from data_pipeline.shard_tools import check_unique, inspect_shards, merge, stats, verify
from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.shards.cache import read_index
from ifvit.shards.format import (
    LatentSample,
    SampleMetadata,
    ShardEntry,
    ShardError,
    read_manifest,
    write_manifest,
)
from ifvit.shards.index import index_bytes
from ifvit.shards.reader import ShardReader

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def dataset(config: EncodeConfig, capsys: Capture) -> Path:
    finish(config)
    capsys.readouterr()
    return Path(config.output)


def problems(dataset: Path, capsys: Capture) -> list[str]:
    """The lines that verify prints; it must fail and name their number."""
    with pytest.raises(UserError) as caught:
        verify(ShardsConfig(url=str(dataset)))
    lines = capsys.readouterr().out.splitlines()
    assert f"{len(lines)} problems" in str(caught.value)
    return lines


def test_an_intact_dataset_passes(dataset: Path, capsys: Capture) -> None:
    verify(ShardsConfig(url=str(dataset)))
    assert "3 shards, 10 images, 19 captions: every hash" in capsys.readouterr().out


def test_every_flipped_bit_of_shards_and_null_context_is_found(
    dataset: Path, capsys: Capture
) -> None:
    generator = np.random.default_rng(0)
    files = [*dataset.glob("*.tar"), *dataset.glob("*.npy")]
    for _ in range(40):
        path = files[generator.integers(len(files))]
        intact = path.read_bytes()
        flip_bit(path, int(generator.integers(len(intact))), int(generator.integers(8)))
        (line,) = problems(dataset, capsys)
        assert path.name in line
        path.write_bytes(intact)


def test_all_problems_are_listed(dataset: Path, capsys: Capture) -> None:
    tar = dataset / "shard-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    (dataset / "shard-00001.index.npz").unlink()
    (dataset / "shard-00002.tar").unlink()
    lines = problems(dataset, capsys)
    assert [name in line for name, line in zip(("00000", "00001", "00002"), lines, strict=True)]
    assert all("run the encode again" in line for line in lines)


def test_wrong_content_with_a_right_hash_is_found(dataset: Path, capsys: Capture) -> None:
    manifest = read_manifest(str(dataset))
    sample = LatentSample(
        key="000000000001",
        moments=np.full((8, 4, 4), np.nan, np.float32),
        flipped=np.zeros((8, 4, 4), np.float16),
        label=3,
        context=np.zeros((4, 15), np.float16),
        context_lengths=np.array([1, 3], np.int32),
        metadata=SampleMetadata(image_id=1, captions=("one", "two"), width=8, height=8),
    )
    entry = write_shard(str(dataset), "shard-00002", [sample])
    shards = (*manifest.shards[:2], replace(entry, num_samples=2, num_captions=3))
    totals = {key: sum(getattr(s, key) for s in shards) for key in ("num_samples", "num_captions")}
    write_manifest(str(dataset), replace(manifest, shards=shards, **totals))
    text = "\n".join(problems(dataset, capsys))
    for named in (
        "moments.npy has values that are not finite",
        "moments.npy is float32 (8, 4, 4), not float16 (8, 4, 4)",
        "flipped.npy is present",
        "cls is 3",
        "context.npy has tokens of width 15",
        "context_lengths.npy is not what contexts of shape",
        "shard-00002.index.npz: keys is |S12 (1,), the manifest says (2,)",
        "holds (samples, captions) (1, 2), the manifest says (2, 3)",
    ):
        assert named in text


def test_an_index_with_a_wrong_offset_is_found(dataset: Path, capsys: Capture) -> None:
    manifest = read_manifest(str(dataset))
    first, *others = manifest.shards
    index = read_index(dataset, manifest, first)
    index.moments[0, 0] += 2
    data = index_bytes(index)
    (dataset / f"{first.name}.index.npz").write_bytes(data)
    first = replace(first, index_sha256=hashlib.sha256(data).hexdigest())
    write_manifest(str(dataset), replace(manifest, shards=(first, *others)))
    (line,) = problems(dataset, capsys)
    assert "shard-00000.tar: index does not point to the members" in line


def test_a_folder_without_manifest_is_not_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"manifest\.json: no such file"):
        verify(ShardsConfig(url=str(tmp_path)))


def test_stats_print_counts_scaling_factor_and_bytes(dataset: Path, capsys: Capture) -> None:
    stats(ShardsConfig(url=str(dataset)))
    text = capsys.readouterr().out
    assert "10 in 3 shards" in text
    assert "19; 1 to 3, mean 1.90 per image" in text
    assert f"{read_manifest(str(dataset)).scaling_factor:.5f}" in text
    assert f"{sum(path.stat().st_size for path in dataset.glob('*.tar')):,}" in text


def test_inspect_lists_samples_and_decodes_their_latents(
    dataset: Path, capsys: Capture, tmp_path: Path
) -> None:
    grid = tmp_path / "pictures" / "grid.png"
    inspect_shards(InspectConfig(url=str(dataset), num_samples=9, grid=str(grid)))
    text = capsys.readouterr().out
    assert "36x42" in text
    assert "3: a dog" in text
    assert Image.open(grid).size == (8 * 34 - 2, 2 * 34 - 2)


def test_inspect_decodes_only_with_the_vae_that_made_the_latents(
    dataset: Path, other_encoders: EncodeConfig, tmp_path: Path
) -> None:
    grid, vae = str(tmp_path / "grid.png"), other_encoders.vae
    with pytest.raises(UserError, match="not the autoencoder that made"):
        inspect_shards(InspectConfig(url=str(dataset), grid=grid, vae=vae))


def encode_part(config: EncodeConfig, name: str, first: int, last: int) -> str:
    """Encode images `first` to `last - 1` as a dataset of their own and return its folder."""
    content = json.loads(Path(config.captions).read_text())
    chosen = sorted(image["id"] for image in content["images"])[first:last]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    captions = Path(config.captions).with_name(f"{name}.json")
    captions.write_text(json.dumps(content))
    part = replace(config, captions=str(captions), output=str(captions.with_suffix("")))
    finish(part)
    return part.output


@pytest.fixture
def parts(config: EncodeConfig) -> list[str]:
    return [encode_part(config, "a", 0, 4), encode_part(config, "b", 4, 10)]


def test_a_merged_dataset_equals_one_that_is_encoded_at_once(
    config: EncodeConfig, parts: list[str]
) -> None:
    merged = config.output + "_merged"
    merge(MergeConfig(urls=parts, output=merged))
    verify(ShardsConfig(url=merged))
    whole, manifest = finish(config), read_manifest(merged)
    assert manifest.num_samples == whole.num_samples
    assert manifest.num_captions == whole.num_captions
    assert manifest.latent_mean == pytest.approx(whole.latent_mean)
    assert manifest.latent_std == pytest.approx(whole.latent_std)
    assert manifest.channel_mean == pytest.approx(whole.channel_mean)
    assert manifest.channel_std == pytest.approx(whole.channel_std)
    assert [entry.name for entry in manifest.shards] == [f"shard-0000{n}" for n in range(3)]
    left, right = ShardReader(merged), ShardReader(config.output)
    for sample in range(10):
        assert left.moments(sample).tobytes() == right.moments(sample).tobytes()
        assert left.metadata(sample) == right.metadata(sample)


def test_a_shard_that_would_count_twice_is_an_error(parts: list[str], tmp_path: Path) -> None:
    for urls in ([*parts, parts[0]], [parts[0], parts[0]]):
        with pytest.raises(UserError, match=r"a/shard-00000.tar and .*the same shard"):
            merge(MergeConfig(urls=urls, output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match=r"a/(shard-\d+)\.tar and .*a/\1\.tar: the same shard"):
        merge(MergeConfig(urls=[*parts, *parts], output=str(tmp_path / "merged")))
    empty = ShardEntry(
        name="s",
        num_samples=0,
        num_captions=0,
        num_bytes=10240,
        sha256="0" * 64,
        index_sha256="0" * 64,
    )
    check_unique([("a", empty), ("b", empty)])


def test_datasets_that_were_encoded_differently_are_not_merged(
    config: EncodeConfig, parts: list[str], other_encoders: EncodeConfig, tmp_path: Path
) -> None:
    others = {
        "dtype": replace(config, dtype="float32"),
        "flipped": replace(config, flip=True),
        "image_rules": replace(config, image_rules=ImageRules(background="black")),
        "text_encoder, null_context": replace(config, precision="bf16"),
        "vae": replace(config, vae=other_encoders.vae),
        "text_encoder": replace(config, text_encoder=other_encoders.text_encoder),
        "image_encoder": replace(config, image_encoder="scenes/clip"),
    }
    for key, other in others.items():
        url = encode_part(other, f"other_{key.rpartition(' ')[2]}", 4, 10)
        with pytest.raises(UserError, match=f"they differ in {key}"):
            merge(MergeConfig(urls=[parts[0], url], output=str(tmp_path / "merged")))


def test_a_damaged_shard_is_not_copied(parts: list[str], tmp_path: Path) -> None:
    flip_bit(Path(parts[1], "shard-00001.tar"), 700)
    with pytest.raises(UserError, match=r"shard-00001\.tar: damaged"):
        merge(MergeConfig(urls=parts, output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged" / "manifest.json").exists()


def test_merge_needs_two_datasets_and_a_new_output(parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already contains a dataset"):
        merge(MergeConfig(urls=parts, output=parts[0]))
    Path(parts[0], "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="holds shards of an encode job"):
        merge(MergeConfig(urls=[parts[1], parts[1]], output=parts[0]))
    with pytest.raises(UserError, match="at least two"):
        merge(MergeConfig(urls=parts[:1], output=str(tmp_path / "merged")))
