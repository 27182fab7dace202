"""Contexts of different lengths: read in batches, computed while training, resumed and replayed."""

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from made_backbone import small_shape
from made_contexts import make_captioned, write_contexts
from made_text_encoders import make_text_encoder
from run_files import finish, losses, rows, small_recipe, start
from safetensors import safe_open

from ifvit.conditions import Condition, PaddedContext, rows_of, tokens_of, with_tokens
from ifvit.distributed import World
from ifvit.errors import UserError
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import NullContext, TextOptions
from ifvit.models.text_encoders import TextEncoder, load_text_encoder
from ifvit.models.weights import load_weights
from ifvit.sampling.load import open_dataset_conditions
from ifvit.shards.reader import ShardReader
from ifvit.training import hooks
from ifvit.training.config import (
    CaptionConfig,
    EngineConfig,
    ReplayConfig,
    SampleGridConfig,
    TrainConfig,
    ValidationConfig,
)
from ifvit.training.data import Batch, Batches
from ifvit.training.order import BatchOrder, weigh_captions
from ifvit.training.replay import replay
from ifvit.training.train import train

KINDS = ("clip", "t5", "qwen3")
TEXT = TextOptions(max_length=40, precision="fp32")
SAMPLES = make_captioned(21)
HELD_OUT = make_captioned(21, seed=1)
SIZES = (12, 9)
CPU = torch.device("cpu")
WEIGHTS = {"short": CaptionConfig(weight=2.0), "long": CaptionConfig(dropout=0.5)}
EVERY_SOURCE = {**WEIGHTS, "original": CaptionConfig(weight=0.25)}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextEncoder]:
    """Loads a small random encoder by kind; contexts have at most 40 tokens."""

    @functools.cache
    def load(kind: str) -> TextEncoder:
        folder = make_text_encoder(kind, tmp_path_factory.mktemp("encoder") / kind)
        return load_text_encoder(folder, "cpu", TEXT)

    return load


