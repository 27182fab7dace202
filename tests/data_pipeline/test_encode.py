"""The encode job: the numbers in the shards are those of the encoders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from encoded_files import finish, image_files

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode, psnr
from data_pipeline.encoders import Batch, Encoders
from ifvit.errors import UserError
from ifvit.image_rules import ImageRules
from ifvit.images import read_square, to_model_range
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.text_encoders import TextEncoder, load_text_encoder
from ifvit.shards.reader import ShardReader


def encode_to(config: EncodeConfig, suffix: str) -> ShardReader:
    """Encode into another folder and open the result."""
    finish(replace(config, output=config.output + suffix))
    return ShardReader(config.output + suffix)


def test_shards_hold_the_outputs_of_the_encoders(config: EncodeConfig) -> None:
    manifest = finish(config)
    reader = ShardReader(config.output)
    vae = load_autoencoder(config.vae)
    text_encoder = load_text_encoder(config.text_encoder)
    assert reader.manifest == manifest
    assert (len(reader), manifest.num_captions, len(manifest.shards)) == (10, 19, 3)
    for sample, path in enumerate(image_files(config)):
        image = read_square(path.read_bytes(), 32, ImageRules())
        moments = vae.encode(to_model_range(np.stack([image.pixels])))[0]
        np.testing.assert_allclose(reader.moments(sample), moments, rtol=2e-3, atol=2e-4)
        metadata = reader.metadata(sample)
        assert (metadata.width, metadata.height) == (36, 40 + sample)
        for caption, text in enumerate(metadata.captions):
            context, expected = reader.context(sample, caption), text_encoder.encode([text])[0]
            np.testing.assert_allclose(context, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(reader.null_context, text_encoder.null_context(), rtol=2e-3)


def test_latent_statistics_agree_with_posterior_samples(config: EncodeConfig) -> None:
    manifest = finish(config)
    reader = ShardReader(config.output)
    moments = np.stack([reader.moments(sample) for sample in range(len(reader))])
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    noise = np.random.default_rng(0).standard_normal((500, *mean.shape))
    latents = mean + np.exp(0.5 * logvar) * noise
    assert manifest.latent_mean == pytest.approx(mean.mean())
    assert manifest.latent_std == pytest.approx(latents.std(), rel=5e-3)
    assert manifest.channel_mean == pytest.approx(mean.mean(axis=(0, 2, 3)))
    assert manifest.channel_std == pytest.approx(latents.std(axis=(0, 1, 3, 4)), rel=2e-2)


def test_equal_captions_of_a_shard_are_encoded_once(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, samples_per_shard=5)
    expected = encode_to(config, "_expected")
    encoded: list[str] = []
    original = TextEncoder.encode

    def record(encoder: TextEncoder, captions: list[str]) -> torch.Tensor:
        encoded.extend(captions)
        return original(encoder, captions)

    monkeypatch.setattr(TextEncoder, "encode", record)
    reader = encode_to(config, "_recorded")
    assert encoded.count("a dog") == 2  # once in each of the two shards
    assert len(encoded) == 2 + 6 + 1  # six cats, and the empty caption
    for sample in range(10):
        for caption in range(reader.num_captions(sample)):
            left, right = reader.context(sample, caption), expected.context(sample, caption)
            np.testing.assert_array_equal(left, right)


def test_bf16_gives_nearly_the_same_numbers(config: EncodeConfig) -> None:
    exact, rounded = encode_to(config, ""), encode_to(replace(config, precision="bf16"), "_bf16")
    for sample in range(10):
        np.testing.assert_allclose(rounded.moments(sample), exact.moments(sample), atol=0.1)
    assert rounded.moments(0).tobytes() != exact.moments(0).tobytes()


def test_the_number_of_cpu_threads_has_no_effect(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = set()
    original = Encoders.encode

    def record(encoders: Encoders, batch: Batch) -> Batch:
        used.add(torch.get_num_threads())
        return original(encoders, batch)

    monkeypatch.setattr(Encoders, "encode", record)
    torch.set_num_threads(2)
    encode(config)
    assert used == {1}
    assert torch.get_num_threads() == 2


def test_the_psnr_of_the_round_trip_is_printed_once(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(config)
    assert "round trip of 1 images: PSNR " in capsys.readouterr().out
    encode(config)
    assert "round trip" not in capsys.readouterr().out
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))


def test_webdataset_reads_the_shards_without_this_library(config: EncodeConfig) -> None:
    encode(config)
    url = f"{config.output}/shard-{{00000..00002}}.tar"
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    reader = ShardReader(config.output)
    assert [sample["json"]["image_id"] for sample in found] == [7 * n + 3 for n in range(10)]
    for number, sample in enumerate(found):
        np.testing.assert_array_equal(sample["moments.npy"], reader.moments(number))
        assert sample["context.npy"].shape == (len(sample["json"]["captions"]) * 16, 64)
        assert sample["context_lengths.npy"].tolist() == [16] * len(sample["json"]["captions"])
        np.testing.assert_array_equal(sample["context.npy"][:16], reader.context(number, 0))


@pytest.mark.parametrize("int8_context", [False, True])
def test_a_context_that_the_dtype_cannot_hold_names_caption_and_image(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, int8_context: bool
) -> None:
    def overflow(_: TextEncoder, captions: list[str]) -> torch.Tensor:
        large = torch.tensor([1e6 if caption == "cat number 2" else 1.0 for caption in captions])
        return large[:, None, None].expand(-1, 16, 64)

    monkeypatch.setattr(TextEncoder, "encode", overflow)
    name = image_files(config)[2].name
    with pytest.raises(UserError, match=f"{name} .* caption cat number 2 .*use --dtype float32"):
        encode(replace(config, int8_context=int8_context))
    assert not Path(config.output, "shard-00000.tar").exists()


def test_impossible_recipes_are_errors(config: EncodeConfig) -> None:
    for key in ("batch_size", "samples_per_shard", "num_workers", "image_size"):
        with pytest.raises(UserError, match=f"{key} is 0"):
            replace(config, **{key: 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tolerate is -1"):
        replace(config, tolerate=-1)
    with pytest.raises(UserError, match="image_size"):
        encode(replace(config, image_size=30))
    with pytest.raises(UserError, match="text_encoder: not set"):
        encode(replace(config, text_encoder=None))
