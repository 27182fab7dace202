"""Count the objects of a name in images, by a detector of transformers or exactly on scenes.

Counting follows GenEval (Ghosh et al. 2023, arXiv 2310.11513): boxes of the class that score above
0.9 count, at most 16 of them, and overlaps are suppressed only by the model itself.
Shapes: B images, H, W pixels.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    Owlv2Config,
    OwlViTConfig,
)
from transformers.utils.logging import disable_progress_bar

from ifvit.errors import UserError
from ifvit.evaluation.object_count import MAX_ASKED, CountingRule
from ifvit.images import Pixels
from ifvit.models.pretrained import identify, reading, resolve_pretrained
from ifvit.records import shorten
from ifvit.scenes.drawings import KINDS
from ifvit.scenes.score import find_objects

SCENES = "scenes"
_CLASS_THRESHOLD = 0.9
_WORD_THRESHOLD = 0.3


class SceneCounter:
    """Counts circles, squares or triangles of any colour by exact analysis of the pixels."""

    rule = CountingRule(detector=SCENES)

    def check(self, objects: Iterable[str]) -> None:
        """Raise UserError for a name that is not a kind of object in scenes."""
        _check_names(SCENES, objects, KINDS)

    def count(self, images: Pixels, objects: Sequence[str]) -> list[int]:
        """Numbers of `objects[b]` in image b of (B, H, W, 3)."""
        return [
            sum(found.kind == name.lower() for found in find_objects(image))
            for image, name in zip(images, objects, strict=True)
        ]


class ClassDetector:
    """A detector of fixed classes, such as DETR, YOLOS or RT-DETR."""

    def __init__(self, model: Any, processor: Any, rule: CountingRule) -> None:
        self.rule = rule
        self._model = model
        self._processor = processor
        self._classes = {name.lower(): index for index, name in model.config.id2label.items()}

    def check(self, objects: Iterable[str]) -> None:
        """Raise UserError for a name that is not a class of the model."""
        _check_names(self.rule.detector, objects, self._classes)

    @torch.no_grad()
    def count(self, images: Pixels, objects: Sequence[str]) -> list[int]:
        """Numbers of `objects[b]` in image b of (B, H, W, 3)."""
        inputs = self._processor(images=list(images), return_tensors="pt").to(self._model.device)
        found = self._processor.post_process_object_detection(
            self._model(**inputs), threshold=self.rule.threshold
        )
        return [
            min(int((boxes["labels"] == self._classes[name.lower()]).sum()), MAX_ASKED)
            for boxes, name in zip(found, objects, strict=True)
        ]


class WordDetector:
    """A detector that finds what words describe: OWL-ViT or OWLv2."""

    def __init__(self, model: Any, processor: Any, rule: CountingRule) -> None:
        self.rule = rule
        self._model = model
        self._processor = processor

    def check(self, objects: Iterable[str]) -> None:
        """Raise UserError for words that have more tokens than the model reads."""
        longest = self._model.config.text_config.max_position_embeddings
        for name in objects:
            if len(self._processor.tokenizer(name).input_ids) > longest:
                raise UserError(
                    f"{self.rule.detector} reads {longest} tokens; shorten the object "
                    f'"{shorten(name)}"'
                )

    @torch.no_grad()
    def count(self, images: Pixels, objects: Sequence[str]) -> list[int]:
        """Numbers of `objects[b]` in image b of (B, H, W, 3)."""
        inputs = self._processor(
            images=list(images), text=[[name] for name in objects], return_tensors="pt"
        ).to(self._model.device)
        found = self._processor.post_process_grounded_object_detection(
            self._model(**inputs), threshold=self.rule.threshold
        )
        return [min(len(boxes["scores"]), MAX_ASKED) for boxes in found]


ObjectCounter = SceneCounter | ClassDetector | WordDetector


def open_counter(name: str, threshold: float | None, device: str) -> ObjectCounter:
    """Open `scenes`, or the detector in a local folder or hub repository `name`.

    The detector's configuration decides whether it knows fixed classes or reads words.
    Raises UserError if `name` is not a detector or does not load.
    """
    if name == SCENES:
        return SceneCounter()
    folder = resolve_pretrained(name)
    digest = identify(name, folder).sha256
    with reading(f"detector {name} does not load; give one like DETR, YOLOS or OWL-ViT"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        reads_words = isinstance(config, OwlViTConfig | Owlv2Config)
        if not reads_words and type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
            raise ValueError(f"its model type is {config.model_type}")
        if reads_words:
            model = _load(AutoModelForZeroShotObjectDetection, folder, device)
            processor_class: Any = AutoProcessor
        else:
            model = _load(AutoModelForObjectDetection, folder, device)
            processor_class = AutoImageProcessor
        # Counts must not depend on whether torchvision is installed.
        processor = processor_class.from_pretrained(folder, backend="pil", trust_remote_code=False)
    default = _WORD_THRESHOLD if reads_words else _CLASS_THRESHOLD
    rule = CountingRule(
        detector=name,
        detector_sha256=digest,
        threshold=default if threshold is None else threshold,
        max_boxes=MAX_ASKED,
    )
    return (WordDetector if reads_words else ClassDetector)(model, processor, rule)


def _load(cls: Any, folder: Path, device: str) -> Any:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # the bar lasts less than a second
    model, loading = cls.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if loading["missing_keys"]:
        # transformers would initialise them at random and only warn.
        raise ValueError(f"no weights for {min(loading['missing_keys'])}")
    return model.to(device).eval().requires_grad_(False)


def _check_names(detector: str, objects: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for name in objects:
        if name.lower() not in names:
            near = difflib.get_close_matches(name.lower(), names, cutoff=0.5) or names[:10]
            raise UserError(
                f'detector {detector} knows no "{shorten(name)}" among its {len(names)} classes; '
                f"near it: {shorten(', '.join(near), 200)}"
            )
