"""Images => numbers, with what all rows of one command share: networks, captions, real images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from ifvit.distributed import ProcessGroup, choose_device, show_progress
from ifvit.evaluation.config import MeasureConfig
from ifvit.evaluation.estimates import Estimate, estimate_share
from ifvit.evaluation.features import (
    CLIP,
    INCEPTION,
    FeatureSet,
    collect_features,
    kept_parts,
    load_networks,
)
from ifvit.evaluation.metrics import (
    Features,
    clip_score,
    clip_score_paper,
    cmmd,
    estimate_frechet,
    kid,
    perceptual_distances,
    retrieval_accuracy,
)
from ifvit.evaluation.references import open_reference
from ifvit.evaluation.rows import Protocol
from ifvit.evaluation.sample_set import Prompt, hash_prompts, read_samples
from ifvit.images import Pixels
from ifvit.sampling.config import SamplingConfig
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.score import SceneScore, score_image
from ifvit.shards import Manifest


@dataclass(frozen=True, kw_only=True)
class ScenesAccuracy:
    """Shares of images that are right; relation among captions that state one, scene = all."""

    count: Estimate
    colour: Estimate
    kind: Estimate
    relation: Estimate | None
    scene: Estimate


def score_scenes(images: Iterable[Pixels], captions: Sequence[str]) -> list[SceneScore]:
    """Score images (H, W, 3) against their captions. Raises UserError for a foreign caption."""
    return [
        score_image(image, parse_caption(caption))
        for image, caption in zip(images, captions, strict=True)
    ]


def scenes_accuracy(scores: Sequence[SceneScore]) -> ScenesAccuracy:
    """The shares over all images."""
    relations = [score.relation for score in scores if score.relation is not None]
    return ScenesAccuracy(
        count=estimate_share(np.array([score.count for score in scores])),
        colour=estimate_share(np.array([score.colour for score in scores])),
        kind=estimate_share(np.array([score.kind for score in scores])),
        relation=estimate_share(np.array(relations)) if relations else None,
        scene=estimate_share(np.array([_all_right(score) for score in scores])),
    )


def _all_right(score: SceneScore) -> bool:
    return score.count and score.colour and score.kind and score.relation is not False


Numbers = dict[str, Estimate | None]
"""By field of MetricsRow."""


class Measurement:
    """Measures folders of samples of the same prompts, one after the other."""

    def __init__(
        self,
        config: MeasureConfig,
        manifest: Manifest,
        prompts: list[Prompt],
        channel: ProcessGroup,
    ) -> None:
        self._config = config.protocol
        self._manifest = manifest
        self._prompts = prompts
        self._channel = channel
        self._networks = load_networks(config.protocol, choose_device(config.device))
        self._reference = open_reference(config, manifest.image_size, self._networks, channel)

    def protocol(self, sampling: SamplingConfig) -> Protocol:
        """What the numbers of samples that were drawn by `sampling` mean."""
        identities = self._networks.identities
        inception = identities.get(INCEPTION)
        reference = self._reference
        return Protocol(
            name=self._config.name,
            num_samples=len(self._prompts),
            prompts_sha256=hash_prompts(self._prompts),
            caption_rule=self._config.caption_rule,
            score_caption=self._config.score_caption,
            sampling=sampling.settings,
            image_size=self._manifest.image_size,
            resize=self._manifest.resize,
            features=identities[CLIP].name,
            features_sha256=identities[CLIP].sha256,
            paper_prefix=self._config.paper_prefix,
            inception=inception.name if inception else None,
            inception_sha256=inception.sha256 if inception else None,
            num_reference_images=reference.num_images if reference else None,
            reference_sha256=reference.sha256 if reference else None,
        )

    def embed(self, folder: str) -> dict[str, FeatureSet]:
        """Features of the samples in `folder`, by network; all processes together, a share each.

        CLIP's are all there, in the order of the prompts.
        """
        world, count = self._channel.world, len(self._prompts)
        positions = range(count)[world.rank :: world.size]
        share = [self._prompts[position] for position in positions]
        batches = read_samples(folder, share, self._config.sampling.batch_size)
        return collect_features(
            self._networks.functions,
            show_progress(batches, len(share), "embed samples", world),
            positions,
            {**kept_parts(count), CLIP: np.arange(count)},
            self._networks.device,
            self._channel,
        )

    def distances(self, first: str, second: str) -> NDArray[np.float64]:
        """Perceptual distances (N,) of the samples in two folders, prompt by prompt."""
        batch_size, networks = self._config.sampling.batch_size, self._networks
        one, other = (read_samples(url, self._prompts, batch_size) for url in (first, second))
        one = show_progress(one, len(self._prompts), "compare samples", self._channel.world)
        pairs = zip(one, other, strict=True)
        return perceptual_distances(networks.clip.embed_patches, pairs, networks.device)

    @property
    def real(self) -> Mapping[str, FeatureSet]:
        """Features of the real images, if any; embedded once, by all processes together."""
        return self._reference.features if self._reference else {}

    def compare(self, drawn: Mapping[str, FeatureSet], real: Mapping[str, FeatureSet]) -> Numbers:
        """All numbers that come from features of samples and real images; by one process."""
        clip, captions = drawn[CLIP], [prompt.score_text for prompt in self._prompts]
        numbers: Numbers = {
            "clip_score": clip_score(clip.part, self.texts),
            "clip_score_paper": clip_score_paper(clip.part, self._prefixed_texts),
            "retrieval_at_16": retrieval_accuracy(clip.part, self.texts, captions),
            "frechet_distance": None,
        }
        if CLIP in real:
            numbers["frechet_distance"] = _frechet(clip, real[CLIP])
            numbers["cmmd"] = cmmd(clip.part, real[CLIP].part, self._networks.device)
        if INCEPTION in real:
            numbers["fid"] = _frechet(drawn[INCEPTION], real[INCEPTION])
            numbers["kid"] = kid(drawn[INCEPTION].part, real[INCEPTION].part)
        return numbers

    @cached_property
    def texts(self) -> Features:
        """CLIP features (N, E) of the captions that the samples are scored against."""
        return self._embed_texts("")

    @cached_property
    def _prefixed_texts(self) -> Features:
        return self._embed_texts(self._config.paper_prefix)

    def _embed_texts(self, prefix: str) -> Features:
        captions = [prefix + prompt.score_text for prompt in self._prompts]
        size = self._config.sampling.batch_size
        batches = (captions[start : start + size] for start in range(0, len(captions), size))
        shown = show_progress(batches, len(captions), "embed captions", self._channel.world)
        embed = self._networks.clip.embed_texts
        return torch.cat([embed(batch).cpu() for batch in shown]).numpy()


def scene_numbers(scores: list[SceneScore]) -> Numbers:
    """The shares of scenes that are right, as fields of MetricsRow."""
    accuracy = scenes_accuracy(scores)
    return {
        "count_accuracy": accuracy.count,
        "colour_accuracy": accuracy.colour,
        "kind_accuracy": accuracy.kind,
        "relation_accuracy": accuracy.relation,
        "scene_accuracy": accuracy.scene,
    }


def _frechet(drawn: FeatureSet, reference: FeatureSet) -> Estimate:
    return estimate_frechet(drawn.part, drawn.statistics, reference.statistics)
