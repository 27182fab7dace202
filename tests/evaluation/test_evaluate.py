"""The whole verb on real shards, encoders and scenes; only the backbone is untrained."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from held_out_scenes import HeldOut, save_run

from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.frechet import extract, frechet_distance, statistics
from ifvit.evaluation.metrics import read_row
from ifvit.evaluation.references import list_images, read_batches, read_reference
from ifvit.evaluation.retrieval import retrieval_accuracy
from ifvit.evaluation.scenes_accuracy import scenes_accuracy, score_scenes
from ifvit.images import decode_png
from ifvit.models.clip import load_clip
from ifvit.sampling.config import SamplingConfig
from ifvit.shards import EncoderIdentity, ShardReader


def with_protocol(config: EvaluateConfig, **changes: object) -> EvaluateConfig:
    protocol = dataclasses.replace(config.protocol, **changes)
    return dataclasses.replace(config, protocol=protocol)


def test_one_evaluation_leaves_its_row_its_images_and_their_captions(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    row = evaluate(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    assert read_row(f"{folder}.json") == row
    assert (row.step, row.ema_decay, row.protocol.num_samples) == (7, 0.999, 20)
    assert row.protocol.features_sha256 == load_clip("scenes/clip").identity.sha256
    assert row.protocol.num_reference_images == len(list_images(held_out.images))
    for estimate in (row.frechet_distance, row.retrieval_at_16, row.count_accuracy):
        assert estimate is not None
        assert estimate.standard_error > 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 20
    first = ShardReader(held_out.shards).metadata(0)
    assert (samples[0]["prompt"], samples[0]["image_id"]) == (first.captions[0], first.image_id)
    assert all((folder / sample["file"]).is_file() for sample in samples)
    assert all((folder / sample["real"]).is_file() for sample in samples)
    assert set(samples[0]["scores"]) == {"count", "colour", "kind", "relation"}


def test_a_second_evaluation_draws_only_what_is_missing(config: EvaluateConfig, run: str) -> None:
    evaluate(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    kept, lost = folder / "00003.png", folder / "00004.png"
    kept_at, before = kept.stat().st_mtime_ns, decode_png(lost.read_bytes())
    row = evaluate(config)
    assert evaluate(config) == row
    lost.unlink()
    evaluate(config)
    assert kept.stat().st_mtime_ns == kept_at
    after = decode_png(lost.read_bytes())
    assert np.abs(after.astype(int) - before).max() <= 1  # a rounding in another batch


def test_samples_of_other_settings_are_not_mixed_or_lost(config: EvaluateConfig) -> None:
    evaluate(config)
    sampling = SamplingConfig(num_steps=3, batch_size=8)
    with pytest.raises(UserError, match="another num_steps"):
        evaluate(with_protocol(config, sampling=sampling))


def test_shards_of_another_encoder_are_refused(
    config: EvaluateConfig, held_out: HeldOut, tmp_path: Path
) -> None:
    foreign = EncoderIdentity(name="other/vae", sha256="f" * 64)
    run = save_run(tmp_path / "foreign", held_out.manifest, vae=foreign)
    with pytest.raises(UserError, match=r"vae .* trained with other/vae"):
        evaluate(dataclasses.replace(config, weights=run))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "nowhere"}, "nowhere: no such folder"),
        ({"weights": "nowhere"}, "nowhere"),
        ({"shards": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_input_is_one_line(
    config: EvaluateConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate(dataclasses.replace(config, **changes))
    assert "\n" not in str(caught.value)


def test_more_samples_than_images_are_refused(config: EvaluateConfig) -> None:
    with pytest.raises(UserError, match="24 images, num_samples asks for 25"):
        evaluate(with_protocol(config, num_samples=25))


def test_a_broken_real_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    with pytest.raises(UserError, match=r"broken\.jpg"):
        read_reference(tmp_path / "broken.jpg", 64)


def test_real_scenes_score_as_good_as_it_gets(held_out: HeldOut) -> None:
    reader = ShardReader(held_out.shards)
    captions = [reader.metadata(i).captions[0] for i in range(len(reader))]
    paths = list_images(held_out.images)
    images = np.concatenate(list(read_batches(paths, 64, 10)))
    accuracy = scenes_accuracy(score_scenes(images, captions))
    assert (accuracy.count.value, accuracy.colour.value, accuracy.kind.value) == (1, 1, 1)
    assert accuracy.scene.value == 1

    scorer = load_clip("scenes/clip")
    features = np.concatenate(list(extract(scorer.embed_images, [images], "cpu")))
    found = retrieval_accuracy(features, scorer.embed_texts(captions).numpy(), captions)
    assert found is not None
    assert found.value > 0.8
    assert frechet_distance(statistics(features), statistics(features)) == pytest.approx(
        0, abs=1e-5
    )
