"""Measurements of generated images: the metrics of held-out captions, or object counts.

`evaluate` opens one measurement per command. A measurement knows the prompts, opens their
conditions, and turns a folder of samples into a row. All processes call its methods together.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch

from ifvit import storage
from ifvit.distributed import ProcessGroup, choose_device, show_progress
from ifvit.errors import UserError
from ifvit.evaluation import metrics, object_count, rows, sample_set
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.evaluation.detectors import open_counter
from ifvit.evaluation.features import (
    CLIP,
    INCEPTION,
    FeatureSet,
    Networks,
    choose_parts,
    collect_features,
    load_networks,
)
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.evaluation.metrics import Estimate, Floats, estimate_mean, estimate_share
from ifvit.evaluation.references import RealImages, Reference, list_images, read_reference
from ifvit.evaluation.rows import MetricsRow
from ifvit.models.conditioning import DatasetConditions
from ifvit.sampling.load import Model
from ifvit.sampling.samples import SampleRow, batched, hash_json, image_name, read_samples
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.score import SceneScore, score_image
from ifvit.shards.reader import ShardReader

_Row = TypeVar("_Row", MetricsRow, object_count.ObjectCountRow)
_COUNT_BATCH_SIZE = 8
"""Images that a detector sees at once; detectors enlarge them to about 800 pixels."""


class CaptionMetrics:
    """Measures samples of held-out captions by CLIP, Inception, real images and scene analysis.

    `prompts` are the prompts of all samples. `sources` identifies what they were read from and is
    stored in settings.json.
    """

    def __init__(self, config: EvaluateConfig, group: ProcessGroup) -> None:
        """Read the prompts. Raises UserError for missing shards, images or captions."""
        assert config.shards is not None
        self._config = config
        self._group = group
        self._batch_size = config.protocol.sampling.batch_size
        self._paper_prefix = config.protocol.paper_prefix
        self._reader = ShardReader(config.shards)
        manifest = self._reader.manifest
        self._real_images = (
            RealImages(
                paths=list_images(config.images),
                image_size=manifest.image_size,
                rules=manifest.image_rules,
            )
            if config.images
            else None
        )
        self.prompts = sample_set.read_prompts(self._reader, config.protocol)
        self._conditions: dict[str, DatasetConditions] = {}
        self._held_out_losses: dict[tuple[str, int], Floats] = {}
        self.sources = {
            "shards_sha256": hash_json([entry.sha256 for entry in manifest.shards]),
            "caption_rule": config.protocol.caption_rule,
        }

    def open_conditions(self, model: Model) -> sample_set.PromptConditions:
        """Open the conditions of the prompts. Raises UserError for shards of other encoders."""
        return sample_set.of_prompts(self._open_dataset(model))

    def _open_dataset(self, model: Model) -> DatasetConditions:
        """Conditions of the shards for a model; rows of one model share them."""
        if model.sha256 not in self._conditions:
            conditions = sample_set.open_shard_conditions(self._reader, model)
            self._conditions = {model.sha256: conditions}
        return self._conditions[model.sha256]

    def find_row(self, url: str, model: Model, protocol: ProtocolConfig) -> MetricsRow | None:
        """Read the row at `url`; None if it is missing, or of other weights or another protocol.

        Raises UserError for a network or a reference that does not load, before any image is made.
        """
        wanted = self.describe(protocol)
        row = _read_row(self._group, MetricsRow, url, model)
        if row is None or row.held_out_loss is None:
            return None
        if protocol.scenes and row.empty_share is None:
            return None
        return None if rows.differences(row.protocol, wanted) else row

    def measure(
        self, url: str, model: Model, protocol: ProtocolConfig, seconds: float | None
    ) -> MetricsRow:
        """Measure the samples of the row at `url` and write it; each took `seconds` to generate."""
        folder = rows.samples_url(url)
        sampled, real, description = self._embed(folder), self._real, self.describe(protocol)
        losses = self._measure_held_out_losses(model, protocol.sampling.seed)
        is_finite = bool(np.isfinite(losses).all())

        def write() -> MetricsRow:
            scores = self._write_overview(folder, sampled, losses.tolist() if is_finite else ())
            found = scene_accuracies(scores) if scores else {}
            found |= self._compute_metrics(sampled, real)
            earlier = storage.read_sealed(MetricsRow, url) if storage.exists(url) else None
            row = MetricsRow(
                weights=model.url,
                weights_sha256=model.sha256,
                step=model.info.step,
                ema_decay=model.info.ema_decay,
                protocol=description,
                # Images that are measured again keep the time that it took to generate them.
                seconds_per_image=seconds or (earlier.seconds_per_image if earlier else None),
                held_out_loss=estimate_mean(losses) if is_finite else None,
                target=model.info.target,
                **found,  # type: ignore[arg-type]  # some fields are never None
            )
            storage.write_sealed(url, row)
            return row

        return self._group.on_main(write)

    def score(self, folder: str) -> list[SampleRow]:
        """Score the samples in `folder` one by one, write samples.jsonl, and return its rows."""
        sampled = self._embed(folder)
        self._group.on_main(lambda: self._write_overview(folder, sampled))
        return read_samples(folder)

    def _write_overview(
        self, folder: str, sampled: Mapping[str, FeatureSet], losses: Sequence[float] = ()
    ) -> list[SceneScore]:
        """Write the list and the grid of the samples; return the scores of scenes, if any."""
        cosines = metrics.cosines(sampled[CLIP].part, self._texts[""]).tolist()
        scores = self._score_scenes(folder) if self._config.protocol.scenes else []
        sample_set.write_overview(folder, self.prompts, cosines, losses, scores, self._real_images)
        return scores

    def _measure_held_out_losses(self, model: Model, seed: int) -> Floats:
        """Losses (N,) of the samples; rows of one model share them, whatever their guidance."""
        key = model.sha256, seed
        if key not in self._held_out_losses:
            device, conditions = model.backbone.device, self._open_dataset(model)
            loss = HeldOutLoss(conditions, len(self.prompts), model.info, device, seed)
            losses = loss.measure(model.backbone, self._group).mean(axis=1)
            self._held_out_losses[key] = losses
        return self._held_out_losses[key]

    @cached_property
    def _networks(self) -> Networks:
        """Loaded only when there is something to measure."""
        return load_networks(self._config.protocol, choose_device(self._config.device))

    @cached_property
    def _reference(self) -> Reference | None:
        """The real images that the recipe names, if any."""
        manifest, images = self._reader.manifest, self._real_images
        if self._config.reference:
            return read_reference(
                self._config.reference, manifest.image_size, manifest.image_rules, self._networks
            )
        if images is None:
            return None
        return Reference(
            num_images=len(images.paths),
            sha256=images.hash(self._group),
            features=partial(images.embed, self._networks, self._batch_size, self._group),
        )

    @cached_property
    def _real(self) -> Mapping[str, FeatureSet]:
        """Features of the real images by network."""
        return self._reference.features() if self._reference else {}

    @cached_property
    def _texts(self) -> dict[str, metrics.Features]:
        """CLIP features (N, E) of the captions to score against, by the prefix before them."""
        return {prefix: self._embed_texts(prefix) for prefix in ("", self._paper_prefix)}

    def describe(self, protocol: ProtocolConfig) -> rows.Protocol:
        """Return what is sampled and how it is measured, as rows state it."""
        networks, reference = self._networks.features, self._reference
        clip = networks[CLIP].identity
        inception = networks[INCEPTION].identity if INCEPTION in networks else None
        return rows.Protocol(
            name=protocol.name,
            num_samples=len(self.prompts),
            prompts_sha256=hash_json([[one.image_id, one.text] for one in self.prompts]),
            caption_rule=protocol.caption_rule,
            score_caption=protocol.score_caption,
            sampling=protocol.sampling.settings,
            image_size=self._reader.manifest.image_size,
            resize=self._reader.manifest.resize,
            features=clip.name,
            features_sha256=clip.sha256,
            paper_prefix=protocol.paper_prefix,
            inception=inception.name if inception else None,
            inception_sha256=inception.sha256 if inception else None,
            num_reference_images=reference.num_images if reference else None,
            reference_sha256=reference.sha256 if reference else None,
        )

    def _embed(self, folder: str) -> dict[str, FeatureSet]:
        """Embed the samples in `folder`, a partition on each process; CLIP keeps all of them."""
        world, count = self._group.world, len(self.prompts)
        partition = self.prompts[world.rank :: world.size]
        batches = sample_set.read_samples(folder, partition, self._batch_size)
        return collect_features(
            self._networks,
            show_progress(batches, len(partition), "embed samples", world),
            range(count)[world.rank :: world.size],
            {**choose_parts(count), CLIP: np.arange(count)},
            self._group,
        )

    def _embed_texts(self, prefix: str) -> metrics.Features:
        captions = [prefix + prompt.score_text for prompt in self.prompts]
        batches = batched(captions, self._batch_size)
        shown = show_progress(batches, len(captions), "embed captions", self._group.world)
        embed = self._networks.clip.embed_texts
        return torch.cat([embed([*batch]).cpu() for batch in shown]).numpy()

    def _compute_metrics(
        self, sampled: Mapping[str, FeatureSet], real: Mapping[str, FeatureSet]
    ) -> dict[str, Estimate | None]:
        """Metrics of features, by field of MetricsRow."""
        for name in real:
            if real[name].part.shape[1:] != sampled[name].part.shape[1:]:
                raise UserError(f"{self._config.reference}: {name} features of another network")
        clip, captions = sampled[CLIP], [prompt.score_text for prompt in self.prompts]
        found: dict[str, Estimate | None] = {
            "clip_score": estimate_mean(metrics.cosines(clip.part, self._texts[""])),
            "clip_score_paper": metrics.clip_score_paper(
                clip.part, self._texts[self._paper_prefix]
            ),
            "retrieval_at_16": metrics.retrieval_accuracy(clip.part, self._texts[""], captions),
            "frechet_distance": None,
        }
        for name, field in ((CLIP, "frechet_distance"), (INCEPTION, "fid")):
            if name in real:
                found[field] = metrics.estimate_frechet(
                    sampled[name].part, sampled[name].statistics, real[name].statistics
                )
        if CLIP in real:
            found["cmmd"] = metrics.cmmd(clip.part, real[CLIP].part, self._networks.device)
        if INCEPTION in real:
            found["kid"] = metrics.kid(sampled[INCEPTION].part, real[INCEPTION].part)
        return found

    def _score_scenes(self, folder: str) -> list[SceneScore]:
        """Score the samples against their captions. Raises UserError for a foreign caption."""
        batches = sample_set.read_samples(folder, self.prompts, self._batch_size)
        shown = show_progress(batches, len(self.prompts), "score scenes", self._group.world)
        images = itertools.chain.from_iterable(shown)
        return [
            score_image(image, parse_caption(prompt.text))
            for image, prompt in zip(images, self.prompts, strict=True)
        ]


class ObjectCounting:
    """Counts the objects in samples of prompts that ask for a number of them.

    `prompts` and `sources` are as in `CaptionMetrics`.
    """

    def __init__(self, config: EvaluateConfig, group: ProcessGroup) -> None:
        """Read the prompts. Raises UserError for prompts or objects that cannot be counted."""
        counting, num_samples = config.protocol.object_count, config.protocol.num_samples
        assert counting.prompts is not None
        self._group = group
        self._asked = object_count.read_count_prompts(counting.prompts)
        self._num_images, rest = divmod(num_samples, len(self._asked))
        if rest or self._num_images < 2:
            raise UserError(
                f"num_samples {num_samples}: give a multiple of the {len(self._asked)} prompts, "
                "at least 2 for each"
            )
        device = choose_device(config.device)
        self._counter = open_counter(counting.detector, counting.threshold, device)
        self._counter.check(asked.object for asked in self._asked)
        self.sources = {"prompts_sha256": hash_json([asked.prompt for asked in self._asked])}
        # Image k of prompt i has position k * len(asked) + i, so more samples keep the first ones.
        self.prompts = [
            sample_set.Prompt(position=position, image_id=position, text=asked.prompt)
            for position, asked in enumerate(self._asked * self._num_images)
        ]

    def open_conditions(self, model: Model) -> sample_set.PromptConditions:
        """Open the text encoder of the model. Raises UserError if it has changed."""
        return sample_set.open_encoded_conditions(model)

    def find_row(
        self, url: str, model: Model, protocol: ProtocolConfig
    ) -> object_count.ObjectCountRow | None:
        """Read the row at `url`; None if it is missing, or of other weights or another protocol."""
        row = _read_row(self._group, object_count.ObjectCountRow, url, model)
        return row if row and row.protocol == self._describe(protocol) else None

    def measure(
        self, url: str, model: Model, protocol: ProtocolConfig, seconds: float | None
    ) -> object_count.ObjectCountRow:
        """Count the objects in the samples of the row at `url` and write it."""
        counted = self._group.gather(self._count(rows.samples_url(url)))
        images = sorted(itertools.chain.from_iterable(counted), key=lambda image: image.file)
        row = object_count.ObjectCountRow(
            weights=model.url,
            weights_sha256=model.sha256,
            step=model.info.step,
            ema_decay=model.info.ema_decay,
            protocol=self._describe(protocol),
            images=tuple(images),
        )

        def write() -> None:
            sample_set.write_overview(rows.samples_url(url), self.prompts)
            storage.write_sealed(url, row)

        self._group.on_main(write)
        return row

    def _describe(self, protocol: ProtocolConfig) -> object_count.ObjectCountProtocol:
        return object_count.ObjectCountProtocol(
            prompts_sha256=hash_json([asdict(asked) for asked in self._asked]),
            num_images=self._num_images,
            sampling=protocol.sampling.settings,
            rule=self._counter.rule,
        )

    def _count(self, folder: str) -> list[object_count.CountedImage]:
        """Count in this process's partition of the images."""
        world = self._group.world
        prompts = self.prompts[world.rank :: world.size]
        batches = sample_set.read_samples(folder, prompts, _COUNT_BATCH_SIZE)
        shown = show_progress(batches, len(prompts), "count", world)
        counted = []
        for batch, pixels in zip(batched(prompts, _COUNT_BATCH_SIZE), shown, strict=True):
            asked = [self._asked[prompt.position % len(self._asked)] for prompt in batch]
            counts = self._counter.count(pixels, [one.object for one in asked])
            counted += [
                object_count.CountedImage(
                    file=image_name(prompt.position),
                    prompt=one.prompt,
                    object=one.object,
                    asked=one.count,
                    counted=count,
                )
                for prompt, one, count in zip(batch, asked, counts, strict=True)
            ]
        return counted


def _read_row(group: ProcessGroup, cls: type[_Row], url: str, model: Model) -> _Row | None:
    """Read the row at `url`; None if it is missing or of other weights."""
    row = group.on_main(lambda: storage.read_sealed(cls, url) if storage.exists(url) else None)
    return row if row and row.weights_sha256 == model.sha256 else None


def scene_accuracies(scores: Sequence[SceneScore]) -> dict[str, Estimate | None]:
    """Shares of images that are right, or empty, by field of MetricsRow.

    The share of right relations is over the captions that state one; None if none does. A scene is
    right if count, colour, kind and relation are. `empty_share` is that of images without objects.
    """
    relations = [score.relation for score in scores if score.relation is not None]
    right = [s.count and s.colour and s.kind and s.relation is not False for s in scores]
    return {
        "count_accuracy": estimate_share(np.array([score.count for score in scores])),
        "colour_accuracy": estimate_share(np.array([score.colour for score in scores])),
        "kind_accuracy": estimate_share(np.array([score.kind for score in scores])),
        "relation_accuracy": estimate_share(np.array(relations)) if relations else None,
        "scene_accuracy": estimate_share(np.array(right)),
        "empty_share": estimate_share(np.array([score.empty for score in scores])),
    }
