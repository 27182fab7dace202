"""Attention recorded during sampling is compared with sums worked out by hand."""

import dataclasses
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_backbone import small_shape
from torch import Tensor

from ifvit.analysis.attention_analysis import Prompts, attention_figure, record_layers
from ifvit.analysis.attention_maps import (
    AttentionProtocol,
    AttentionSummary,
    LayerAttention,
    LayerSums,
    PromptRows,
    attention_rows,
    effective_rank,
    inner_tokens,
    read_attention,
    watch_attention,
    write_attention,
)
from ifvit.analysis.config import AttentionConfig
from ifvit.diffusion.config import Guidance
from ifvit.diffusion.guidance import GuidedNoisePredictor
from ifvit.diffusion.sampler import ConditionBatch, sample_latents
from ifvit.errors import UserError
from ifvit.models.config import Fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.layers import Attention
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import read_sealed, sha256_of, write_sealed

NUM_PROMPTS, NUM_TEXT, SIDE = 5, 6, 4
CONTEXTS = torch.randn(NUM_PROMPTS, NUM_TEXT, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(NUM_TEXT, 16, generator=torch.Generator().manual_seed(2))
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=3.0, seed=7, batch_size=NUM_PROMPTS)
PROMPTS = Prompts(
    texts=[f"caption {n}" for n in range(NUM_PROMPTS)],
    contexts=CONTEXTS,
    null_context=NULL,
)
FUSIONS = pytest.mark.parametrize("fusion", ["early", "intermediate"])
CONDITIONINGS = pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])


def build_backbone(conditioning: Fusion, fusion: str = "intermediate") -> FusionTransformer:
    torch.manual_seed(0)
    num_blocks = int(fusion == "intermediate")
    config = small_shape(
        latent_size=2 * SIDE,
        latent_channels=2,
        context_length=NUM_TEXT,
        conditioning=conditioning,
        num_image_blocks=num_blocks,
        num_text_blocks=num_blocks,
        init_std=0.3,
    )
    return FusionTransformer(config).eval()


def build_config(batch_size: int = NUM_PROMPTS, trim: int = 1) -> AttentionConfig:
    sampling = dataclasses.replace(SAMPLING, batch_size=batch_size)
    return AttentionConfig(runs=["run"], prompts="prompts.txt", trim=trim, sampling=sampling)


def sample(backbone: FusionTransformer) -> Tensor:
    null_text = backbone.encode_condition(NULL[None])
    batch = ConditionBatch(positions=torch.arange(NUM_PROMPTS), condition=CONTEXTS)
    return sample_latents(backbone, batch, null_text, SAMPLING)


def record_all_at_once(backbone: FusionTransformer) -> list[np.ndarray]:
    """Return the attention of each layer: (prompts, NFE, heads, queries, keys) in float64."""
    calls: list[list[np.ndarray]] = [[] for _ in range(5)]

    def keep(layer: int, query: Tensor, key: Tensor) -> None:
        q = query[:NUM_PROMPTS].double().numpy()
        k = key[:NUM_PROMPTS].double().numpy()
        weights = np.exp(np.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(q.shape[-1]))
        calls[layer].append(weights / weights.sum(axis=-1, keepdims=True))

    with watch_attention(backbone, keep):
        sample(backbone)
    return [np.stack(layer, axis=1) for layer in calls]


@CONDITIONINGS
@FUSIONS
@pytest.mark.parametrize("batch_size", [2, NUM_PROMPTS])
def test_means_by_batch_equal_means_over_all_prompts(
    conditioning: Fusion, fusion: str, batch_size: int
) -> None:
    backbone = build_backbone(conditioning, fusion)
    layers = record_layers(backbone, PROMPTS, build_config(batch_size))
    inside = np.array([5, 6, 9, 10])
    for layer, weights in zip(layers, record_all_at_once(backbone), strict=True):
        of_prompts = weights[:, :, :, 1 + inside].mean(axis=(1, 2))
        close = {"rtol": 1e-3, "atol": 1e-5}
        image_map = of_prompts.mean(axis=0)[:, 1 + inside]
        np.testing.assert_allclose(layer.image_map, image_map, **close)
        shares = of_prompts[:, :, 17:].sum(axis=2).mean(axis=1)
        error = shares.std(ddof=1) / math.sqrt(NUM_PROMPTS)
        assert layer.text_share.value == pytest.approx(shares.mean(), rel=1e-3)
        assert layer.text_share.standard_error == pytest.approx(error, rel=1e-2, abs=1e-7)
        if layer.text is None:
            continue
        maps = of_prompts[:, :, 17:].swapaxes(1, 2)
        assert layer.text.map.shape == (NUM_TEXT, 4)
        np.testing.assert_allclose(layer.text.map, maps.mean(axis=0), **close)
        values = np.linalg.svd(maps.mean(axis=0), compute_uv=False)
        np.testing.assert_allclose(layer.text.singular_values, values, rtol=1e-2, atol=1e-5)
        of_each = np.linalg.svd(maps, compute_uv=False)
        found = [mean.value for mean in layer.text.prompt_singular_values]
        np.testing.assert_allclose(found, of_each.mean(axis=0), rtol=1e-2, atol=1e-5)
        ranks = effective_rank(of_each)
        assert layer.text.prompt_effective_rank.value == pytest.approx(ranks.mean(), rel=1e-2)