@pytest.fixture(scope="module")
def datasets(
    encoders: Callable[[str], TextEncoder], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Writes shards of 21 images once for each kind of encoder and dtype; None: captions alone."""

    @functools.cache
    def write(kind: str | None, dtype: str = "float16", held_out: bool = False) -> str:
        folder = tmp_path_factory.mktemp("shards") / "set"
        samples = HELD_OUT if held_out else SAMPLES
        return write_contexts(folder, samples, SIZES, encoders(kind) if kind else None, dtype)

    return write


def build(run: Path | str, shards: str, **fields: Any) -> TrainConfig:
    shape = small_shape(context_length=40, context_width=32, init_std=0.02)
    return small_recipe(str(run), shards, **{"backbone": shape, "caption_dropout": 0.3, **fields})


def make_batches(
    conditions: DatasetConditions, rank: int = 0, size: int = 1, micro: int = 8
) -> Batches:
    reader = conditions.reader
    order = BatchOrder(
        shard_sizes=reader.shard_sizes,
        global_batch_size=8,
        seed=3,
        caption_dropout=0.3,
        caption_weights=weigh_captions(EVERY_SOURCE, reader, 0.3),
    )
    return Batches(
        reader, order, micro, World(rank=rank, size=size, local_rank=rank), 2, conditions
    )


def read_batches(batches: Batches, num_steps: int) -> list[Batch]:
    with closing(batches.stream(0, 0, CPU)) as stream:
        return list(islice(stream, num_steps * batches.num_micro_batches))


@pytest.mark.parametrize("null_context", ["empty_caption", "zeros"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_holds_the_stored_tokens_of_each_caption_and_zeros(
    datasets: Callable[..., str], kind: str, dtype: str, null_context: NullContext
) -> None:
    reader = ShardReader(datasets(kind, dtype))
    conditions = DatasetConditions(reader, null_context)
    batches, lengths = make_batches(conditions, micro=2), set()
    order = batches._order
    for number, batch in enumerate(read_batches(batches, 12)):
        step, positions = number // 4, batch.positions.numpy()
        samples = order.sample_indices(8 * step, positions)
        counts = reader.caption_counts(samples)
        captions = order.caption_indices(step, positions, counts, reader.caption_sources(samples))
        tokens, found = tokens_of(batch.condition), rows_of(batch.condition)
        assert tokens.dtype == getattr(torch, reader.dtype.name)
        lengths.add(tokens.shape[1])
        for row, (sample, caption) in enumerate(zip(samples, captions, strict=True)):
            expected = reader.null_context
            if caption >= 0:
                expected = reader.context(sample, caption)
            elif null_context == "zeros":
                expected = np.zeros_like(expected)
            np.testing.assert_array_equal(found[row], expected)
            assert not tokens[row, len(expected) :].any()
        longest = max(map(len, found))
        assert tokens.shape[1] == min(40, -(-longest // 16) * 16)
        assert isinstance(batch.condition, PaddedContext) == (kind != "clip")
    assert lengths == ({40} if kind == "clip" else {16, 32, 40})


@pytest.mark.parametrize("context", ["stored", "computed"])
@pytest.mark.parametrize(("size", "micro"), [(1, 2), (2, 4), (4, 1)])
def test_every_world_and_micro_batch_size_draws_the_same_contexts(
    datasets: Callable[..., str],
    encoders: Callable[[str], TextEncoder],
    size: int,
    micro: int,
    context: str,
) -> None:
    reader = ShardReader(datasets("t5", "float32"))
    encoder = encoders("t5") if context == "computed" else None
    conditions = DatasetConditions(reader, encoder=encoder)

    def contexts(batches: Batches) -> dict[tuple[int, int], torch.Tensor]:
        """Tokens by step and position."""
        return {
            (number // batches.num_micro_batches, position): row
            for number, batch in enumerate(read_batches(batches, 3))
            for position, row in zip(
                batch.positions.tolist(), rows_of(batch.condition), strict=True
            )
        }

    whole = contexts(make_batches(conditions))
    parts: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(size):
        parts |= contexts(make_batches(conditions, rank, size, micro))
    assert parts.keys() == whole.keys()
    for place, row in whole.items():
        torch.testing.assert_close(parts[place], row, rtol=0, atol=1e-5 if encoder else 0)


def equal_losses(found: TrainConfig, expected: TrainConfig, rtol: float) -> None:
    np.testing.assert_allclose(losses(found), losses(expected), rtol=rtol)


@pytest.mark.parametrize("null_context", ["empty_caption", "zeros"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [("clip", "float32"), ("t5", "float32"), ("qwen3", "float16")]
)
def test_computed_contexts_give_the_losses_of_stored_ones(
    datasets: Callable[..., str], tmp_path: Path, kind: str, dtype: str, null_context: NullContext
) -> None:
    def run(name: str, **fields: Any) -> TrainConfig:
        shards, held_out = datasets(kind, dtype), datasets(kind, dtype, True)
        validation = ValidationConfig(shards=held_out, every=4, num_samples=20)
        config = build(
            tmp_path / name,
            shards,
            null_context=null_context,
            captions=EVERY_SOURCE,
            validation=validation,
            micro_batch_size=4,
            **fields,
        )
        train(config)
        return config

    stored, computed = run("stored"), run("computed", context="computed")
    # The type of the dataset may round two nearly equal values to different neighbours.
    rtol = 1e-5 if dtype == "float32" else 1e-3
    equal_losses(computed, stored, rtol)
    for step in (4, 8):
        found, expected = (rows(one)[step]["validation_loss"] for one in (computed, stored))
        assert found == pytest.approx(expected, rel=rtol)
    assert load_weights(computed.run)[1].text_encoder == load_weights(stored.run)[1].text_encoder


def test_captions_that_are_encoded_alike_give_equal_losses(
    encoders: Callable[[str], TextEncoder], tmp_path: Path
) -> None:
    """Shards and batches of one caption: the encoder sees the same call, so no bit differs."""
    samples = make_captioned(21, num_captions=1)
    shards = write_contexts(tmp_path / "set", samples, SIZES, encoders("t5"))
    configs = [
        build(tmp_path / context, shards, context=context, micro_batch_size=1, max_steps=3)
        for context in ("stored", "computed")
    ]
    for config in configs:
        train(config)
    equal_losses(configs[1], configs[0], rtol=0)


def test_captions_alone_are_trained_resumed_and_measured(
    datasets: Callable[..., str], encoders: Callable[[str], TextEncoder], tmp_path: Path
) -> None:
    shards, held_out = datasets(None), datasets(None, held_out=True)
    identity = encoders("t5").identity
    fields: dict[str, Any] = {
        "context": "computed",
        "text_encoder": identity.name,
        "text": TEXT,
        "validation": ValidationConfig(shards=held_out, every=8, num_samples=20),
    }
    whole = build(tmp_path / "whole", shards, **fields)
    train(whole)
    halves = build(tmp_path / "halves", shards, checkpoint_every=4, **fields)
    train(replace(halves, max_steps=4))
    train(halves)
    assert losses(halves) == losses(whole)
    backbone, info = load_weights(whole.run)
    assert info.text_encoder == identity
    measured = []
    for url in (held_out, datasets("t5", held_out=True)):
        conditions = open_dataset_conditions(info, ShardReader(url), "cpu")
        measured.append(HeldOutLoss(conditions, 20, info, "cpu").measure(backbone))
    assert rows(whole)[8]["validation_loss"] == measured[0].mean(axis=1).mean()
    np.testing.assert_allclose(measured[0], measured[1], rtol=1e-3)
    stored = build(tmp_path / "stored", datasets("t5"))
    train(stored)
    equal_losses(whole, stored, rtol=1e-3)


def test_a_run_may_change_where_contexts_come_from_but_not_what_they_are(
    datasets: Callable[..., str], encoders: Callable[[str], TextEncoder], tmp_path: Path
) -> None:
    config = build(tmp_path / "run", datasets("t5"), checkpoint_every=2, max_steps=2)
    train(config)
    computed = replace(config, context="computed", max_steps=4)
    train(computed)
    named = replace(computed, text_encoder=encoders("t5").identity.name, max_steps=6)
    for text, message in (
        (TextOptions(max_length=40, state="penultimate"), "text.state penultimate, but .* last"),
        (TextOptions(max_length=40, template="a {}"), "text.template a {}, but"),
    ):
        with pytest.raises(UserError, match=f"step_00000004: text encoder .* has {message}"):
            train(replace(named, text=text))
    other = encoders("clip").identity.name
    with pytest.raises(UserError, match=r"step_00000004: text encoder .* has sha256"):
        train(replace(named, text_encoder=other, text=TEXT))
    train(replace(named, text=TEXT))
    assert len(rows(config)) == 6


@pytest.mark.parametrize(
    ("captions", "name"),
    [
        ({}, "captions.short"),
        ({**EVERY_SOURCE, "long": CaptionConfig(weight=3.0)}, "captions.long.weight"),
    ],
)
def test_a_run_keeps_the_weights_of_its_captions(
    datasets: Callable[..., str],
    tmp_path: Path,
    captions: dict[str, CaptionConfig],
    name: str,
) -> None:
    config = build(tmp_path / "run", datasets("t5"), captions=EVERY_SOURCE, max_steps=1)
    train(config)
    with pytest.raises(UserError, match=f"started with {name}"):
        train(replace(config, captions=captions, max_steps=2))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (None, {}, "holds captions without contexts; set context: computed"),
        (None, {"context": "computed"}, "text_encoder: not set, and .* holds captions without"),
        ("t5", {"text": TEXT}, "text: has an effect only beside context: computed"),
        ("t5", {"context": "computed", "text": TEXT}, "text: has an effect only beside context"),
        ("t5", {"captions": {"tiny": CaptionConfig()}}, "captions.tiny: .* original, short, long"),
        ("t5", {"captions": {"long": CaptionConfig()}}, "have no weight; give one of these"),
        (
            "t5",
            {"backbone": small_shape(context_length=77, context_width=32)},
            "contexts are 40x32, but the backbone takes 77x32",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_the_captions_is_one_line(
    datasets: Callable[..., str],
    tmp_path: Path,
    kind: str | None,
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(build(tmp_path / "run", datasets(kind), **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("context", ["stored", "computed"])
def test_a_failed_step_of_padded_contexts_is_replayed(
    encoders: Callable[[str], TextEncoder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    context: str,
) -> None:
    broken = SAMPLES[7].moments.copy()
    broken[0, 0, 0] = np.nan
    samples = [*SAMPLES[:7], replace(SAMPLES[7], moments=broken), *SAMPLES[8:]]
    shards = write_contexts(tmp_path / "set", samples, SIZES, encoders("t5"))
    config = build(tmp_path / "run", shards, context=context, micro_batch_size=2)
    with pytest.raises(UserError, match=r"images \[7\]") as error:
        train(config)
    capsys.readouterr()
    file = str(error.value).rpartition(" ")[2]
    replay(ReplayConfig(file=file))
    then, now = capsys.readouterr().out.splitlines()
    assert then.split()[1:] == now.split()[1:]
    with safe_open(file, "pt") as stored:
        lengths = stored.get_tensor("context_lengths")
        assert lengths.max() <= stored.get_tensor("condition").shape[1]
        assert len(lengths) == 2


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_two_processes_and_zero_have_the_losses_of_one(
    datasets: Callable[..., str], tmp_path: Path, zero_stage: Literal[1, 3]
) -> None:
    fields: dict[str, Any] = {"context": "computed", "micro_batch_size": 4, "max_steps": 4}
    one = build(tmp_path / "one", datasets("t5", "float32"), **fields)
    train(one)
    engine = EngineConfig(backend="deepspeed", zero_stage=zero_stage)
    two = replace(one, run=str(tmp_path / "two"), engine=engine)
    assert finish(start(train, (two,), 2)) == [0, 0]
    equal_losses(two, one, rtol=1e-4)


def test_a_grid_of_images_is_generated_for_computed_contexts(
    datasets: Callable[..., str],
    encoders: Callable[[str], TextEncoder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "load_decoder", lambda info, device: lambda latents: latents[:, :3])
    name = encoders("t5").identity.name
    for prompts in ((), ("two red circles", "a star")):
        grid = SampleGridConfig(every=2, num_steps=2, prompts=prompts)
        run = tmp_path / str(len(prompts))
        config = build(
            run,
            datasets(None),
            context="computed",
            text_encoder=name,
            text=TEXT,
            sample_grid=grid,
            max_steps=2,
        )
        train(config)
        assert (run / "samples" / "step_00000002.png").is_file()


def test_values_beyond_the_type_of_the_shards_are_an_error_that_names_the_caption(
    datasets: Callable[..., str], encoders: Callable[[str], TextEncoder]
) -> None:
    class Loud(TextEncoder):
        def encode(
            self, captions: list[str], null_context: NullContext = "empty_caption"
        ) -> Condition:
            context = super().encode(captions)
            return with_tokens(context, 1e6 * tokens_of(context)) if captions != [""] else context

    plain = encoders("t5")
    loud = Loud(plain.model, plain.tokenizer, plain.identity)
    conditions = DatasetConditions(ShardReader(datasets(None)), encoder=loud)
    with pytest.raises(
        UserError, match=f"caption {SAMPLES[3].metadata.captions[0]} has values that"
    ):
        conditions.read([3], [0])
