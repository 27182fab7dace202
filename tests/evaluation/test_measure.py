"""Shares of right scenes from known scores, and CLIP Scores against transformers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from held_out_scenes import HeldOut
from made_statistics import frechet_distance, statistics
from transformers import CLIPModel, CLIPTokenizer

from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.measure import scene_accuracies
from ifvit.evaluation.metrics import retrieval_accuracy
from ifvit.evaluation.references import RealImages, list_images
from ifvit.evaluation.rows import MetricsRow
from ifvit.image_rules import ImageRules
from ifvit.images import decode_png, to_model_range
from ifvit.models.clip import load_clip
from ifvit.models.pretrained import resolve_pretrained
from ifvit.scenes.captions import parse_caption
from ifvit.scenes.score import SceneScore, score_image
from ifvit.shards.reader import ShardReader

SCORES = [
    SceneScore(count=True, colour=True, kind=True, relation=None),
    SceneScore(count=True, colour=True, kind=True, relation=True),
    SceneScore(count=True, colour=True, kind=True, relation=False),
    SceneScore(count=True, colour=True, kind=False, relation=None),
    SceneScore(count=True, colour=False, kind=True, relation=True),
    SceneScore(count=False, colour=True, kind=True, relation=True),
    SceneScore(count=True, colour=False, kind=False, relation=None, empty=True),
    SceneScore(count=True, colour=True, kind=False, relation=None),
]


def test_every_share_counts_what_it_is_named_after() -> None:
    found = {name: one.value for name, one in scene_accuracies(SCORES).items() if one}
    assert found == {
        "count_accuracy": 7 / 8,
        "colour_accuracy": 6 / 8,
        "kind_accuracy": 5 / 8,
        "relation_accuracy": 3 / 4,
        "scene_accuracy": 2 / 8,
        "empty_share": 1 / 8,
    }
    assert scene_accuracies(SCORES[:1])["relation_accuracy"] is None


def test_real_scenes_get_the_best_scores(held_out: HeldOut) -> None:
    reader = ShardReader(held_out.shards)
    captions = [reader.metadata(i).captions[0] for i in range(len(reader))]
    paths = list_images(held_out.images)
    real = RealImages(paths=paths, image_size=64, rules=ImageRules())
    images = np.stack(list(map(real.read, paths)))
    scores = [score_image(*pair) for pair in zip(images, map(parse_caption, captions), strict=True)]
    accuracies = scene_accuracies(scores)
    assert [one.value for one in accuracies.values() if one] == [1, 1, 1, 1, 1, 0]

    scorer = load_clip("scenes/clip")
    features = scorer.embed_images(to_model_range(images)).numpy()
    found = retrieval_accuracy(features, scorer.embed_texts(captions).numpy(), captions)
    assert found is not None
    assert found.value > 0.8
    same = frechet_distance(statistics(features), statistics(features))
    assert same == pytest.approx(0, abs=1e-5)


def test_clip_scores_are_those_of_transformers_for_the_first_caption(
    config: EvaluateConfig, run: str, held_out: HeldOut
) -> None:
    prefix = "a picture of "
    protocol = replace(
        config.protocol,
        scenes=False,
        paper_prefix=prefix,
        caption_rule="random",
        score_caption="first",
    )
    (row,) = evaluate(replace(config, protocol=protocol))
    assert isinstance(row, MetricsRow)
    folder = resolve_pretrained("scenes/clip")
    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    reader = ShardReader(held_out.shards)
    samples = Path(run, "evaluation/test/w2/step_00000007")
    cosines = []
    for position in range(20):
        png = (samples / f"{position:05d}.png").read_bytes()
        pixels = (decode_png(png) / 255 - stored["image_mean"]) / stored["image_std"]
        caption = reader.metadata(position).captions[0]
        text = tokenizer([caption, prefix + caption], padding="max_length", return_tensors="pt")
        with torch.no_grad():
            output = model(
                pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None].float(),
                input_ids=text.input_ids,
            )
        cosines.append(output.logits_per_image[0].numpy() / np.exp(model.logit_scale.item()))
    plain, prefixed = np.array(cosines).T
    assert np.abs(plain - prefixed).max() > 0.01
    assert row.clip_score.value == pytest.approx(plain.mean(), abs=1e-4)
    assert row.clip_score_paper.value == pytest.approx(
        2.5 * np.maximum(prefixed, 0).mean(), abs=1e-4
    )
    listed = [json.loads(line) for line in (samples / "samples.jsonl").read_text().splitlines()]
    assert [one["clip_score"] for one in listed] == pytest.approx(plain, abs=1e-4)