@CONDITIONINGS
@FUSIONS
def test_attention_shares_of_time_image_and_text_sum_to_one(
    conditioning: Fusion, fusion: str
) -> None:
    layers = record_layers(build_backbone(conditioning, fusion), PROMPTS, build_config(trim=0))
    names = ["in 0", "in 1", "mid", "out 0", "out 1"]
    assert [layer.name for layer in layers] == names
    for layer in layers:
        shares = (layer.time_share, layer.image_share, layer.text_share)
        assert sum(share.value for share in shares) == pytest.approx(1, abs=1e-6)
        assert layer.image_map.sum(axis=1).mean() == pytest.approx(layer.image_share.value)
        fused = fusion == "early" or layer.name not in ("in 0", "out 1")
        assert (layer.text is not None) == fused
        assert (layer.text_share.value > 0) == fused
        if layer.text:
            assert layer.text.map.sum(axis=0).mean() == pytest.approx(layer.text_share.value)


@CONDITIONINGS
def test_recording_does_not_change_the_images(conditioning: Fusion) -> None:
    backbone = build_backbone(conditioning)
    before = sample(backbone)
    rows = PromptRows(NUM_PROMPTS, inner_tokens(SIDE, 0))
    with watch_attention(backbone, rows):
        watched = sample(backbone)
    recorded = [mean.copy() for mean in rows.means()]
    assert torch.equal(before, watched)
    assert torch.equal(before, sample(backbone))
    for mean, again in zip(recorded, rows.means(), strict=True):
        np.testing.assert_array_equal(mean, again)


@CONDITIONINGS
def test_only_the_conditional_half_is_recorded(conditioning: Fusion) -> None:
    backbone = build_backbone(conditioning)
    x_t = torch.randn(NUM_PROMPTS, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    null_text = backbone.encode_condition(NULL[None])

    def record(scale: float) -> list[np.ndarray]:
        rows = PromptRows(NUM_PROMPTS, inner_tokens(SIDE, 0))
        predictor = GuidedNoisePredictor(backbone, CONTEXTS, null_text, Guidance(scale=scale))
        with torch.no_grad(), watch_attention(backbone, rows):
            predictor(x_t, torch.full((NUM_PROMPTS,), 400))
        return list(rows.means())

    for guided, plain in zip(record(3.0), record(1.0), strict=True):
        np.testing.assert_allclose(guided, plain, rtol=1e-3, atol=1e-6)


def test_layers_are_numbered_in_order_of_use() -> None:
    backbone = build_backbone("concat")
    events: list[str] = []
    for name, module in backbone.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda *_, name=name: events.append(name))
    with watch_attention(backbone, lambda layer, query, key: events.append(str(layer))):
        backbone(torch.randn(1, 2, 8, 8), torch.tensor([400]), CONTEXTS[:1])
    watched = ["in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"]
    assert events[1::2] == [f"{name}.attn" for name in watched]
    assert events[2::2] == ["0", "1", "2", "3", "4"]
    assert events[0] == "text_blocks.0.attn"


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


def test_singular_values_of_a_stored_map() -> None:
    """The mean map is 0.3 u v^T + 0.1 u' v'^T, u v u' v' orthonormal; each prompt has one term."""
    strong = 0.3 * np.outer([1, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]) / 2
    weak = 0.1 * np.outer([1, -1, 1, -1], [0.5, 0.5, -0.5, -0.5]) / 2
    rows = np.zeros((2, 4, 1 + 16 + 4))
    rows[0, :, 17:], rows[1, :, 17:] = 2 * strong.T, 2 * weak.T
    sums = LayerSums("mid", 16, inner_tokens(SIDE, 1))
    sums.add(rows[:1])
    sums.add(rows[1:])
    text = sums.finish().text
    assert text is not None
    np.testing.assert_allclose(text.singular_values, [0.3, 0.1, 0, 0], atol=1e-12)
    assert text.effective_rank == pytest.approx(1.7547653506033232)
    assert text.prompt_singular_values[0].value == pytest.approx((0.6 + 0.2) / 2)
    assert text.prompt_singular_values[0].standard_error == pytest.approx((0.6 - 0.2) / 2)
    assert text.prompt_effective_rank.value == pytest.approx(1.0)


