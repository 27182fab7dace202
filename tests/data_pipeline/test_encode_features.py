"""Features of an image encoder in the shards: their numbers, their flips, and their errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_files import finish, hashes, image_files, undisturbed_hashes, without_markers

from data_pipeline.config import EncodeConfig, InspectConfig, MergeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.shard_tools import inspect_shards, merge, stats, verify
from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.images import read_square, to_model_range
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.image_encoders import ImageEncoder, load_image_encoder
from ifvit.shards.reader import ShardReader


@pytest.fixture
def config(config: EncodeConfig) -> EncodeConfig:
    return replace(config, image_encoder="scenes/clip", flip=True)


def test_shards_hold_the_features_of_images_and_flips(config: EncodeConfig) -> None:
    manifest = finish(replace(config, dtype="float32"))
    encoder = load_image_encoder("scenes/clip")
    assert manifest.features == encoder.encoding
    assert manifest.features.shape == (64, 96)
    images = [read_square(p.read_bytes(), 32, ImageRules()).pixels for p in image_files(config)]
    found = np.empty((10, 64, 96), np.float16)
    for hflip in (False, True):
        pixels = to_model_range(np.stack(images))
        expected = encoder.encode(pixels.flip(-1) if hflip else pixels)
        ShardReader(config.output).read_features(np.arange(10), found, np.full(10, hflip))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_datasets_with_features_are_verified_described_and_merged(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(config)
    verify(ShardsConfig(url=config.output))
    other = replace(config, output=config.output + "_other", samples_per_shard=5)
    finish(other)
    merged = config.output + "_merged"
    merge(MergeConfig(urls=[config.output, other.output], output=merged))
    verify(ShardsConfig(url=merged))
    capsys.readouterr()
    stats(ShardsConfig(url=merged))
    inspect_shards(InspectConfig(url=merged, num_samples=2))
    assert capsys.readouterr().out.count("features 64x96, horizontal flips") == 2
    np.testing.assert_equal(read_first(merged), read_first(config.output))


def read_first(url: str) -> np.ndarray:
    features = np.empty((1, 64, 96), np.float16)
    ShardReader(url).read_features(np.array([0]), features)
    return features


def test_an_interrupted_job_continues_to_the_same_bytes(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed_hashes(config)
    encodes, original = [], ImageEncoder.encode

    def interrupt(encoder: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        encodes.append(len(images))
        if len(encodes) == 8:
            raise KeyboardInterrupt
        return original(encoder, images)

    monkeypatch.setattr(ImageEncoder, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(config)
    finish(config)
    assert hashes(config) == expected


def test_edited_captions_leave_the_features(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(config)
    captions = Path(config.captions)
    captions.write_text(captions.read_text().replace("cat number", "lion number"))
    expected = without_markers(undisturbed_hashes(config))
    for encoder in (ImageEncoder, Autoencoder):
        monkeypatch.setattr(encoder, "encode", None)  # a call would fail
    finish(config)
    assert without_markers(hashes(config)) == expected


def test_another_image_encoder_is_another_job(config: EncodeConfig) -> None:
    finish(config)
    with pytest.raises(UserError, match=r"image_encoder_sha256 is .* there, None now"):
        encode(replace(config, image_encoder=None))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_features_that_cannot_be_stored_name_the_image(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    original = ImageEncoder.encode

    def damage(encoder: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        features = original(encoder, images)
        features[1:2, 5, 3] = value
        return features

    monkeypatch.setattr(ImageEncoder, "encode", damage)
    name = image_files(config)[1].name
    with pytest.raises(UserError, match=f"the image encoder gave features of {name} that"):
        encode(config)
    assert not Path(config.output, "shard-00000.tar").exists()
