"""Inputs that change after they were encoded: a rerun encodes what has changed, and no more."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encoded_files import (
    finish,
    flip_bit,
    hashes,
    image_files,
    record_shards,
    truncate,
    without_markers,
)

from data_pipeline.completion import read_marker
from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit import storage
from ifvit.errors import UserError
from ifvit.models.autoencoders import Autoencoder
from ifvit.shards.reader import ShardReader


@pytest.fixture
def written(config: EncodeConfig, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written after the data set is finished."""
    finish(config)
    return record_shards(monkeypatch)


@pytest.fixture
def vae_batches(written: list[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the VAE encodes after the data set is finished."""
    sizes: list[int] = []
    original = Autoencoder.encode

    def record(vae: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return original(vae, images)

    monkeypatch.setattr(Autoencoder, "encode", record)
    return sizes


def rewrite_caption(config: EncodeConfig, old: str, new: str) -> None:
    path = Path(str(config.captions))
    path.write_text(path.read_text().replace(f'"{old}"', json.dumps(new)))


def test_an_image_that_is_overwritten_in_place_is_encoded_again(
    config: EncodeConfig, written: list[str]
) -> None:
    path = image_files(config)[5]
    before = ShardReader(config.output).moments(5)
    path.write_bytes(image_files(config)[0].read_bytes())
    finish(config)
    assert written == ["shard-00001"]
    assert (ShardReader(config.output).moments(5) != before).any()
    finish(config)
    assert written == ["shard-00001"]


def test_an_image_of_equal_size_is_known_by_its_time(
    config: EncodeConfig, written: list[str]
) -> None:
    path = image_files(config)[5]
    times = path.stat()
    flip_bit(path, times.st_size // 2)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    finish(config)
    assert written == ["shard-00001"]


def test_a_copied_folder_with_new_times_costs_no_encoding(
    config: EncodeConfig, written: list[str]
) -> None:
    before = without_markers(hashes(config))
    for path in image_files(config):
        os.utime(path, ns=(1, 1))
    finish(config)
    marker = read_marker(config.output, "shard-00000")
    finish(config)  # the new times are stored, so that no image is read again
    assert (written, without_markers(hashes(config))) == ([], before)
    assert read_marker(config.output, "shard-00000") == marker


def test_an_edited_caption_costs_its_text_but_no_image(
    config: EncodeConfig, written: list[str], vae_batches: list[int]
) -> None:
    rewrite_caption(config, "cat number 4", "a bird")
    finish(config)
    assert (written, sum(vae_batches)) == (["shard-00001"], 0)
    again = replace(config, output=config.output + "_again")
    finish(again)
    assert hashes(again) == hashes(config)  # as if everything were encoded with this caption


def test_a_flipped_data_set_keeps_both_moments(config: EncodeConfig) -> None:
    config = replace(config, flip=True)
    finish(config)
    rewrite_caption(config, "cat number 4", "a bird")
    finish(config)
    again = replace(config, output=config.output + "_again")
    finish(again)
    assert hashes(again) == hashes(config)


def test_moments_of_a_damaged_shard_are_not_used_again(
    config: EncodeConfig, written: list[str], vae_batches: list[int]
) -> None:
    flip_bit(Path(config.output, "shard-00001.tar"), 3000)
    rewrite_caption(config, "cat number 4", "a bird")
    finish(config)
    assert sum(vae_batches) == 4
    assert written == ["shard-00001"]


def test_images_that_are_gone_keep_their_latents_and_broken_ones_do_not(
    config: EncodeConfig, written: list[str]
) -> None:
    before = without_markers(hashes(config))
    image_files(config)[5].unlink()
    finish(config)
    assert (written, without_markers(hashes(config))) == ([], before)
    Path(config.output, "manifest.json").unlink()
    image_files(config)[0].unlink()
    finish(config)  # the round trip leaves this image out
    assert (written, without_markers(hashes(config))) == ([], before)
    truncate(image_files(config)[-1])
    with pytest.raises(UserError, match=r"1 of 10 images .*truncated"):
        encode(config)
    assert written == ["shard-00002"]


def test_new_captions_beside_an_image_that_is_gone_are_refused_and_nothing_is_lost(
    config: EncodeConfig, written: list[str]
) -> None:
    before = hashes(config)
    image_files(config)[5].unlink()
    rewrite_caption(config, "cat number 4", "a bird")
    with pytest.raises(UserError, match=r"shard-00001: 1 of its image files are gone"):
        encode(config)
    assert (written, hashes(config)) == ([], before)


def test_a_blank_caption_that_is_filled_in_admits_its_image(config: EncodeConfig) -> None:
    rewrite_caption(config, "cat number 4", "")
    rewrite_caption(config, "a dog", "")
    with pytest.raises(UserError, match=r"5 of 10 .*all its captions"):
        encode(config)
    rewrite_caption(config, "", "a horse")
    assert finish(config).num_samples == 10


def test_a_moved_folder_is_the_same_data_set(config: EncodeConfig, written: list[str]) -> None:
    moved = replace(config, images=config.images + "_moved")
    shutil.move(config.images, moved.images)
    finish(moved)
    assert written == []


@pytest.mark.s3
def test_objects_of_a_store_are_known_by_their_tags(
    config: EncodeConfig, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in image_files(config):
        storage.upload(path, f"{s3_bucket}/{path.name}")
    config = replace(config, images=s3_bucket)
    finish(config)
    written = record_shards(monkeypatch)
    paths = [f"{s3_bucket}/{name}" for name in storage.list_names(s3_bucket)]
    storage.write_bytes(paths[0], storage.read_bytes(paths[0]))  # another time, an equal tag
    finish(config)
    assert written == []
    storage.write_bytes(paths[0], storage.read_bytes(paths[1]))
    finish(config)
    assert written == ["shard-00000"]
