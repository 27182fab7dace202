"""`ifvit shards merge`: one dataset of several, with nothing lost and nothing twice."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.config import EncodeConfig, MergeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import check_unique, merge, verify
from ifvit.errors import UserError
from ifvit.shards import Manifest, ShardEntry, ShardReader, read_manifest


def encode_part(config: EncodeConfig, name: str, first: int, last: int) -> str:
    """Encode images number `first` to `last - 1` into a dataset of their own; returns its URL."""
    content = json.loads(Path(config.captions).read_text())
    chosen = sorted(image["id"] for image in content["images"])[first:last]
    content["images"] = [image for image in content["images"] if image["id"] in chosen]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in chosen]
    captions = Path(config.captions).with_name(f"{name}.json")
    captions.write_text(json.dumps(content))
    part = replace(config, captions=str(captions), output=str(captions.with_suffix("")))
    assert encode(part) is not None
    return part.output


@pytest.fixture
def parts(config: EncodeConfig) -> list[str]:
    return [encode_part(config, "a", 0, 4), encode_part(config, "b", 4, 10)]


def test_the_merged_set_is_the_whole_set(config: EncodeConfig, parts: list[str]) -> None:
    merged = config.output + "_merged"
    merge(MergeConfig(urls=parts, output=merged))
    verify(ShardsConfig(url=merged))
    whole = encode(config)  # its first shard has four images too
    assert isinstance(whole, Manifest)
    manifest = read_manifest(merged)
    assert manifest.num_samples == whole.num_samples
    assert manifest.num_captions == whole.num_captions
    assert manifest.latent_mean == pytest.approx(whole.latent_mean)
    assert manifest.latent_std == pytest.approx(whole.latent_std)
    assert [entry.name for entry in manifest.shards] == [f"shard-0000{n}" for n in range(3)]
    left, right = ShardReader(merged), ShardReader(config.output)
    for sample in range(10):
        assert left.moments(sample).tobytes() == right.moments(sample).tobytes()
        assert left.metadata(sample) == right.metadata(sample)


def test_a_shard_that_would_count_twice_is_refused(parts: list[str], tmp_path: Path) -> None:
    for urls in ([*parts, parts[0]], [parts[0], parts[0]]):
        with pytest.raises(UserError, match=r"a/shard-00000.tar and .*the same shard"):
            merge(MergeConfig(urls=urls, output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged").exists()


def test_shards_without_images_may_be_alike() -> None:
    entry = ShardEntry(
        name="shard-00000",
        num_samples=0,
        num_captions=0,
        num_bytes=10240,
        sha256="of an empty tar",
        index_sha256="",
    )
    check_unique([("a", entry), ("b", entry)])


def test_other_recipes_are_refused_by_name(
    config: EncodeConfig, parts: list[str], other_encoders: object, tmp_path: Path
) -> None:
    others = {
        "dtype": replace(config, dtype="float32"),
        "flipped": replace(config, flip=True),
        "null_context": replace(config, precision="bf16"),
        "vae": replace(config, vae=str(other_encoders.vae)),  # type: ignore[attr-defined]
        "text_encoder": replace(config, text_encoder=str(other_encoders.text_encoder)),  # type: ignore[attr-defined]
    }
    for key, other in others.items():
        url = encode_part(other, f"other_{key}", 4, 10)
        with pytest.raises(UserError, match=f"cannot be merged with .* they differ in {key}"):
            merge(MergeConfig(urls=[parts[0], url], output=str(tmp_path / "merged")))


def test_a_damaged_shard_is_not_copied_on(parts: list[str], tmp_path: Path) -> None:
    tar = Path(parts[1], "shard-00001.tar")
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001\.tar: damaged"):
        merge(MergeConfig(urls=parts, output=str(tmp_path / "merged")))
    assert not (tmp_path / "merged" / "manifest.json").exists()


def test_an_existing_dataset_is_not_overwritten(parts: list[str]) -> None:
    with pytest.raises(UserError, match="already contains a dataset"):
        merge(MergeConfig(urls=parts, output=parts[0]))


def test_one_dataset_is_nothing_to_merge(parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two"):
        merge(MergeConfig(urls=parts[:1], output=str(tmp_path / "merged")))
