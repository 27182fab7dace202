"""The encode job: the right numbers, and the same bytes however often it was interrupted."""

import json
import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from data_pipeline.write import write_shard
from ifvit.errors import UserError
from ifvit.images import read_square, to_model_range
from ifvit.models.autoencoder import load_autoencoder
from ifvit.models.clip import TextEncoder, load_text_encoder
from ifvit.shards import ShardReader
from ifvit.storage import sha256_of


def hashes(config: EncodeConfig) -> dict[str, str]:
    """Every file of the output, hidden ones too, and its hash."""
    folder = Path(config.output)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_of(path) for path in files}


def image_files(config: EncodeConfig) -> list[Path]:
    return sorted(Path(config.images).iterdir())


def test_shards_hold_what_the_encoders_say(config: EncodeConfig) -> None:
    manifest = encode(config)
    reader = ShardReader(config.output)
    vae = load_autoencoder(config.vae)
    text_encoder = load_text_encoder(config.text_encoder)
    assert reader.manifest == manifest
    assert (len(reader), manifest.num_captions, len(manifest.shards)) == (10, 19, 3)
    for sample, path in enumerate(image_files(config)):
        image = read_square(path, 32)
        moments = vae.encode(to_model_range(np.stack([image.pixels])))[0]
        np.testing.assert_allclose(reader.moments(sample), moments, rtol=2e-3, atol=2e-4)
        metadata = reader.metadata(sample)
        assert (metadata.width, metadata.height) == (36, 40 + sample)
        for caption, text in enumerate(metadata.captions):
            context = text_encoder.encode([text])[0]
            np.testing.assert_allclose(
                reader.context(sample, caption), context, rtol=2e-3, atol=2e-4
            )
    np.testing.assert_allclose(reader.null_context, text_encoder.null_context(), rtol=2e-3)


def test_latent_statistics_are_those_of_posterior_draws(config: EncodeConfig) -> None:
    manifest = encode(config)
    reader = ShardReader(config.output)
    moments = np.stack([reader.moments(sample) for sample in range(len(reader))])
    mean, logvar = np.split(moments.astype(np.float64), 2, axis=1)
    noise = np.random.default_rng(0).standard_normal((500, *mean.shape))
    draws = mean + np.exp(0.5 * logvar) * noise
    assert manifest.latent_mean == pytest.approx(mean.mean())
    assert manifest.latent_std == pytest.approx(draws.std(), rel=5e-3)


