"""The whole verb on real shards, encoders and scenes; only the backbone is untrained."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held_out_scenes import HeldOut, save_run
from transformers import CLIPModel, CLIPTokenizer

from ifvit.diffusion.sampler import ConditionBatch, Sampler, generate_images
from ifvit.errors import UserError
from ifvit.evaluation import sample_set as draw
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.measure import scenes_accuracy, score_scenes
from ifvit.evaluation.metrics import frechet_distance, retrieval_accuracy, statistics
from ifvit.evaluation.references import list_images, read_batches, read_reference
from ifvit.evaluation.rows import differences, read_row
from ifvit.evaluation.runs import read_run
from ifvit.evaluation.sample_set import hash_prompts, read_prompts
from ifvit.images import decode_png, to_model_range
from ifvit.models.clip import load_clip
from ifvit.models.pretrained import resolve_pretrained
from ifvit.sampling.config import RegulationConfig, SamplingConfig
from ifvit.shards import EncoderIdentity, ShardReader


def with_protocol(config: EvaluateConfig, **changes: object) -> EvaluateConfig:
    protocol = dataclasses.replace(config.protocol, **changes)
    return dataclasses.replace(config, protocol=protocol)


def test_one_evaluation_leaves_its_row_its_images_and_their_captions(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    (row,) = evaluate(config)
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


def test_a_row_that_is_there_is_not_computed_again(config: EvaluateConfig, run: str) -> None:
    (row,) = evaluate(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    (folder / "00004.png").unlink()
    assert evaluate(config) == [row]
    assert not (folder / "00004.png").exists()


def test_without_a_row_only_missing_images_are_drawn(config: EvaluateConfig, run: str) -> None:
    (row,) = evaluate(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    kept, lost = folder / "00003.png", folder / "00004.png"
    kept_at, before = kept.stat().st_mtime_ns, decode_png(lost.read_bytes())
    lost.unlink()
    Path(f"{folder}.json").unlink()
    (again,) = evaluate(config)
    assert kept.stat().st_mtime_ns == kept_at
    after = decode_png(lost.read_bytes())
    assert np.abs(after.astype(int) - before).max() <= 1  # a rounding in another batch
    assert again.clip_score.value == pytest.approx(row.clip_score.value, abs=1e-4)


def test_a_row_of_another_protocol_is_replaced(config: EvaluateConfig) -> None:
    (row,) = evaluate(dataclasses.replace(config, images=None))
    assert row.frechet_distance is None
    (other,) = evaluate(config)
    assert other.frechet_distance is not None
    assert other.seconds_per_image == row.seconds_per_image
    assert differences(row.protocol, other.protocol) == [
        "num reference images none against 24",
        f"reference hash none against {other.protocol.reference_sha256[:12]}",
    ]


def test_every_step_and_guidance_scale_gets_its_row(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    save_run(Path(run), held_out.manifest, step=12)
    few = with_protocol(config, num_samples=2, scenes=False)
    few = dataclasses.replace(few, images=None, steps="all", guidance_scales=[1.0, 2.5])
    rows = evaluate(few)
    found = [(row.step, row.protocol.guidance_scale) for row in rows]
    assert found == [(7, 1.0), (7, 2.5), (12, 1.0), (12, 2.5)]
    read = read_run(run, "run")
    assert read.rows == [rows[0], rows[2], rows[1], rows[3]]
    assert [row.step for row in read.evaluations] == [7, 12]
    assert read.last == rows[2]
    assert evaluate(dataclasses.replace(few, steps=[12])) == rows[2:]
    with pytest.raises(UserError, match=r"no step_00000008; there are: step_00000007, step_0000"):
        evaluate(dataclasses.replace(few, steps=[7, 8]))


def test_tasks_draw_and_one_more_measures(config: EvaluateConfig, run: str) -> None:
    few = dataclasses.replace(with_protocol(config, num_samples=5), num_tasks=2)
    assert evaluate(few) == []
    assert evaluate(dataclasses.replace(few, task=1)) == []
    folder = Path(run, "evaluation/test/w2/step_00000007")
    assert [path.name for path in sorted(folder.glob("*.png"))] == [
        f"{position:05d}.png" for position in range(5)
    ]
    (row,) = evaluate(dataclasses.replace(few, num_tasks=1))
    assert row.clip_score.num_samples == 5


def test_a_random_caption_is_drawn_and_the_first_one_scored(
    config: EvaluateConfig, held_out: HeldOut, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol = dataclasses.replace(
        config.protocol, caption_rule="random", score_caption="first", scenes=False
    )
    reader = ShardReader(held_out.shards)
    prompts = read_prompts(reader, protocol)
    assert len({prompt.caption for prompt in prompts}) > 2
    for prompt in prompts:
        captions = reader.metadata(prompt.position).captions
        assert prompt.text == captions[prompt.caption]
        assert prompt.score_text == captions[0]
    assert read_prompts(reader, protocol) == prompts
    other = dataclasses.replace(protocol, score_caption="same")
    assert all(prompt.score_text == prompt.text for prompt in read_prompts(reader, other))
    drawn: list[torch.Tensor] = []

    def record(sampler: Sampler, batches: Iterable[ConditionBatch], *rest: Any) -> Any:
        listed = list(batches)
        drawn.extend(batch.condition for batch in listed)
        return generate_images(sampler, listed, *rest)

    monkeypatch.setattr(draw, "generate_images", record)
    (row,) = evaluate(dataclasses.replace(config, protocol=protocol, images=None))
    contexts = [reader.context(prompt.position, prompt.caption) for prompt in prompts]
    np.testing.assert_array_equal(torch.cat(drawn), np.stack(contexts))
    samples = Path(run, "evaluation/test/w2/step_00000007/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in samples] == [p.text for p in prompts]
    assert row.protocol.caption_rule == "random"
    assert row.protocol.prompts_sha256 == hash_prompts(prompts)


def test_samples_of_other_settings_are_not_mixed_or_lost(config: EvaluateConfig) -> None:
    evaluate(config)
    sampling = SamplingConfig(num_steps=3, batch_size=8)
    with pytest.raises(UserError, match="another num_steps"):
        evaluate(with_protocol(config, sampling=sampling))


def test_a_row_of_other_method_settings_is_not_taken_for_this_one(config: EvaluateConfig) -> None:
    def regulated(share: float) -> EvaluateConfig:
        regulation = RegulationConfig(share_of_steps=share)
        sampling = SamplingConfig(
            num_steps=2, batch_size=8, method="regulate", regulation=regulation
        )
        return with_protocol(config, sampling=sampling)

    (row,) = evaluate(regulated(0.5))
    assert evaluate(regulated(0.5)) == [row]
    with pytest.raises(UserError, match="another regulation"):
        evaluate(regulated(1.0))


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
    features = scorer.embed_images(to_model_range(images)).numpy()
    found = retrieval_accuracy(features, scorer.embed_texts(captions).numpy(), captions)
    assert found is not None
    assert found.value > 0.8
    assert frechet_distance(statistics(features), statistics(features)) == pytest.approx(
        0, abs=1e-5
    )


def test_clip_scores_are_those_of_transformers_by_the_first_caption_whichever_was_drawn(
    config: EvaluateConfig, run: str, held_out: HeldOut
) -> None:
    prefix = "a picture of "
    random_first = {"caption_rule": "random", "score_caption": "first"}
    (row,) = evaluate(with_protocol(config, scenes=False, paper_prefix=prefix, **random_first))
    folder = resolve_pretrained("scenes/clip")
    model = CLIPModel.from_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    stored = json.loads((folder / "preprocessor_config.json").read_text())
    reader = ShardReader(held_out.shards)
    cosines = []
    for position in range(20):
        png = Path(run, f"evaluation/test/w2/step_00000007/{position:05d}.png").read_bytes()
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
