"""The verb `analyze knockout`: where do trained networks use text?

Text is switched off in single blocks and windows of blocks, without training. The changes of the
held-out loss and of the alignment say how much a network uses text there.

Shapes: N samples, T timesteps.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from tqdm import tqdm

from ifvit import storage
from ifvit.analysis.atlas import Window, WindowMaps
from ifvit.analysis.config import KnockoutConfig, KnockoutSettings
from ifvit.analysis.knockout import (
    FOLDER,
    Kind,
    KnockedOut,
    KnockoutAnalysis,
    KnockoutProtocol,
    KnockoutRow,
    blocks_without_text,
    list_windows,
)
from ifvit.arrays import Array
from ifvit.conditions import move
from ifvit.distributed import ALONE, ProcessGroup, choose_device
from ifvit.errors import UserError
from ifvit.evaluation import sample_set
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.evaluation.measure import CaptionMetrics
from ifvit.evaluation.metrics import Estimate, estimate_mean
from ifvit.evaluation.runs import short_names
from ifvit.figures import INK, RUN_COLOURS, house_style, literal, to_png
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.config import name_map, parse_fusion
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import find_weights, run_of, step_name
from ifvit.records import dump_csv
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
    found: dict[str, KnockoutAnalysis] = {}
    folders: dict[str, dict[str, KnockoutAnalysis]] = {}
    for name, run in zip(short_names(config.runs), config.runs, strict=True):
        home = run_of(find_weights(run)) or run
        folder = storage.join(config.output, name) if config.output else storage.join(home, FOLDER)
        storage.require_no_links_out(config.output or home)
        found[name] = analysis = analyze_run(config, run, folder)
        folders.setdefault(config.output or folder, {})[name] = analysis
    for folder, shown in folders.items():
        storage.write_bytes(storage.join(folder, "knockout.png"), to_png(knockout_figure(shown)))
        storage.write_bytes(storage.join(folder, "knockout.csv"), dump_csv(table_rows(shown)))
    _print_blocks(found)
    return found


def analyze_run(config: KnockoutSettings, run: str, folder: str) -> KnockoutAnalysis:
    """Measure the run's newest weights, or read the file of an equal analysis."""
    model = load_model(run, choose_device(config.device), config)
    backbone, info = model.backbone, model.info
    if not isinstance(backbone, FusionTransformer) or not backbone.config.text_blocks:
        raise UserError(f"{run}: has no fusion map with text to switch off; leave this run out")
    reader, metrics = ShardReader(config.shards), _open_metrics(config, run)
    protocol = KnockoutProtocol(
        windows=config.windows,
        num_samples=config.num_samples,
        seed=config.protocol.sampling.seed,
        shards_sha256=hash_json([entry.sha256 for entry in reader.manifest.shards]),
        null_context=info.null_context,
        alignment=metrics.describe(config.protocol) if metrics else None,
    )
    url = storage.join(folder, f"{step_name(info.step)}.json")
    shape = backbone.config
    before = storage.read_sealed(KnockoutAnalysis, url) if storage.exists(url) else None
    same = (model.sha256, shape.fusion, protocol)  # some maps have equal tensors
    if before and (before.weights_sha256, before.fusion, before.protocol) == same:
        sys.stdout.write(f"{url} exists\n")
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
        rows=tuple(
            measured.row(shape.fusion, kind, window)
            for kind in ("off", "only")
            for window in list_windows(shape.fusion, config.windows)
        ),
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

    def row(self, fusion: str, kind: Kind, window: Window) -> KnockoutRow:
        """Return the changes of one window against the unchanged network."""
        off = blocks_without_text(fusion, kind, window)
        changes = self.losses[off] - self.losses[_UNCHANGED]
        is_block = kind == "off" and window[0] == window[1]
        return KnockoutRow(
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
    wanted = {
        blocks_without_text(fusion, kind, window): None
        for kind in ("off", "only")
        for window in list_windows(fusion, config.windows)
    }
    losses = {_UNCHANGED: held_out.measure(backbone)}
    changed = sorted(wanted.keys() - losses.keys(), key=sorted)
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
            row: dict[str, Any] = {"run": name, "text": one.kind}
            row |= {"first": one.first, "last": one.last}
            changes = {metric: getattr(one, metric) for metric in _METRICS}
            changes |= {f"held_out_loss_t{k}": part for k, part in enumerate(one.by_timestep)}
            for column, change in changes.items():
                row[column] = change.value if change else None
                row[f"{column}_error"] = change.standard_error if change else None
            rows.append(row)
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
    with house_style():
        figure = Figure(figsize=(4.2 * num_columns, 4.2 * len(found)), layout="constrained")
        parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
        for part, (name, analysis) in zip(parts, found.items(), strict=True):
            title = literal(name_map(analysis.fusion, analysis.num_text_blocks))
            part.suptitle(f"{literal(name)}: {title}, step {analysis.step:,}", fontweight="bold")
            _plot_run(part, analysis, part.subplots(1, num_columns, squeeze=False)[0])
    return figure


def _bars(analysis: KnockoutAnalysis) -> dict[str, dict[int, Estimate]]:
    """Changes with text off in one block: metric that was measured => block => change."""
    blocks = {first: row for (first, last), row in analysis.changes("off").items() if first == last}
    bars = {metric: {n: getattr(row, metric) for n, row in blocks.items()} for metric in _METRICS}
    return {metric: changes for metric, changes in bars.items() if all(changes.values())}


def _plot_run(part: SubFigure, analysis: KnockoutAnalysis, cells: Sequence[Axes]) -> None:
    unused = iter(cells)
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
            for kind in ("off", "only")
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
