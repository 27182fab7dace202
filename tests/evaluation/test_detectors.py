"""Counts by detectors of the real classes (small, untrained or rigged) and by exact analysis."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_detectors import CLASSES, NUM_BOXES, TRANSFORMER, save_detr, save_owlvit, save_yolos
from transformers import YolosConfig, YolosModel
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.owlvit.processing_owlvit import OwlViTProcessor
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from ifvit.errors import UserError
from ifvit.evaluation.detectors import ClassDetector, CountingRule, WordDetector, open_counter
from ifvit.scenes.drawings import Group, Scene, render_sampled_scene, render_scene

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
NOTHING = len(CLASSES)


def test_a_detector_sees_through_its_own_processor_and_weights(tmp_path: Path) -> None:
    counter = open_counter(save_yolos(tmp_path, seen="bus"), None, "cpu")
    assert counter.count(IMAGES, ["bus", "person", "BUS"]) == [16, 0, 16]
    assert counter.rule.threshold == 0.9
    assert counter.rule.max_boxes == 16
    assert len(counter.rule.detector_sha256 or "") == 64


@pytest.mark.parametrize("save", [save_yolos, save_detr])
def test_an_untrained_detector_is_sure_of_nothing(
    save: Callable[[Path], str], tmp_path: Path
) -> None:
    counter = open_counter(save(tmp_path), None, "cpu")
    assert counter.count(IMAGES, ["bus", "sheep", "person"]) == [0, 0, 0]


def test_a_threshold_of_0_counts_every_box_as_its_likeliest_class(tmp_path: Path) -> None:
    counter = open_counter(save_detr(tmp_path), 0.0, "cpu")
    counted = [counter.count(IMAGES[:1], [name])[0] for name in CLASSES]
    assert max(counted) == 16 < NUM_BOXES  # all queries of an untrained DETR agree
    assert sum(counted) == 16


@pytest.mark.parametrize(("shift", "expected"), [(10.0, 16), (-10.0, 0)])
def test_a_detector_that_reads_words_needs_no_classes(
    shift: float, expected: int, tmp_path: Path
) -> None:
    counter = open_counter(save_owlvit(tmp_path, shift), None, "cpu")
    counter.check(["red circle"])
    assert counter.rule.threshold == 0.3
    assert counter.count(IMAGES, ["red circle", "square", "circle"]) == [expected] * 3
    with pytest.raises(UserError, match='reads 16 tokens; shorten the object "red red'):
        counter.check(["red " * 20])


def class_logits(*boxes: tuple[int, float]) -> torch.Tensor:
    """(1, Q, classes + 1) logits in which box q is of a class with a probability."""
    probabilities = torch.zeros(1, len(boxes), len(CLASSES) + 1)
    for place, (label, probability) in enumerate(boxes):
        probabilities[0, place] = (1 - probability) / len(CLASSES)
        probabilities[0, place, label] = probability
    return probabilities.log()


def class_detector(logits: torch.Tensor, threshold: float) -> ClassDetector:
    """A model that always returns `logits`, and one and the same box for all of them."""

    def model(**inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=logits, pred_boxes=torch.full((*logits.shape[:2], 4), 0.5))

    model.device = "cpu"  # type: ignore[attr-defined]
    model.config = SimpleNamespace(id2label=dict(enumerate(CLASSES)))  # type: ignore[attr-defined]
    rule = CountingRule(detector="made", threshold=threshold)
    return ClassDetector(model, YolosImageProcessorPil(), rule)


def test_at_most_16_boxes_of_the_class_above_the_threshold_are_counted() -> None:
    logits = class_logits(
        (0, 0.95), (0, 0.99), (0, 0.91), (0, 0.89), (1, 0.95), (1, 0.5), (NOTHING, 0.99)
    )
    strict, lax = class_detector(logits, 0.9), class_detector(logits, 0.4)
    assert [strict.count(IMAGES[:1], [name]) for name in CLASSES] == [[3], [1], [0]]
    assert [lax.count(IMAGES[:1], [name]) for name in CLASSES] == [[4], [2], [0]]
    full = class_detector(class_logits(*[(0, 0.95)] * 19, *[(1, 0.95)] * 15), 0.9)
    assert [full.count(IMAGES[:1], [name]) for name in CLASSES] == [[16], [15], [0]]


def test_words_are_counted_by_their_own_scores() -> None:
    scores = torch.tensor([[0.31, 0.29, 0.8, 0.02], [0.1, 0.1, 0.1, 0.3001]])

    def model(**inputs: torch.Tensor) -> Any:
        return SimpleNamespace(logits=scores.logit()[..., None], pred_boxes=torch.ones(2, 4, 4))

    def processor(**inputs: Any) -> Any:
        assert inputs["text"] == [["clock"], ["egg"]]
        return SimpleNamespace(to=lambda device: {})

    model.device = "cpu"  # type: ignore[attr-defined]
    real = OwlViTProcessor.__new__(OwlViTProcessor)
    real.image_processor = OwlViTImageProcessorPil()
    processor.post_process_grounded_object_detection = (  # type: ignore[attr-defined]
        real.post_process_grounded_object_detection
    )
    rule = CountingRule(detector="made", threshold=0.3)
    assert WordDetector(model, processor, rule).count(IMAGES[:2], ["clock", "egg"]) == [2, 1]


def test_scenes_are_counted_exactly() -> None:
    counter = open_counter("scenes", None, "cpu")
    for rendered in (render_sampled_scene(seed=5, image_id=number) for number in range(20)):
        for kind in ("circle", "square", "triangle"):
            wanted = sum(group.count for group in rendered.scene.groups if group.kind == kind)
            assert counter.count(rendered.image[None], [kind]) == [wanted]


def test_colours_do_not_matter_to_a_count_of_scenes() -> None:
    rng = np.random.default_rng(0)
    scene = Scene(
        first=Group(count=2, colour="red", kind="square"),
        relation="above",
        second=Group(count=1, colour="blue", kind="square"),
    )
    image = render_scene(scene, rng).image
    counter = open_counter("scenes", None, "cpu")
    counter.check(["Square"])
    assert counter.count(np.stack([image] * 3), ["square", "Square", "circle"]) == [3, 3, 0]


def test_an_unknown_object_is_told_the_names_near_it(tmp_path: Path) -> None:
    counter = open_counter(save_yolos(tmp_path), None, "cpu")
    counter.check(["bus", "sheep"])
    with pytest.raises(UserError, match=r'knows no "buses" among its 3 classes; near it: bus$'):
        counter.check(["bus", "buses"])
    with pytest.raises(UserError, match=r'detector scenes knows no "apple".*circle, square'):
        open_counter("scenes", None, "cpu").check(["apple"])


def test_a_model_that_is_not_a_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scenes/clip does not load.*its model type is clip"):
        open_counter("scenes/clip", None, "cpu")
    YolosModel(YolosConfig(**TRANSFORMER, image_size=[64, 64])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no weights for bbox_predictor"):
        open_counter(str(tmp_path), None, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        '{"model_type": "yolos", "auto_map": {"AutoConfig": "evil.Evil"}}',
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}',
        '{"model_type": "yolos", "hidden_size": "a"}',
        '{"model_type": "yolos", "id2label": [1]}',
        '{"model_type": ["yolos"]}',
        "[]",
        "[" * 5000,
        "",
    ],
)
def test_a_strangers_detector_runs_no_code_and_asks_nothing(content: str, tmp_path: Path) -> None:
    folder = Path(save_yolos(tmp_path / "model"))
    (folder / "config.json").write_text(content)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n\n\nclass Evil:\n    pass\n")
    with pytest.raises(UserError, match="does not load") as raised:
        open_counter(str(folder), None, "cpu")
    assert str(raised.value).isprintable()
    assert not ran.exists()