def test_equal_captions_of_a_batch_are_encoded_once(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    original = TextEncoder.encode

    def record(encoder: TextEncoder, captions: list[str]) -> torch.Tensor:
        asked.append(captions)
        return original(encoder, captions)

    monkeypatch.setattr(TextEncoder, "encode", record)
    encode(config)
    assert all(len(captions) == len(set(captions)) for captions in asked)
    assert max(map(len, asked)) == 3  # "a dog" and two different cats


def test_webdataset_reads_the_shards_without_this_library(config: EncodeConfig) -> None:
    encode(config)
    url = f"{config.output}/shard-{{00000..00002}}.tar"
    found = list(webdataset.WebDataset(url, shardshuffle=False).decode())
    reader = ShardReader(config.output)
    assert [sample["json"]["image_id"] for sample in found] == [7 * n + 3 for n in range(10)]
    for number, sample in enumerate(found):
        np.testing.assert_array_equal(sample["moments.npy"], reader.moments(number))
        assert sample["context.npy"].shape == (len(sample["json"]["captions"]), 12, 16)
        np.testing.assert_array_equal(sample["context.npy"][0], reader.context(number, 0))


def test_a_rerun_encodes_nothing_and_changes_no_byte(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    before = hashes(config)
    monkeypatch.setattr("data_pipeline.encode.write_shard", None)
    encode(config)
    assert hashes(config) == before


def test_another_output_folder_receives_the_same_bytes(config: EncodeConfig) -> None:
    other = replace(config, output=config.output + "_2", num_workers=5)
    encode(config)
    encode(other)
    assert hashes(other) == hashes(config)


@pytest.mark.parametrize(
    "lost",
    [
        "shard-00001.tar",
        "shard-00001.index.npz",
        "receipts/shard-00000.json",
        "manifest.json",
        "null_context.npy",
    ],
)
def test_a_lost_file_is_made_again_byte_for_byte(config: EncodeConfig, lost: str) -> None:
    encode(config)
    before = hashes(config)
    (Path(config.output) / lost).unlink()
    encode(config)
    assert hashes(config) == before


def test_cut_shards_and_damaged_receipts_are_made_again(config: EncodeConfig) -> None:
    encode(config)
    before = hashes(config)
    tar = Path(config.output, "shard-00001.tar")
    tar.write_bytes(tar.read_bytes()[:-512])
    receipt = Path(config.output, "receipts", "shard-00002.json")
    receipt.write_text(receipt.read_text().replace("e", "f", 1))
    encode(config)
    assert hashes(config) == before


def test_sigkill_at_random_moments_leaves_the_undisturbed_dataset(config: EncodeConfig) -> None:
    config = replace(config, samples_per_shard=1, batch_size=1)
    undisturbed = replace(config, output=config.output + "_undisturbed")
    started = time.monotonic()
    encode(undisturbed)
    duration = time.monotonic() - started
    context = multiprocessing.get_context("fork")  # others would import torch for seconds
    chance = random.Random(0)
    killed_between_shards = 0
    for _ in range(10):
        process = context.Process(target=encode, args=(config,))
        process.start()
        process.join(chance.uniform(0.3, 1.0) * duration)
        process.kill()
        process.join()
        receipts = sorted(Path(config.output).glob("receipts/*.json"))
        killed_between_shards += 0 < len(receipts) < 10
        for receipt in chance.sample(receipts, len(receipts) // 2):
            receipt.unlink()
    assert killed_between_shards
    encode(config)
    assert hashes(config) == hashes(undisturbed)


def test_no_manifest_exists_while_shards_are_being_made(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    Path(config.output, "receipts", "shard-00001.json").unlink()

    def stop(*_: Any) -> None:
        assert not Path(config.output, "manifest.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.encode.write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(config)


def test_another_encoder_is_refused_with_what_differs(
    config: EncodeConfig, other_encoders: Any
) -> None:
    encode(config)
    other = replace(config, vae=str(other_encoders.vae))
    with pytest.raises(UserError, match=r"vae_sha256 is .* choose another output folder"):
        encode(other)
    with pytest.raises(UserError, match="dtype is float16 there, float32 now"):
        encode(replace(config, dtype="float32"))


def test_another_source_is_refused(config: EncodeConfig) -> None:
    encode(config)
    annotations = Path(config.captions)
    annotations.write_text(annotations.read_text().replace("a dog", "a fox"))
    with pytest.raises(UserError, match="source_sha256"):
        encode(config)


def test_values_beyond_the_dtype_are_refused(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(_: TextEncoder, captions: list[str]) -> torch.Tensor:
        return torch.full((len(captions), 12, 16), 1e6)

    monkeypatch.setattr(TextEncoder, "encode", overflow)
    with pytest.raises(UserError, match=r"shard-00000: .* float16 cannot hold; try float32"):
        encode(config)
    assert not Path(config.output, "shard-00000.tar").exists()


def test_an_image_size_that_does_not_fit_the_vae_is_refused(config: EncodeConfig) -> None:
    with pytest.raises(UserError, match="image_size 30"):
        encode(replace(config, image_size=30))


def test_a_recipe_with_impossible_numbers_is_refused(config: EncodeConfig) -> None:
    for key in ("batch_size", "samples_per_shard", "num_workers", "image_size"):
        with pytest.raises(UserError, match=f"{key} is 0"):
            replace(config, **{key: 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tolerate is -1"):
        replace(config, tolerate=-1)


def truncate(path: Path) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return data


def test_a_broken_image_fails_the_end_of_the_job_by_name(
    config: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = image_files(config)[5]
    truncate(broken)
    with pytest.raises(UserError, match=rf"1 of 10 images .*{broken.name} \(.*truncated"):
        encode(config)
    assert str(broken) in capsys.readouterr().err
    assert not Path(config.output, "manifest.json").exists()
    receipts = sorted(Path(config.output, "receipts").iterdir())
    counts = [json.loads(path.read_text())["shard"]["num_samples"] for path in receipts]
    assert counts == [4, 3, 2]  # everything else was encoded


def test_missing_files_count_as_broken_and_the_first_are_named(config: EncodeConfig) -> None:
    files = image_files(config)
    for path in files[:5]:
        path.unlink()
    with pytest.raises(UserError, match=r"5 of 10 images .*No such file.*receipts") as caught:
        encode(config)
    assert [path.name in str(caught.value) for path in files] == [True] * 3 + [False] * 7


def test_tolerated_failures_are_left_out_of_a_finished_dataset(config: EncodeConfig) -> None:
    for path in image_files(config)[8:]:  # the whole last shard
        truncate(path)
    with pytest.raises(UserError, match="2 of 10"):
        encode(replace(config, tolerate=1))
    manifest = encode(replace(config, tolerate=2))
    assert [entry.num_samples for entry in manifest.shards] == [4, 4, 0]
    reader = ShardReader(config.output)
    assert [reader.metadata(sample).image_id for sample in range(len(reader))] == [
        7 * number + 3 for number in range(8)
    ]


def test_a_mended_image_makes_only_its_shard_again(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = replace(config, output=config.output + "_undisturbed")
    encode(undisturbed)
    broken = image_files(config)[5]
    data = truncate(broken)
    with pytest.raises(UserError):
        encode(config)
    broken.write_bytes(data)
    names = []

    def record(folder: Path, name: str, samples: Any) -> Any:
        names.append(name)
        return write_shard(folder, name, samples)

    monkeypatch.setattr("data_pipeline.encode.write_shard", record)
    encode(config)
    assert names == ["shard-00001"]
    assert hashes(config) == hashes(undisturbed)
