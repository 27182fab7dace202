"""The verb `analyze knockout`: where do trained networks use text?

Text is switched off in single blocks and windows of blocks, without training. The changes of the
held-out loss and of the alignment say how much a network uses text there.

Shapes: N samples, T timesteps.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure, SubFigure
from tqdm import tqdm

from ifvit import storage
from ifvit.analysis.atlas import WindowMaps
from ifvit.analysis.config import KnockoutConfig, KnockoutSettings
from ifvit.analysis.knockout import (
    KINDS,
    KnockedOut,
    KnockoutAnalysis,
    KnockoutProtocol,
    KnockoutRow,
    blocks_without_text,
    list_windows,
)
from ifvit.analysis.run_analysis import analyze_runs, find_equal, mean_columns, plot_runs
from ifvit.arrays import Array
from ifvit.conditions import move
from ifvit.distributed import ALONE, ProcessGroup, choose_device
from ifvit.errors import UserError
from ifvit.evaluation import sample_set
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.evaluation.measure import CaptionMetrics
from ifvit.evaluation.metrics import Estimate, estimate_mean
from ifvit.figures import INK, RUN_COLOURS
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import parse_fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import step_name
from ifvit.sampling.load import Model, load_model, load_sampler
from ifvit.sampling.samples import SampleRow, claim_folder, hash_json
from ifvit.shards.reader import ShardReader

Blocks = frozenset[int]
"""Numbers of the blocks in which text is off."""
_UNCHANGED: Blocks = frozenset()
_METRICS = ("held_out_loss", "clip_score", "scene_accuracy")
"""Fields of `KnockoutRow`."""
_TITLES = {
    "held_out_loss": "change of held-out loss",
    "clip_score": "change of CLIP Score (cosine)",
    "scene_accuracy": "change of scene accuracy",
    "off": "text off in a window",
    "only": "text on in a window only",
}


def analyze_knockout(config: KnockoutConfig) -> dict[str, KnockoutAnalysis]:
    """Analyse each run, write its file, the figure and the table; return run name => analysis.

    A run whose file has the same weights and protocol is not analysed again. Raises UserError for
    a network without a fusion map or without text, and for shards that do not fit it.
    """
    analyze = partial(analyze_run, config)
    found = analyze_runs(config, "knockout", analyze, knockout_figure, table_rows)
    _print_blocks(found)
    return found


def analyze_run(config: KnockoutSettings, run: str, folder: str) -> KnockoutAnalysis:
    """Measure the run's newest weights, or read the file of an equal analysis."""
    model = load_model(run, choose_device(config.device), config)
    backbone, info = model.backbone, model.info
    if not isinstance(backbone, FusionTransformer) or not backbone.config.text_blocks:
        raise UserError(f"{run}: has no fusion map with text to switch off; leave this run out")
    reader, metrics, shape = ShardReader(config.shards), _open_metrics(config, run), backbone.config
    protocol = KnockoutProtocol(
        windows=config.windows,
        num_samples=config.num_samples,
        seed=config.protocol.sampling.seed,
        shards_sha256=hash_json([entry.sha256 for entry in reader.manifest.shards]),
        null_context=info.null_context,
        alignment=metrics.describe(config.protocol) if metrics else None,
    )
    url = storage.join(folder, f"{step_name(info.step)}.json")
    read = partial(storage.read_sealed, KnockoutAnalysis)
    if before := find_equal(url, read, model.sha256, shape.fusion, protocol):
        return before
    conditions = sample_set.open_shard_conditions(reader, model)
    measured = Measured(
        losses=_measure_losses(config, model, conditions),
        samples=_measure_alignment(config, model, conditions, metrics, url) if metrics else {},
    )
    analysis = KnockoutAnalysis(
        weights=run,
        weights_sha256=model.sha256,
        step=info.step,
        fusion=shape.fusion,
        num_text_blocks=shape.num_text_blocks,
        target=info.target,
        protocol=protocol,
        held_out_loss=estimate_mean(measured.losses[_UNCHANGED].mean(axis=1)),
        clip_score=measured.estimate(_clip_scores, _UNCHANGED),
        scene_accuracy=measured.estimate(_scene_hits, _UNCHANGED),
        rows=tuple(measured.rows(shape.fusion, config.windows)),
    )
    storage.write_sealed(url, analysis)
    sys.stdout.write(f"{url}\n")
    return analysis


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses and samples of one network by the blocks in which text is off."""

    losses: Mapping[Blocks, Array]
    """(N, T) each."""
    samples: Mapping[Blocks, list[SampleRow]]

    def rows(self, fusion: str, windows: Literal["all", "blocks"]) -> Iterator[KnockoutRow]:
        """Yield the changes of each window against the unchanged network."""
        for kind, window in product(KINDS, list_windows(fusion, windows)):
            off = blocks_without_text(fusion, kind, window)
            changes = self.losses[off] - self.losses[_UNCHANGED]
            is_block = kind == "off" and window[0] == window[1]
            yield KnockoutRow(
                kind=kind,
                first=window[0],
                last=window[1],
                held_out_loss=estimate_mean(changes.mean(axis=1)),
                by_timestep=tuple(estimate_mean(change) for change in changes.T),
                clip_score=self.estimate(_clip_scores, off, _UNCHANGED) if is_block else None,
                scene_accuracy=self.estimate(_scene_hits, off, _UNCHANGED) if is_block else None,
            )

    def estimate(
        self,
        score: Callable[[Sequence[SampleRow]], Array | None],
        off: Blocks,
        subtracted: Blocks | None = None,
    ) -> Estimate | None:
        """Mean score of the samples, or of its paired difference; None if it was not measured."""
        if off not in self.samples:
            return None
        values = score(self.samples[off])
        if values is None:
            return None
        if subtracted is not None:
            values = values - score(self.samples[subtracted])
        return estimate_mean(values)


def _clip_scores(samples: Sequence[SampleRow]) -> Array:
    return np.array([sample.clip_score for sample in samples], float)


def _scene_hits(samples: Sequence[SampleRow]) -> Array | None:
    """1 for a right scene, 0 for another; None if scenes were not scored."""
    scores = [sample.scores for sample in samples if sample.scores is not None]
    if len(scores) < len(samples):
        return None
    return np.array([all(v is not False for v in one.values()) for one in scores], float)


def _measure_losses(
    config: KnockoutSettings, model: Model, conditions: DatasetConditions
) -> dict[Blocks, Array]:
    """Held-out losses of all windows; those that switch off the same blocks are measured once."""
    backbone = model.backbone
    assert isinstance(backbone, FusionTransformer)
    fusion, seed = backbone.config.fusion, config.protocol.sampling.seed
    held_out = HeldOutLoss(conditions, config.num_samples, model.info, backbone.device, seed)
    null = move(conditions.null, backbone.device)
    losses = {_UNCHANGED: held_out.measure(backbone)}
    cases = product(KINDS, list_windows(fusion, config.windows))
    wanted = {blocks_without_text(fusion, kind, window) for kind, window in cases}
    changed = sorted(wanted - losses.keys(), key=sorted)
    for off in tqdm(changed, unit="knock-out", desc="held-out loss", leave=False):
        losses[off] = held_out.measure(KnockedOut(backbone, null, off))
    if not all(np.isfinite(one).all() for one in losses.values()):
        raise UserError(f"{model.url}: its held-out loss is not finite; give other weights")
    return losses


def _open_metrics(config: KnockoutSettings, run: str) -> CaptionMetrics | None:
    """Open the evaluation of the images' alignment; None without images."""
    if not config.num_images:
        return None
    available = len(ShardReader(config.shards))
    if config.num_images > available:
        raise UserError(
            f"{config.shards}: has {available} images, but num_images is {config.num_images}; "
            "lower it"
        )
    protocol = replace(config.protocol, num_samples=config.num_images, inception=None)
    evaluation = EvaluateConfig(
        weights=run, shards=config.shards, protocol=protocol, device=config.device
    )
    return CaptionMetrics(evaluation, ProcessGroup(ALONE))


