"""The verb `evaluate`: a checkpoint and held-out captions => one MetricsRow."""

import itertools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.clip_score import clip_score, clip_score_paper
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.evaluation.frechet import (
    Features,
    FeatureStatistics,
    RunningStatistics,
    estimate_frechet,
    extract,
    statistics,
)
from ifvit.evaluation.metrics import MetricsRow, estimates_of, read_row, write_row
from ifvit.evaluation.protocol import Protocol
from ifvit.evaluation.references import list_images, read_batches
from ifvit.evaluation.retrieval import retrieval_accuracy
from ifvit.evaluation.rows import FOLDER, row_url, samples_url
from ifvit.evaluation.samples import (
    Prompt,
    describe_samples,
    draw_missing,
    hash_prompts,
    read_prompts,
    read_samples,
    write_overview,
)
from ifvit.evaluation.scenes_accuracy import ScenesAccuracy, scenes_accuracy, score_scenes
from ifvit.images import Pixels
from ifvit.models.clip import ClipScorer, load_clip
from ifvit.models.uvit import FusionUViT
from ifvit.models.weights import WeightsInfo, find_weights, load_weights
from ifvit.sampling.alignment.build import build_method
from ifvit.sampling.encoders import (
    check_identity,
    choose_device,
    open_autoencoder,
    weights_sha256,
)
from ifvit.sampling.sampler import Sampler
from ifvit.scenes.score import SceneScore
from ifvit.shards import Manifest, ShardReader

Batch = TypeVar("Batch", Features, Pixels)


def evaluate(config: EvaluateConfig) -> MetricsRow | None:
    """Draw what is not drawn yet, measure, write the row where `row_url` says, return it.

    One of several tasks draws its share and returns None.
    Raises UserError for shards of other encoders than the backbone's, or other samples in place.
    """
    device = choose_device(config.device)
    backbone, info = load_weights(config.weights)
    reader = ShardReader(config.shards)
    _check_fit(backbone, info, reader)
    references = list_images(config.images) if config.images else []
    protocol, sampling = config.protocol, config.protocol.sampling
    prompts = read_prompts(reader, protocol)
    digest = weights_sha256(backbone)
    output = _output_folder(config)
    url = row_url(output, protocol.name, sampling.guidance_scale, info.step)
    folder = samples_url(url)
    backbone.to(device)  # type: ignore[arg-type]  # diffusers' decorator hides the signature
    sampler = Sampler(
        backbone=backbone,
        autoencoder=open_autoencoder(info, device),
        null_context=torch.from_numpy(np.array(reader.null_context)),
        scaling_factor=info.scaling_factor,
    )
    settings = describe_samples(digest, reader.manifest, protocol)
    share = prompts[config.task :: config.num_tasks]

    def captions_of(positions: Tensor) -> list[str]:
        return [prompts[position].text for position in positions.tolist()]

    method_of = build_method(sampling, sampler, info, captions_of)
    seconds = draw_missing(folder, sampler, reader, share, settings, sampling, method_of)
    if config.num_tasks > 1:
        sys.stdout.write(f"{folder}: share {config.task} of {config.num_tasks} is drawn\n")
        return None
    scores = _score(folder, prompts, sampling.batch_size) if protocol.scenes else None
    write_overview(folder, prompts, references, reader.manifest.image_size, scores)
    weights = _Provenance(info=info, sha256=digest)
    row = _measure(config, folder, prompts, references, reader.manifest, weights)
    if scores:
        row = _add_scenes(row, scenes_accuracy(scores))
    if seconds is None and storage.exists(url):
        seconds = read_row(url).seconds_per_image
    row = replace(row, seconds_per_image=seconds)
    write_row(url, row)
    sys.stdout.write(f"{url}\n{format_row(row)}\n")
    return row


def format_row(row: MetricsRow) -> str:
    """The measured numbers, one a line, with their standard errors."""
    return "\n".join(
        f"{name:20}{estimate.value:10.4f} +- {estimate.standard_error:.4f}"
        for name, estimate in estimates_of(row).items()
    )


@dataclass(frozen=True, kw_only=True)
class _Provenance:
    info: WeightsInfo
    sha256: str


def _check_fit(backbone: FusionUViT, info: WeightsInfo, reader: ShardReader) -> None:
    """Raise UserError unless the shards were made by the backbone's encoders, in its shape."""
    manifest = reader.manifest
    check_identity(f"{reader.url}: vae", manifest.vae, info.vae)
    check_identity(f"{reader.url}: text encoder", reader.text.encoder, info.text_encoder)
    size = backbone.shape.latent_size
    if manifest.moments_shape != (2 * backbone.shape.latent_channels, size, size):
        raise UserError(
            f"{reader.url}: moments {manifest.moments_shape} do not fit a backbone of "
            f"{backbone.shape.latent_channels} x {size} x {size} latents; encode at its image size"
        )