def test_the_ten_largest_singular_values_are_kept() -> None:
    rows = np.random.default_rng(0).random((3, 16, 1 + 16 + 12))
    sums = LayerSums("mid", 16, inner_tokens(SIDE, 0))
    sums.add(rows)
    text = sums.finish().text
    assert text is not None
    largest = np.linalg.svd(rows[:, :, 17:], compute_uv=False)[:, :10]
    of_prompts = [one.value for one in text.prompt_singular_values]
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
        sums = LayerSums("mid", 256, inner_tokens(16, 1))
        tracemalloc.start()
        for _ in range(num_batches):
            sums.add(rng.random((2, 196, 1 + 256 + 77)))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(12) < 1.05 * peak(3)


def summarise(fusion: str) -> AttentionSummary:
    backbone = build_backbone("cross_attention", fusion)
    return AttentionSummary(
        weights="run",
        weights_sha256="0" * 64,
        step=5,
        conditioning="cross_attention",
        num_image_blocks=backbone.config.num_image_blocks,
        num_text_blocks=backbone.config.num_text_blocks,
        protocol=AttentionProtocol(
            num_prompts=NUM_PROMPTS,
            prompts_sha256="1" * 64,
            sampling=SAMPLING.settings,
            trim=1,
        ),
        layers=record_layers(backbone, PROMPTS, build_config()),
    )


def without_maps(layer: LayerAttention) -> dict[str, object]:
    stored = dataclasses.asdict(layer)
    del stored["image_map"]
    if stored["text"]:
        del stored["text"]["map"]
    return stored


@FUSIONS
def test_a_summary_survives_writing_and_reading(fusion: str, tmp_path: Path) -> None:
    summary = summarise(fusion)
    url = str(tmp_path / "run" / "step_00000005.json")
    write_attention(url, summary)
    found = read_attention(url)
    assert dataclasses.replace(found, layers=()) == dataclasses.replace(summary, layers=())
    for layer, again in zip(summary.layers, found.layers, strict=True):
        assert without_maps(layer) == without_maps(again)
        np.testing.assert_allclose(again.image_map, layer.image_map, rtol=1e-6)
        if layer.text and again.text:
            np.testing.assert_allclose(again.text.map, layer.text.map, rtol=1e-6)


def test_maps_of_another_analysis_are_refused(tmp_path: Path) -> None:
    first, second = (str(tmp_path / name / "step_00000005.json") for name in ("a", "b"))
    write_attention(first, summarise("early"))
    write_attention(second, summarise("intermediate"))
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
    write_attention(url, summarise("early"))
    np.savez(tmp_path / "step_00000005.npz", **MAPS | change)
    digest = sha256_of(tmp_path / "step_00000005.npz")
    stored = read_sealed(dict[str, Any], url)
    write_sealed(url, stored | {"layers": stored["layers"][:3], "maps_sha256": digest})
    with pytest.raises(UserError, match=r"step_00000005\.npz: its maps"):
        read_attention(url)
    np.savez(tmp_path / "step_00000005.npz", **MAPS)
    digest = sha256_of(tmp_path / "step_00000005.npz")
    write_sealed(url, stored | {"layers": stored["layers"][:3], "maps_sha256": digest})
    assert len(read_attention(url).layers) == 3


@pytest.mark.parametrize(
    "change", [{"singular_values": []}, {"singular_values": [0.0]}, {"effective_rank": math.nan}]
)
def test_a_spectrum_that_cannot_be_plotted_is_one_line(
    change: dict[str, object], tmp_path: Path
) -> None:
    url = str(tmp_path / "step_00000005.json")
    write_attention(url, summarise("early"))
    stored = read_sealed(dict[str, Any], url)
    stored["layers"][0]["text"] |= change
    write_sealed(url, stored)
    with pytest.raises(UserError, match=r"step_00000005\.json: layers\.0\.text"):
        read_attention(url)


def test_the_figure_shows_every_map_and_says_where_there_is_no_text() -> None:
    summaries = {fusion: summarise(fusion) for fusion in ("early", "intermediate")}
    figure = attention_figure(summaries)
    assert len(figure.subfigs) == 2
    for part, summary in zip(figure.subfigs, summaries.values(), strict=True):
        drawn = [np.asarray(axes.images[0].get_array()) for axes in part.axes if axes.images]
        expected = [layer.image_map for layer in summary.layers]
        expected += [layer.text.map for layer in summary.layers if layer.text]
        assert len(drawn) == len(expected)
        for one in expected:
            assert any(one.shape == shown.shape and np.array_equal(one, shown) for shown in drawn)
        said = [text.get_text() for axes in part.axes for text in axes.texts]
        num_image_blocks = sum(layer.text is None for layer in summary.layers)
        assert said.count("no text") == 2 * num_image_blocks