def _measure_alignment(
    config: KnockoutSettings,
    model: Model,
    conditions: DatasetConditions,
    metrics: CaptionMetrics,
    url: str,
) -> dict[Blocks, list[SampleRow]]:
    """Generate and score images with text off in each single text block, and in none.

    The unconditional half of guidance stays as it is. Images that exist are kept.
    """
    backbone, sampling = model.backbone, config.protocol.sampling
    assert isinstance(backbone, FusionTransformer)
    prompts = sample_set.of_prompts(conditions)
    sampler = load_sampler(model, prompts.null, sampling)
    null = move(prompts.null, backbone.device)
    identity = {
        "weights_sha256": model.sha256,
        "fusion": backbone.config.fusion,
        "null_context": model.info.null_context,
        **metrics.sources,
    }
    samples: dict[Blocks, list[SampleRow]] = {}
    wanted = [_UNCHANGED, *(frozenset([number]) for number in backbone.config.text_blocks)]
    for off in tqdm(wanted, unit="knock-out", desc="images", leave=False):
        name = "unchanged" if off == _UNCHANGED else f"off_{min(off)}"
        folder = storage.join(url.removesuffix(".json"), name)
        claim_folder(folder, sampling.settings | identity | {"off": sorted(off)})
        changed = replace(sampler, backbone=KnockedOut(backbone, null, off)) if off else sampler
        sample_set.generate_missing(folder, metrics.prompts, prompts, changed, model.info, sampling)
        samples[off] = metrics.score(folder)
    return samples


