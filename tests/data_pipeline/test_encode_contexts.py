"""Contexts in the shards: without padding, in 8 bits, or not at all."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from encoded_files import finish, hashes, image_files, undisturbed_hashes, without_markers
from made_text_encoders import make_text_encoder

from data_pipeline.completion import list_marked
from data_pipeline.config import EncodeConfig, InspectConfig, MergeConfig, ShardsConfig
from data_pipeline.encode import encode
from data_pipeline.encoders import Encoders
from data_pipeline.shard_io import read_samples, to_int8, write_shard
from data_pipeline.shard_tools import inspect_shards, merge, stats, verify
from ifvit.conditions import rows_of
from ifvit.errors import UserError
from ifvit.models.autoencoders import Autoencoder
from ifvit.models.config import TextOptions
from ifvit.models.text_encoders import load_text_encoder
from ifvit.shards.format import LatentSample, read_manifest, write_manifest
from ifvit.shards.reader import ShardReader


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_text_encoder("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture
def ragged(config: EncodeConfig, t5: str) -> EncodeConfig:
    """The recipe with a T5, whose contexts have the tokens of each caption only."""
    captions = Path(str(config.captions))
    long = "cat number 5 beside two red circles above a blue square"
    captions.write_text(captions.read_text().replace("cat number 5", long))
    return replace(config, text_encoder=t5, text=TextOptions(precision="fp32"))


@pytest.fixture(params=["float16", "int8"])
def recipe(ragged: EncodeConfig, request: pytest.FixtureRequest) -> EncodeConfig:
    return replace(ragged, int8_context=request.param == "int8")


def all_samples(config: EncodeConfig) -> Iterator[LatentSample]:
    for entry in read_manifest(config.output).shards:
        yield from read_samples(Path(config.output, f"{entry.name}.tar"))


def test_shards_hold_the_tokens_of_each_caption_without_padding(ragged: EncodeConfig) -> None:
    manifest = finish(ragged)
    verify(ShardsConfig(url=ragged.output))
    reader, encoder = (
        ShardReader(ragged.output),
        load_text_encoder(str(ragged.text_encoder), options=ragged.text),
    )
    assert manifest.text is not None
    assert manifest.text.encoder == encoder.identity
    lengths = set()
    for sample in range(len(reader)):
        for caption, text in enumerate(reader.metadata(sample).captions):
            (expected,) = rows_of(encoder.encode([text]))
            context = reader.context(sample, caption)
            assert context.shape == expected.shape
            np.testing.assert_allclose(context, expected, rtol=2e-3, atol=2e-4)
            lengths.add(len(context))
    assert len(lengths) > 2
    np.testing.assert_array_equal(reader.null_context, encoder.null_context().half())
    assert len(reader.null_context) == 1  # the end token alone


def test_the_lines_of_the_documentation_read_the_context_of_each_caption(
    recipe: EncodeConfig,
) -> None:
    finish(replace(recipe, samples_per_shard=3))
    page = Path(__file__).parents[2].joinpath("docs/data.md").read_text()
    (lines,) = re.findall(r"```python\n(for sample in webdataset.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {
        "webdataset": webdataset,
        "numpy": np,
        "url": f"{recipe.output}/shard-00000.tar",
    }
    exec(lines, found)  # the loop ends with sample number 2
    reader = ShardReader(recipe.output)
    assert found["sample"]["json"]["captions"] == ["a dog", "cat number 2", "a dog"]
    for caption, context in enumerate(found["contexts"]):
        np.testing.assert_allclose(context, reader.context(2, caption), rtol=1e-3, atol=1e-6)


def test_an_8_bit_token_differs_by_at_most_half_its_scale() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.normal(size=(200, 33)) * 10.0 ** generator.uniform(-20, 20, (200, 1))
    tokens[7] = 0.0
    tokens[8], tokens[8, 3] = 0.0, -5.0
    tokens[9] = np.arange(33) - 16.5  # two values are as far from zero as any
    tokens = tokens.astype(np.float32)
    stored, scale = to_int8(tokens)
    error = np.abs(tokens - stored.astype(np.float64) * scale[:, None])
    assert (error <= scale[:, None] * (0.5 + 1e-5)).all()
    assert (np.abs(stored).max(axis=1) == np.where(scale > 0, 127, 0)).all()
    assert scale[7] == 0.0
    assert scale.dtype == np.float32


def test_8_bit_contexts_are_those_of_float32_within_half_a_scale(ragged: EncodeConfig) -> None:
    exact = replace(ragged, dtype="float32", output=ragged.output + "_exact")
    small = replace(exact, int8_context=True, output=ragged.output + "_small")
    for config in (exact, small):
        finish(config)
        verify(ShardsConfig(url=config.output))
    reader = ShardReader(small.output)
    for number, (left, right) in enumerate(zip(*map(all_samples, (exact, small)), strict=True)):
        assert right.context is not None
        assert right.context.dtype == np.int8
        np.testing.assert_array_equal(left.context_lengths, right.context_lengths)
        stored = right.context * right.context_scale[:, None]
        assert (np.abs(left.context - stored) <= right.context_scale[:, None] * 0.50001).all()
        contexts = [reader.context(number, k) for k in range(reader.num_captions(number))]
        np.testing.assert_array_equal(np.concatenate(contexts), stored)


def test_partitions_and_interrupted_jobs_make_the_same_bytes(
    recipe: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed_hashes(recipe)
    parts = replace(recipe, output=recipe.output + "_parts")
    for task in (1, 0):
        encode(replace(parts, num_tasks=2, task=task))
    assert hashes(parts) == expected
    calls, original = [], Encoders.encode

    def interrupt(encoders: Encoders, batch: object) -> object:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(encoders, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Encoders, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode(recipe)
    assert len(list_marked(recipe.output)) == 1
    finish(recipe)
    assert hashes(recipe) == expected


def test_edited_captions_leave_the_moments(
    recipe: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(recipe)
    captions = Path(str(recipe.captions))
    captions.write_text(captions.read_text().replace("cat number 4", "a lion and another lion"))
    expected = without_markers(undisturbed_hashes(recipe))
    monkeypatch.setattr(Autoencoder, "encode", None)  # a call would fail
    finish(recipe)
    assert without_markers(hashes(recipe)) == expected


def test_the_batch_size_changes_only_how_numbers_are_rounded(ragged: EncodeConfig) -> None:
    for batch_size in (1, 10):
        name = f"{ragged.output}_{batch_size}"
        finish(replace(ragged, batch_size=batch_size, output=name))
    left, right = (ShardReader(f"{ragged.output}_{size}") for size in (1, 10))
    for sample in range(len(left)):
        assert left.metadata(sample) == right.metadata(sample)
        for caption in range(left.num_captions(sample)):
            pair = [reader.context(sample, caption) for reader in (left, right)]
            np.testing.assert_allclose(*pair, rtol=2e-3, atol=2e-4)


def test_repeated_captions_do_not_keep_padded_batches_alive(ragged: EncodeConfig) -> None:
    kept = []
    original = Encoders.encode

    def record(encoders: Encoders, batch: object) -> object:
        encoded = original(encoders, batch)  # type: ignore[arg-type]
        kept.extend(encoders._kept.values())
        return encoded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoders, "encode", record)
        finish(replace(ragged, samples_per_shard=10))
    assert kept
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in kept)


def test_a_context_that_is_not_finite_names_caption_image_and_remedy(
    ragged: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ifvit.models.text_encoders._hidden_state", fail_for_long_captions)
    name = image_files(ragged)[5].name
    expected = rf"{name}: .* caption cat number 5 beside .* in fp32; use --text.precision bf16"
    with pytest.raises(UserError, match=expected):
        encode(ragged)


def fail_for_long_captions(model: object, settings: object, **inputs: torch.Tensor) -> torch.Tensor:
    shape = (*inputs["input_ids"].shape, 32)
    lengths = inputs["attention_mask"].sum(dim=1)
    return torch.where(lengths > 12, math.nan, 1.0)[:, None, None].expand(shape)


def test_captions_without_contexts_need_no_text_encoder(
    config: EncodeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_pipeline.encoders.load_text_encoder", None)  # a call would fail
    computed = replace(config, context="computed", text_encoder=None)
    manifest = finish(computed)
    assert (manifest.text, manifest.num_captions) == (None, 19)
    assert not Path(computed.output, "null_context.npy").exists()
    assert all(sample.context is None for sample in all_samples(computed))
    assert ShardReader(computed.output).metadata(2).captions == ("a dog", "cat number 2", "a dog")
    other = replace(computed, output=config.output + "_other", samples_per_shard=5)
    finish(other)
    merged = config.output + "_merged"
    merge(MergeConfig(urls=[computed.output, other.output], output=merged))
    for url in (computed.output, merged):
        verify(ShardsConfig(url=url))
        stats(ShardsConfig(url=url))
        inspect_shards(InspectConfig(url=url, num_samples=3))
    assert "3: a dog" in capsys.readouterr().out


def test_recipes_that_contradict_themselves_are_one_line(config: EncodeConfig) -> None:
    wrong = {
        r"text_encoder: scenes/clip is set, but context: computed": {"context": "computed"},
        r"text_encoder: not set; .* or set context: computed": {"text_encoder": None},
        r"int8_context: true, but no contexts": {
            "context": "computed",
            "text_encoder": None,
            "int8_context": True,
        },
    }
    for named, fields in wrong.items():
        with pytest.raises(UserError, match=named) as caught:
            encode(replace(config, **fields))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_settings_that_change_the_bytes_are_another_job(config: EncodeConfig) -> None:
    encode(config)
    others = {
        "int8_context is False there, True now": {"int8_context": True},
        "text_encoder_sha256 is .* there, None now": {"context": "computed", "text_encoder": None},
    }
    for named, fields in others.items():
        with pytest.raises(UserError, match=named):
            encode(replace(config, **fields))  # type: ignore[arg-type]


def test_stats_print_tokens_and_bytes_of_a_caption(
    recipe: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(recipe)
    capsys.readouterr()
    stats(ShardsConfig(url=recipe.output))
    text = capsys.readouterr().out
    lengths = np.concatenate([sample.context_lengths for sample in all_samples(recipe)])
    num_bytes = lengths.mean() * (32 + 4 if recipe.int8_context else 64)
    assert f"{lengths.min()} to {lengths.max()}, mean {lengths.mean():.2f} tokens" in text
    assert f"{num_bytes:,.0f} bytes per caption" in text
    assert "context up to 256x32" in text
    assert ("256x32 int8" in text) == recipe.int8_context


def test_8_bit_contexts_are_merged_with_their_kind_only(ragged: EncodeConfig) -> None:
    outputs = []
    for number, int8_context in enumerate((True, True, False)):
        part = replace(ragged, output=f"{ragged.output}_{number}", samples_per_shard=4 + number)
        finish(replace(part, int8_context=int8_context))
        outputs.append(part.output)
    merge(MergeConfig(urls=outputs[:2], output=ragged.output))
    verify(ShardsConfig(url=ragged.output))
    with pytest.raises(UserError, match="they differ in text_encoder"):
        merge(MergeConfig(urls=outputs[1:], output=ragged.output + "_wrong"))


def test_verify_finds_scales_and_sources_that_do_not_fit(
    ragged: EncodeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(ragged, int8_context=True, samples_per_shard=10)
    manifest = finish(recipe)
    samples = list(all_samples(recipe))
    for number, value in ((0, -1.0), (1, np.nan), (2, 1e6)):
        scale = np.array(samples[number].context_scale)
        scale[-1] = value
        samples[number] = replace(samples[number], context_scale=scale)
    metadata = replace(samples[3].metadata, sources=(0,) * len(samples[3].metadata.captions))
    samples[3] = replace(samples[3], metadata=metadata)
    samples[4] = replace(samples[4], context_scale=None)
    samples[5] = replace(samples[5], context=np.float16(samples[5].context))
    entry = write_shard(recipe.output, manifest.shards[0].name, samples)
    write_manifest(recipe.output, replace(manifest, shards=(entry,)))
    with pytest.raises(UserError):
        verify(ShardsConfig(url=recipe.output))
    text = capsys.readouterr().out
    keys = [sample.key for sample in samples]
    for number, named in enumerate(
        (
            "context_scale.npy has values below 0 or too large",
            "context_scale.npy has values that are not finite",
            "context_scale.npy has values below 0 or too large for float16",
            "json has or lacks sources",
            "context_scale.npy is missing",
            "context.npy is float16 (",
        )
    ):
        assert f"{keys[number]}.{named}" in text
