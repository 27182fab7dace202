"""Attention recorded during sampling is compared with sums worked out by hand."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_backbone import made_captions, small_shape, without_padding
from torch import Tensor

from ifvit.analysis.attention_analysis import Prompts, attention_figure, record_layers
from ifvit.analysis.attention_maps import (
    AttentionProtocol,
    AttentionSummary,
    LayerSums,
    PromptRows,
    TextSpectrum,
    attention_rows,
    effective_rank,
    inner_tokens,
    read_attention,
    watch_attention,
    write_attention,
)
from ifvit.analysis.config import AttentionConfig
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedPredictor
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.errors import UserError
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import read_sealed, sha256_of, write_sealed

NUM_PROMPTS, NUM_TEXT, SIDE = 5, 6, 4
CONTEXTS = torch.randn(NUM_PROMPTS, NUM_TEXT, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(1, NUM_TEXT, 16, generator=torch.Generator().manual_seed(2))
SCHEDULE = NoiseSchedule()
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=3.0, seed=7, batch_size=NUM_PROMPTS)
PROMPTS = Prompts(
    texts=[f"caption {n}" for n in range(NUM_PROMPTS)],
    contexts=CONTEXTS,
    null_context=NULL,
)
FUSION_MAPS = (
    "3*concat",
    "image cross_attention image",
    "separate_cross_attention image separate_cross_attention",
    "image 2*dual_stream",
    "adaln concat separate_cross_attention",
)
FUSIONS = pytest.mark.parametrize("fusion", FUSION_MAPS)
FIRST = 3
"""The first image token follows the time token and two registers."""
FIRST_TEXT = FIRST + SIDE**2


def build_backbone(fusion: str) -> FusionTransformer:
    torch.manual_seed(0)
    config = small_shape(
        latent_size=2 * SIDE,
        latent_channels=2,
        context_length=NUM_TEXT,
        fusion=fusion,
        num_registers=2,
    )
    backbone = FusionTransformer(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def build_config(batch_size: int = NUM_PROMPTS, trim: int = 1) -> AttentionConfig:
    sampling = replace(SAMPLING, batch_size=batch_size)
    return AttentionConfig(runs=["run"], prompts="prompts.txt", trim=trim, sampling=sampling)


def sample(backbone: FusionTransformer) -> Tensor:
    null_text = backbone.encode_condition(NULL)
    batch = ConditionBatch(positions=torch.arange(NUM_PROMPTS), condition=CONTEXTS)
    return sample_latents(backbone, SCHEDULE, batch, null_text, SAMPLING)


def record_all_at_once(backbone: FusionTransformer) -> list[np.ndarray]:
    """Return the attention of each block: (prompts, NFE, heads, queries, keys) in float64.

    Keys are all tokens; those that a block does not have get no attention.
    """
    calls: list[list[np.ndarray]] = [[] for _ in backbone.blocks]

    def keep(number: int, is_text_alone: bool, query: Tensor, key: Tensor, visible: None) -> None:
        q = query[:NUM_PROMPTS, :FIRST_TEXT].double().numpy()
        k = key[:NUM_PROMPTS].double().numpy()
        weights = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1]))
        weights /= weights.sum(axis=-1, keepdims=True)
        before = FIRST_TEXT if is_text_alone else 0
        after = FIRST_TEXT + NUM_TEXT - before - weights.shape[-1]
        padded = np.pad(weights, [(0, 0)] * 3 + [(before, after)])
        if is_text_alone:
            calls[number][-1] += padded
        else:
            calls[number].append(padded)

    with watch_attention(backbone, keep):
        sample(backbone)
    return [np.stack(layer, axis=1) for layer in calls]


@FUSIONS
@pytest.mark.parametrize("batch_size", [2, NUM_PROMPTS])
def test_means_by_batch_equal_means_over_all_prompts(fusion: str, batch_size: int) -> None:
    backbone = build_backbone(fusion)
    layers = record_layers(backbone, SCHEDULE, PROMPTS, build_config(batch_size))
    inside = FIRST + np.array([5, 6, 9, 10])
    for layer, weights in zip(layers, record_all_at_once(backbone), strict=True):
        of_prompts = weights[:, :, :, inside].mean(axis=(1, 2))
        close = {"rtol": 1e-3, "atol": 1e-5}
        np.testing.assert_allclose(layer.image_map, of_prompts.mean(axis=0)[:, inside], **close)
        time = of_prompts[:, :, :FIRST].sum(axis=2).mean(axis=1)
        error = time.std(ddof=1) / math.sqrt(NUM_PROMPTS)
        assert layer.numbers.time_share.value == pytest.approx(time.mean(), rel=1e-3)
        found = layer.numbers.time_share.standard_error
        assert found == pytest.approx(error, rel=1e-2, abs=1e-7)
        text = layer.numbers.text
        if text is None:
            continue
        maps = of_prompts[:, :, FIRST_TEXT:].swapaxes(1, 2)
        assert layer.text_map.shape == (NUM_TEXT, 4)
        np.testing.assert_allclose(layer.text_map, maps.mean(axis=0), **close)
        of_each = np.linalg.svd(maps, compute_uv=False)
        means = [mean.value for mean in text.singular_values]
        np.testing.assert_allclose(means, of_each.mean(axis=0), rtol=1e-2, atol=1e-5)
        ranks = effective_rank(of_each)
        assert text.effective_rank.value == pytest.approx(ranks.mean(), rel=1e-2)


@FUSIONS
def test_shares_of_time_image_and_text_sum_to_one(fusion: str) -> None:
    backbone = build_backbone(fusion)
    layers = record_layers(backbone, SCHEDULE, PROMPTS, build_config(trim=0))
    for number, (entry, layer) in enumerate(zip(backbone.config.blocks, layers, strict=True)):
        numbers = layer.numbers
        assert numbers.name == f"{number} {entry}"
        shares = [share.value for share in (numbers.time_share, numbers.image_share)]
        assert (numbers.text is None) == (entry in ("image", "adaln"))
        assert (numbers.text_share is None) == (entry == "separate_cross_attention")
        if numbers.text_share:
            shares.append(numbers.text_share.value)
            assert layer.text_map.sum(axis=0).mean() == pytest.approx(numbers.text_share.value)
        elif numbers.text:
            # The softmax of the cross-attention is over text alone.
            np.testing.assert_allclose(layer.text_map.sum(axis=0), 1, rtol=1e-6)
        assert sum(shares) == pytest.approx(1, abs=1e-6)
        assert layer.image_map.sum(axis=1).mean() == pytest.approx(numbers.image_share.value)


@FUSIONS
def test_recording_does_not_change_the_images(fusion: str) -> None:
    backbone = build_backbone(fusion)
    before = sample(backbone)
    rows = PromptRows(backbone.config, NUM_PROMPTS, inner_tokens(SIDE, 0))
    with watch_attention(backbone, rows):
        watched = sample(backbone)
    recorded = [mean.copy() for mean in rows.means()]
    assert torch.equal(before, watched)
    assert torch.equal(before, sample(backbone))
    for mean, again in zip(recorded, rows.means(), strict=True):
        np.testing.assert_array_equal(mean, again)


@FUSIONS
def test_only_the_conditional_half_is_recorded(fusion: str) -> None:
    backbone = build_backbone(fusion)
    x_t = torch.randn(NUM_PROMPTS, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    null_text = backbone.encode_condition(NULL)

    def record(scale: float) -> list[np.ndarray]:
        rows = PromptRows(backbone.config, NUM_PROMPTS, inner_tokens(SIDE, 0))
        predictor = GuidedPredictor(backbone, SCHEDULE, CONTEXTS, null_text, Guidance(scale=scale))
        with torch.no_grad(), watch_attention(backbone, rows):
            predictor(x_t, torch.full((NUM_PROMPTS,), 400))
        return list(rows.means())

    for guided, plain in zip(record(3.0), record(1.0), strict=True):
        np.testing.assert_allclose(guided, plain, rtol=1e-3, atol=1e-6)


def test_only_separate_cross_attention_has_keys_of_text_alone() -> None:
    backbone = build_backbone("image separate_cross_attention concat cross_attention dual_stream")
    calls: list[tuple[int, bool, int]] = []

    def watch(number: int, is_text_alone: bool, query: Tensor, key: Tensor, visible: None) -> None:
        calls.append((number, is_text_alone, key.shape[1]))

    with watch_attention(backbone, watch):
        backbone(torch.randn(1, 2, 8, 8), torch.tensor([400]), CONTEXTS[:1])
    joint = FIRST_TEXT + NUM_TEXT
    assert calls[:3] == [(0, False, FIRST_TEXT), (1, False, FIRST_TEXT), (1, True, NUM_TEXT)]
    assert calls[3:] == [(2, False, joint), (3, False, joint), (4, False, joint)]


def test_chunks_of_prompts_give_the_same_rows() -> None:
    query, key = torch.randn(5, 4, 2, 8), torch.randn(5, 9, 2, 8)
    together = attention_rows(query, key)
    torch.testing.assert_close(attention_rows(query, key, max_logits=1), together)
    torch.testing.assert_close(together.sum(dim=2), torch.ones(5, 4))


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([5.0, 0.0, 0.0, 0.0], 1.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        # exp(3/4 log(4/3) + 1/4 log 4)
        ([3.0, 1.0, 0.0, 0.0], 1.7547653506033232),
    ],
)
def test_effective_rank_is_the_exponential_of_the_entropy(values: list[float], rank: float) -> None:
    assert effective_rank(np.array(values)) == pytest.approx(rank)
    assert effective_rank(7.0 * np.array([values, values])) == pytest.approx([rank, rank])


# One block with a time token, 16 image tokens and text.
ONE_BLOCK = small_shape(fusion="concat", latent_size=2 * SIDE)


def text_spectrum(sums: LayerSums) -> TextSpectrum:
    spectrum = sums.finish().numbers.text
    assert spectrum is not None
    return spectrum


def test_singular_values_are_means_over_the_prompts_own_maps() -> None:
    """The maps are 0.6 u v^T, and 0.3 u v^T + 0.1 u' v'^T, with u v u' v' orthonormal."""
    strong = np.outer([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]) / 2
    weak = np.outer([1, -1, 1, -1], [0.5, 0.5, -0.5, -0.5]) / 2
    rows = np.zeros((2, 4, 1 + 16 + 4))
    rows[0, :, 17:], rows[1, :, 17:] = 0.6 * strong.T, (0.3 * strong + 0.1 * weak).T
    sums = LayerSums(replace(ONE_BLOCK, context_length=4), 0, inner_tokens(SIDE, 1))
    sums.add(rows[:1], np.array([4]))
    sums.add(rows[1:], np.array([4]))
    text = text_spectrum(sums)
    values = [mean.value for mean in text.singular_values]
    np.testing.assert_allclose(values, [0.45, 0.05, 0, 0], atol=1e-12)
    assert text.singular_values[0].standard_error == pytest.approx((0.6 - 0.3) / 2)
    assert text.effective_rank.value == pytest.approx((1 + 1.7547653506033232) / 2)
    mean = 0.45 * strong + 0.05 * weak
    np.testing.assert_allclose(sums.finish().text_map, mean, atol=1e-12)


@FUSIONS
@pytest.mark.parametrize("batch_size", [2, NUM_PROMPTS])
def test_padding_takes_no_part_in_means_over_prompts_of_different_lengths(
    fusion: str, batch_size: int
) -> None:
    backbone = build_backbone(fusion)
    inside, lengths = inner_tokens(SIDE, 0), (3, 5, 1, 4, 2)
    captions = made_captions(backbone.config, lengths, NUM_TEXT, filling=10)
    prompts = replace(PROMPTS, contexts=captions, null_context=without_padding(captions, 2))
    layers = record_layers(backbone, SCHEDULE, prompts, build_config(batch_size, trim=0))
    alone = []
    null = backbone.encode_condition(prompts.null_context)
    for n in range(NUM_PROMPTS):
        batch = ConditionBatch(positions=torch.tensor([n]), condition=without_padding(captions, n))
        rows = PromptRows(backbone.config, 1, inside)
        with watch_attention(backbone, rows):
            sample_latents(backbone, SCHEDULE, batch, null, SAMPLING)
        alone.append([mean[0].copy() for mean in rows.means()])
    for layer, of_prompts in zip(layers, zip(*alone, strict=True), strict=True):
        time = [rows[:, :FIRST].sum(axis=1).mean() for rows in of_prompts]
        assert layer.numbers.time_share.value == pytest.approx(np.mean(time), rel=1e-3)
        assert all(
            (rows[:, FIRST_TEXT + m :] == 0).all()
            for rows, m in zip(of_prompts, lengths, strict=True)
        )
        if layer.numbers.text is None:
            continue
        share = np.mean([rows[:, FIRST_TEXT:].sum(axis=1).mean() for rows in of_prompts])
        if layer.numbers.text_share:
            assert layer.numbers.text_share.value == pytest.approx(share, rel=1e-3)
        assert layer.text_map.shape == (5, 16)
        for token in range(5):
            having = [
                rows[:, FIRST_TEXT + token]
                for rows, length in zip(of_prompts, lengths, strict=True)
                if token < length
            ]
            expected = np.mean(having, axis=0)
            np.testing.assert_allclose(layer.text_map[token], expected, rtol=1e-3, atol=1e-5)
        ranks = [
            effective_rank(np.linalg.svd(rows[:, FIRST_TEXT : FIRST_TEXT + m], compute_uv=False))
            for rows, m in zip(of_prompts, lengths, strict=True)
        ]
        assert layer.numbers.text.effective_rank.value == pytest.approx(np.mean(ranks), rel=1e-2)


def test_the_ten_largest_singular_values_are_kept() -> None:
    rows = np.random.default_rng(0).random((3, 16, 1 + 16 + 12))
    sums = LayerSums(replace(ONE_BLOCK, context_length=12), 0, inner_tokens(SIDE, 0))
    sums.add(rows, np.full(3, 12))
    text = text_spectrum(sums)
    largest = np.linalg.svd(rows[:, :, 17:], compute_uv=False)[:, :10]
    of_prompts = [one.value for one in text.singular_values]
    np.testing.assert_allclose(of_prompts, largest.mean(axis=0))
    assert len(text.singular_values) == 10


@pytest.mark.parametrize(
    ("side", "trim", "expected"), [(3, 1, [4]), (4, 1, [5, 6, 9, 10]), (2, 0, [0, 1, 2, 3])]
)
def test_the_border_is_trimmed(side: int, trim: int, expected: list[int]) -> None:
    assert inner_tokens(side, trim).tolist() == expected


def test_a_trim_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="trim 2 leaves nothing of 4 x 4 patches; lower it below 2"):
        inner_tokens(4, 2)


def test_memory_does_not_grow_with_the_number_of_prompts() -> None:
    def peak(num_batches: int) -> int:
        rng = np.random.default_rng(0)
        config = replace(ONE_BLOCK, latent_size=32, context_length=77)
        sums = LayerSums(config, 0, inner_tokens(16, 1))
        tracemalloc.start()
        for _ in range(num_batches):
            sums.add(rng.random((2, 196, 1 + 256 + 77)), np.full(2, 77))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(12) < 1.05 * peak(3)


def summarise(fusion: str) -> AttentionSummary:
    layers = record_layers(build_backbone(fusion), SCHEDULE, PROMPTS, build_config())
    return AttentionSummary(
        weights="run",
        weights_sha256="0" * 64,
        step=5,
        fusion=fusion,
        num_text_blocks=1,
        protocol=AttentionProtocol(
            num_prompts=NUM_PROMPTS,
            prompts_sha256="1" * 64,
            sampling=SAMPLING.settings,
            trim=1,
        ),
        layers=tuple(layer.numbers for layer in layers),
        image_maps=np.stack([layer.image_map for layer in layers]),
        text_maps={n: layer.text_map for n, layer in enumerate(layers) if layer.numbers.text},
    )


EARLY, INTERMEDIATE = "3*concat", "image cross_attention image"


@FUSIONS
def test_a_summary_survives_writing_and_reading(fusion: str, tmp_path: Path) -> None:
    summary = summarise(fusion)
    url = str(tmp_path / "run" / "step_00000005.json")
    write_attention(url, summary)
    found = read_attention(url)
    assert (found.layers, found.protocol) == (summary.layers, summary.protocol)
    assert (found.fusion, found.num_text_blocks, found.step) == (fusion, 1, 5)
    np.testing.assert_allclose(found.image_maps, summary.image_maps, rtol=1e-6)
    assert found.text_maps.keys() == summary.text_maps.keys()
    for number, one in summary.text_maps.items():
        np.testing.assert_allclose(found.text_maps[number], one, rtol=1e-6)


def test_maps_of_another_analysis_are_refused(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name / "step_00000005.json") for name in ("a", "b"))
    write_attention(first, summarise(EARLY))
    write_attention(second, summarise(INTERMEDIATE))
    Path(first).with_suffix(".npz").write_bytes(Path(second).with_suffix(".npz").read_bytes())
    with pytest.raises(
        UserError, match=r"step_00000005\.npz: belongs to another analysis.*analyze again"
    ):
        read_attention(first)
    Path(first).write_text("{}")
    with pytest.raises(UserError, match=r"step_00000005\.json: damaged"):
        read_attention(first)


MAPS = {"image": np.ones((3, 4, 4)), "text": np.ones((3, 2, 4))}


@pytest.mark.parametrize(
    "change",
    [
        {"image": np.full((3, 4, 4), np.nan)},
        {"image": np.ones((2, 4, 4))},
        {"image": np.ones((3, 4, 5))},
        {"image": np.zeros((3, 0, 0)), "text": np.ones((3, 2, 0))},
        {"text": np.ones((2, 2, 4))},
        {"text": np.ones(3)},
        {"text": np.full((3, 2, 4), np.inf)},
    ],
)
def test_maps_that_do_not_belong_to_their_layers_are_one_line(
    change: dict[str, np.ndarray], tmp_path: Path
) -> None:
    url = str(tmp_path / "step_00000005.json")
    write_attention(url, summarise(EARLY))
    np.savez(tmp_path / "step_00000005.npz", **MAPS | change)
    digest = sha256_of(tmp_path / "step_00000005.npz")
    stored = read_sealed(dict[str, Any], url)
    write_sealed(url, stored | {"maps_sha256": digest})
    with pytest.raises(UserError, match=r"step_00000005\.npz: its maps"):
        read_attention(url)
    np.savez(tmp_path / "step_00000005.npz", **MAPS)
    digest = sha256_of(tmp_path / "step_00000005.npz")
    write_sealed(url, stored | {"maps_sha256": digest})
    assert len(read_attention(url).layers) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"singular_values": []},
        {"singular_values": [{"value": 0.0, "standard_error": 0.0}]},
        {"effective_rank": math.nan},
    ],
)
def test_a_spectrum_that_cannot_be_plotted_is_one_line(
    change: dict[str, object], tmp_path: Path
) -> None:
    url = str(tmp_path / "step_00000005.json")
    write_attention(url, summarise(EARLY))
    stored = read_sealed(dict[str, Any], url)
    stored["layers"][0]["text"] |= change
    write_sealed(url, stored)
    with pytest.raises(UserError, match=r"step_00000005\.json: layers\.0\.text"):
        read_attention(url)


@pytest.mark.parametrize(
    "change",
    [
        {"fusion": "image 2*concat"},
        {"fusion": "3*concats"},
        {"layers": []},
        # As version 0.2 wrote it.
        {"fusion": None, "conditioning": "concat", "num_image_blocks": 0},
    ],
)
def test_a_file_whose_layers_are_not_those_of_its_map_is_one_line(
    change: dict[str, object], tmp_path: Path
) -> None:
    url = str(tmp_path / "step_00000005.json")
    write_attention(url, summarise(EARLY))
    stored = read_sealed(dict[str, Any], url) | change
    write_sealed(url, {key: value for key, value in stored.items() if value is not None})
    with pytest.raises(UserError, match=r"step_00000005\.json: ") as error:
        read_attention(url)
    assert "\n" not in str(error.value)


def test_the_figure_shows_every_map_and_says_where_there_is_no_text() -> None:
    summaries = {fusion: summarise(fusion) for fusion in FUSION_MAPS}
    figure = attention_figure(summaries)
    for part, summary in zip(figure.subfigs, summaries.values(), strict=True):
        drawn = [np.asarray(axes.images[0].get_array()) for axes in part.axes if axes.images]
        expected = [*summary.image_maps, *summary.text_maps.values()]
        assert len(drawn) == len(expected)
        for one in expected:
            assert any(one.shape == shown.shape and np.array_equal(one, shown) for shown in drawn)
        said = [text.get_text() for axes in part.axes for text in axes.texts]
        assert said.count("no text") == 2 * (len(summary.layers) - len(summary.text_maps))
        assert summary.fusion in part.get_suptitle()