def table_rows(found: Mapping[str, KnockoutAnalysis]) -> list[dict[str, Any]]:
    """Return a row per run and window with changes and standard errors."""
    rows = []
    for name, analysis in found.items():
        for one in analysis.rows:
            window = {"run": name, "text": one.kind, "first": one.first, "last": one.last}
            changes = {metric: getattr(one, metric) for metric in _METRICS}
            changes |= {f"held_out_loss_t{k}": part for k, part in enumerate(one.by_timestep)}
            rows.append({**window, **mean_columns(changes)})
    return rows


def _print_blocks(found: Mapping[str, KnockoutAnalysis]) -> None:
    """Print the changes with text off in one block, with standard errors."""
    for name, analysis in found.items():
        entries = parse_fusion(analysis.fusion)
        sys.stdout.write(f"{name}: changes with text off in one block\n")
        bars = _bars(analysis)
        for block in bars["held_out_loss"]:
            changes = {metric: by_block[block] for metric, by_block in bars.items()}
            shown = [
                f"{metric} {change.value:+.4f} ± {change.standard_error:.4f}"
                for metric, change in changes.items()
            ]
            sys.stdout.write(f"{block:3} {entries[block]:25}{'  '.join(shown)}\n")


def knockout_figure(found: Mapping[str, KnockoutAnalysis]) -> Figure:
    """Return a figure with a row per run: bars per block, then heat maps over windows.

    Bars are changes with text off in one block, with standard errors: held-out loss, and CLIP Score
    and scene accuracy where they were measured. The heat maps are changes of held-out loss with
    text off in a window, and on in it only; they share a colour scale, on which better is brighter.
    """
    num_maps = [2 if one.protocol.windows == "all" else 0 for one in found.values()]
    num_bars = [len(_bars(one)) for one in found.values()]
    num_columns = max(map(sum, zip(num_bars, num_maps, strict=True)))
    size = (4.2 * num_columns, 4.2)
    return plot_runs(found, size, partial(_plot_run, num_columns=num_columns))


def _bars(analysis: KnockoutAnalysis) -> dict[str, dict[int, Estimate]]:
    """Changes with text off in one block: metric that was measured => block => change."""
    blocks = {first: row for (first, last), row in analysis.changes("off").items() if first == last}
    bars = {metric: {n: getattr(row, metric) for n, row in blocks.items()} for metric in _METRICS}
    return {metric: changes for metric, changes in bars.items() if all(changes.values())}


def _plot_run(part: SubFigure, analysis: KnockoutAnalysis, *, num_columns: int) -> None:
    unused = iter(part.subplots(1, num_columns, squeeze=False)[0])
    entries = parse_fusion(analysis.fusion)
    for number, (metric, changes) in enumerate(_bars(analysis).items()):
        cell = next(unused)
        heights = [change.value for change in changes.values()]
        errors = [change.standard_error for change in changes.values()]
        cell.bar([*changes], heights, yerr=errors, color=RUN_COLOURS[number], ecolor=INK)
        cell.axhline(0, color=INK, linewidth=0.8)
        cell.set(xticks=[*changes], xlabel="block without text", title=_TITLES[metric])
    if analysis.protocol.windows == "all":
        maps = {
            kind: {
                window: row.held_out_loss.value for window, row in analysis.changes(kind).items()
            }
            for kind in KINDS
        }
        shared = WindowMaps.of(maps.values(), len(entries))
        own = [next(unused) for _ in maps]
        for cell, (kind, values) in zip(own, maps.items(), strict=True):
            texts = {window: f"{value:.3f}" for window, value in values.items()}
            label = "without text" if kind == "off" else "with text"
            shared.plot(cell, values, texts, label=label, mark_best=False)
            cell.set_title(_TITLES[kind])
        shared.add_colour_bar(part, own, "change of held-out loss")
    for cell in unused:
        cell.set_axis_off()