def _output_folder(config: EvaluateConfig) -> str:
    """RUN/evaluation of RUN/weights/step_…, or `evaluation` in a weights folder without run."""
    if config.output:
        return config.output
    run = re.split(r"/?\bweights/step_\d+", find_weights(config.weights))[0]
    return storage.join(run or ".", FOLDER)


def _measure(
    config: EvaluateConfig,
    folder: str,
    prompts: list[Prompt],
    references: list[Path],
    manifest: Manifest,
    weights: _Provenance,
) -> MetricsRow:
    """All metrics of the PNG files in `folder`."""
    device = choose_device(config.device)
    scorer = load_clip(config.protocol.clip, device)
    batch_size, prefix = config.protocol.sampling.batch_size, config.protocol.paper_prefix
    captions = [prompt.score_text for prompt in prompts]
    samples = read_samples(folder, prompts, batch_size)
    drawn = np.concatenate(
        list(_progress(extract(scorer.embed_images, samples, device), len(prompts), "score"))
    )
    plain = embed_texts(scorer, captions, batch_size)
    prefixed = embed_texts(scorer, [prefix + text for text in captions], batch_size)
    reference = _reference_statistics(scorer, references, manifest.image_size, batch_size, device)
    return MetricsRow(
        weights=config.weights,
        weights_sha256=weights.sha256,
        step=weights.info.step,
        ema_decay=weights.info.ema_decay,
        protocol=_protocol(config.protocol, prompts, manifest, scorer, reference),
        frechet_distance=estimate_frechet(drawn, statistics(drawn), reference)
        if reference
        else None,
        clip_score=clip_score(drawn, plain),
        clip_score_paper=clip_score_paper(drawn, prefixed),
        retrieval_at_16=retrieval_accuracy(drawn, plain, captions),
    )


def _protocol(
    config: ProtocolConfig,
    prompts: list[Prompt],
    manifest: Manifest,
    scorer: ClipScorer,
    reference: FeatureStatistics | None,
) -> Protocol:
    sampling = config.sampling
    return Protocol(
        name=config.name,
        num_samples=config.num_samples,
        prompts_sha256=hash_prompts(prompts),
        caption_rule=config.caption_rule,
        score_caption=config.score_caption,
        seed=sampling.seed,
        solver=sampling.solver,
        num_steps=sampling.num_steps,
        guidance_scale=sampling.guidance_scale,
        guidance_low=sampling.guidance_low,
        guidance_high=sampling.guidance_high,
        method=sampling.method,
        image_size=manifest.image_size,
        resize=manifest.resize,
        features=scorer.identity.name,
        features_sha256=scorer.identity.sha256,
        paper_prefix=config.paper_prefix,
        inception=None,
        inception_sha256=None,
        num_reference_images=reference.num_samples if reference else None,
        reference_sha256=reference.sha256 if reference else None,
    )


def _reference_statistics(
    scorer: ClipScorer, paths: list[Path], image_size: int, batch_size: int, device: str
) -> FeatureStatistics | None:
    if not paths:
        return None
    running = RunningStatistics()
    batches = read_batches(paths, image_size, batch_size)
    features = extract(scorer.embed_images, batches, device)
    for batch in _progress(features, len(paths), "real images"):
        running.add(batch)
    return running.finish()


def _score(folder: str, prompts: list[Prompt], batch_size: int) -> list[SceneScore]:
    batches = read_samples(folder, prompts, batch_size)
    images = itertools.chain.from_iterable(_progress(batches, len(prompts), "scenes"))
    return score_scenes(images, [prompt.text for prompt in prompts])


def _add_scenes(row: MetricsRow, accuracy: ScenesAccuracy) -> MetricsRow:
    return replace(
        row,
        count_accuracy=accuracy.count,
        colour_accuracy=accuracy.colour,
        kind_accuracy=accuracy.kind,
        relation_accuracy=accuracy.relation,
        scene_accuracy=accuracy.scene,
    )


def embed_texts(scorer: ClipScorer, captions: list[str], batch_size: int) -> Features:
    """N captions => (N, E) float32."""
    starts = range(0, len(captions), batch_size)
    batches = (scorer.embed_texts(captions[start : start + batch_size]) for start in starts)
    return torch.cat([batch.cpu() for batch in batches]).numpy()


def _progress(batches: Iterable[Batch], total: int, title: str) -> Iterator[Batch]:
    """Pass batches on and show how many of `total` images have gone by."""
    with tqdm(total=total, unit="image", desc=title, leave=False) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))
