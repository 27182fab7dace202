"""The verb on real shards, encoders and scenes; only the backbone is untrained."""

import dataclasses
import json
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from held_out_scenes import HeldOut, save_run

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.cli import main
from ifvit.diffusion.sampler import ConditionBatch, generate_images
from ifvit.errors import UserError
from ifvit.evaluation.config import EvaluateConfig
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.evaluation.references import list_images
from ifvit.evaluation.rows import MetricsRow, differences
from ifvit.evaluation.runs import read_run
from ifvit.evaluation.sample_set import (
    of_prompts,
    open_encoded_conditions,
    open_shard_conditions,
    read_prompts,
)
from ifvit.images import decode_png
from ifvit.models.clip import load_clip
from ifvit.models.conditioning import DatasetConditions
from ifvit.models.presets import CLASS_PRESETS
from ifvit.models.pretrained import resolve_pretrained
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights, save_weights
from ifvit.sampling.config import RegulationConfig, SamplingConfig
from ifvit.sampling.load import load_model, load_sampler
from ifvit.sampling.samples import read_images
from ifvit.scenes.image_sets import class_scenes, render_class_set
from ifvit.shards.format import EncoderIdentity, Manifest, read_manifest
from ifvit.shards.reader import ShardReader
from ifvit.storage import read_sealed


def with_protocol(config: EvaluateConfig, **changes: object) -> EvaluateConfig:
    protocol = dataclasses.replace(config.protocol, **changes)
    return dataclasses.replace(config, protocol=protocol)


def measure(config: EvaluateConfig) -> MetricsRow:
    (row,) = evaluate(config)
    assert isinstance(row, MetricsRow)
    return row


def samples_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_one_evaluation_writes_its_row_its_images_and_their_prompts(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    row = measure(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    assert read_sealed(MetricsRow, f"{folder}.json") == row
    assert (row.step, row.ema_decay, row.protocol.num_samples) == (7, 0.999, 20)
    assert row.protocol.features_sha256 == load_clip("scenes/clip").identity.sha256
    assert row.protocol.num_reference_images == len(list_images(held_out.images))
    for estimate in (row.frechet_distance, row.retrieval_at_16, row.count_accuracy):
        assert estimate is not None
        assert estimate.standard_error > 0
    samples = samples_of(folder)
    assert len(samples) == 20
    first = ShardReader(held_out.shards).metadata(0)
    assert (samples[0]["prompt"], samples[0]["image_id"]) == (first.captions[0], first.image_id)
    assert all((folder / str(sample["file"])).is_file() for sample in samples)
    assert all((folder / str(sample["real"])).is_file() for sample in samples)
    parts = {"count", "colour", "kind", "relation"}
    assert set(samples[0]["scores"]) == parts  # type: ignore[call-overload]


def test_the_held_out_loss_needs_no_images_and_is_a_mean_over_the_samples(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    few = with_protocol(config, sampling=SamplingConfig(num_steps=2, seed=3), scenes=False)
    first, other = evaluate(dataclasses.replace(few, guidance_scales=[1.0, 4.0], images=None))
    assert isinstance(first, MetricsRow)
    assert isinstance(other, MetricsRow)
    backbone, info = load_weights(run)
    losses = HeldOutLoss(
        DatasetConditions(ShardReader(held_out.shards)), 20, info, "cpu", seed=3
    ).measure(backbone)
    found = first.held_out_loss
    assert found is not None
    assert found == other.held_out_loss, "it depends on no guidance"
    assert found.value == losses.mean(axis=1).mean()
    assert found.num_samples == 20
    assert found.standard_error == pytest.approx(losses.mean(axis=1).std(ddof=1) / 20**0.5)
    assert first.target == info.target
    listed = samples_of(Path(run, "evaluation/test/w1/step_00000007"))
    assert [one["held_out_loss"] for one in listed] == losses.mean(axis=1).tolist()


def test_nothing_is_written_where_a_link_of_the_run_leads(
    config: EvaluateConfig, run: str, tmp_path: Path
) -> None:
    (tmp_path / "outside").mkdir()
    Path(run, "evaluation").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="evaluation: a link that leads out of"):
        evaluate(config)
    assert not any((tmp_path / "outside").iterdir())


def test_an_autoencoder_that_moved_is_named_by_a_flag(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    few = dataclasses.replace(with_protocol(config, num_samples=2, scenes=False), images=None)
    moved = dataclasses.replace(few, vae=str(tmp_path / "vae"))
    with pytest.raises(UserError, match=r"/vae: no such folder; .*--vae$"):
        evaluate(moved)
    shutil.copytree(resolve_pretrained("scenes/vae"), tmp_path / "vae")
    assert len(evaluate(moved)) == 1


def test_a_row_that_exists_needs_no_autoencoder(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(with_protocol(config, num_samples=2, scenes=False), images=None)
    rows = evaluate(few)

    def load(*args: object) -> None:
        raise AssertionError("the autoencoder was opened")

    monkeypatch.setattr("ifvit.evaluation.evaluate.load_sampler", load)
    assert evaluate(few) == rows


def test_only_what_is_missing_is_generated_or_measured(config: EvaluateConfig, run: str) -> None:
    row = measure(config)
    folder = Path(run, "evaluation/test/w2/step_00000007")
    kept, lost = folder / "00003.png", folder / "00004.png"
    kept_at, before = kept.stat().st_mtime_ns, decode_png(lost.read_bytes())
    lost.unlink()
    assert evaluate(config) == [row], "the row is current, so nothing is generated"
    assert not lost.exists()
    Path(f"{folder}.json").unlink()
    again = measure(config)
    assert kept.stat().st_mtime_ns == kept_at
    after = decode_png(lost.read_bytes())
    assert np.abs(after.astype(int) - before).max() <= 1  # a rounding in another batch
    assert again.clip_score.value == pytest.approx(row.clip_score.value, abs=1e-4)


def test_a_row_of_another_protocol_is_replaced(config: EvaluateConfig) -> None:
    row = measure(dataclasses.replace(config, images=None))
    assert row.frechet_distance is None
    other = measure(config)
    assert other.frechet_distance is not None
    assert other.protocol.reference_sha256 is not None
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
    found = [(row.step, row.protocol.sampling["guidance_scale"]) for row in rows]
    assert found == [(7, 1.0), (7, 2.5), (12, 1.0), (12, 2.5)]
    read = read_run(run, "run")
    assert read.rows == [rows[0], rows[2], rows[1], rows[3]]
    assert evaluate(dataclasses.replace(few, steps=[12])) == rows[2:]
    with pytest.raises(UserError, match=r"no step_00000008; there are: step_00000007, step_0000"):
        evaluate(dataclasses.replace(few, steps=[7, 8]))


def test_methods_share_prompts_and_noise_and_never_overwrite_each_other(
    config: EvaluateConfig, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = dataclasses.replace(
        with_protocol(config, num_samples=16), images=None, methods=["plain", "date", "both"]
    )
    rows = evaluate(few)
    assert [row.protocol.sampling["method"] for row in rows] == few.methods
    assert len({row.protocol.prompts_sha256 for row in rows}) == 1
    evaluation = Path(run, "evaluation")
    names = [path.name for path in sorted(evaluation.iterdir())]
    assert names == ["test", "test_both", "test_date"]
    settings = (evaluation / "test_both/w2/step_00000007/settings.json").read_text()
    assert json.loads(settings)["date"]["radius"] == 0.5

    grid = decode_png((evaluation / "test/w2/step_00000007_methods.png").read_bytes())
    assert grid.shape == (8 * 66 - 2, 3 * 66 - 2, 3)
    first = decode_png((evaluation / "test_date/w2/step_00000007/00000.png").read_bytes())
    np.testing.assert_array_equal(grid[:64, 66 : 66 + 64], first)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "date above" in line]
    gain = float(line.split(": ")[1].split()[0])
    clip_scores = [row.clip_score.value for row in rows if isinstance(row, MetricsRow)]
    assert gain == pytest.approx(clip_scores[1] - clip_scores[0], abs=1e-4)
    assert gain > 0
    assert evaluate(dataclasses.replace(few, methods=["both", "plain"])) == [rows[2], rows[0]]


def test_methods_are_given_as_words(
    config: EvaluateConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", "--methods", "plain", "dates", "--weights", "w", "--shards", "s"]
    with pytest.raises(SystemExit):
        main(words)
    assert "dates" in capsys.readouterr().err


def test_tasks_generate_and_a_last_run_measures(config: EvaluateConfig, run: str) -> None:
    few = dataclasses.replace(with_protocol(config, num_samples=5), num_tasks=2)
    assert evaluate(few) == []
    assert evaluate(dataclasses.replace(few, task=1)) == []
    folder = Path(run, "evaluation/test/w2/step_00000007")
    assert [path.name for path in sorted(folder.glob("*.png"))] == [
        f"{position:05d}.png" for position in range(5)
    ]
    assert measure(dataclasses.replace(few, num_tasks=1)).clip_score.num_samples == 5


def test_a_random_caption_is_the_prompt_and_the_first_one_is_scored(
    config: EvaluateConfig, held_out: HeldOut, run: str
) -> None:
    protocol = dataclasses.replace(
        config.protocol, caption_rule="random", score_caption="first", scenes=False
    )
    reader = ShardReader(held_out.shards)
    prompts = read_prompts(reader, protocol)
    assert len({prompt.caption for prompt in prompts}) > 2
    for prompt in prompts:
        captions = reader.metadata(prompt.position).captions
        assert (prompt.text, prompt.score_text) == (captions[prompt.caption], captions[0])
    assert read_prompts(reader, protocol) == prompts
    other = dataclasses.replace(protocol, score_caption="same")
    assert all(prompt.score_text == prompt.text for prompt in read_prompts(reader, other))
    conditions = of_prompts(open_shard_conditions(reader, load_model(run, "cpu"))).read(prompts)
    contexts = [reader.context(prompt.position, prompt.caption) for prompt in prompts]
    np.testing.assert_array_equal(conditions, np.stack(contexts))

    row = measure(dataclasses.replace(config, protocol=protocol, images=None))
    samples = samples_of(Path(run, "evaluation/test/w2/step_00000007"))
    assert [sample["prompt"] for sample in samples] == [prompt.text for prompt in prompts]
    assert row.protocol.caption_rule == "random"
    texts = [[prompt.image_id, prompt.text] for prompt in prompts]
    assert row.protocol.prompts_sha256 == sha256(json.dumps(texts).encode()).hexdigest()


def test_an_evaluation_guides_by_the_null_context_of_the_weights(
    config: EvaluateConfig, held_out: HeldOut, run: str, tmp_path: Path
) -> None:
    zeros = str(tmp_path / "zeros")
    backbone, info = load_weights(run)
    info = dataclasses.replace(info, null_context="zeros")
    save_weights(f"{zeros}/weights/step_00000007/ema", backbone, info)
    reader = ShardReader(held_out.shards)
    for url, is_zero in ((run, False), (zeros, True)):
        model = load_model(url, "cpu")
        for conditions in (open_shard_conditions(reader, model), open_encoded_conditions(model)):
            expected = 0 * reader.null_context if is_zero else reader.null_context
            np.testing.assert_allclose(conditions.null[0], expected, atol=1e-3)

    few = with_protocol(config, num_samples=2, scenes=False)
    images = []
    for url in (run, zeros):
        evaluate(dataclasses.replace(few, weights=url, images=None))
        folder = f"{url}/evaluation/test/w2/step_00000007"
        images.append(read_images([f"{folder}/00000.png", f"{folder}/00001.png"]))
    assert (images[0] != images[1]).any()
    model = load_model(zeros, "cpu")
    sampler = load_sampler(model, torch.zeros(1, *reader.text.context_shape), few.protocol.sampling)
    contexts = torch.from_numpy(np.stack([reader.context(n, 0) for n in range(2)]))
    batch = ConditionBatch(positions=torch.arange(2), condition=contexts)
    (expected,) = generate_images(sampler, [batch], few.protocol.sampling)
    np.testing.assert_array_equal(images[1], expected)


def test_a_flow_is_evaluated_with_its_solvers(config: EvaluateConfig, run: str) -> None:
    backbone, info = load_weights(run)
    info = dataclasses.replace(info, prediction="flow", shift=2.0)
    save_weights(f"{run}/weights/step_00000007/ema", backbone, info)
    heun = SamplingConfig(num_steps=3, solver="heun", precision="bf16")
    few = with_protocol(config, num_samples=2, sampling=heun)
    row = measure(few)
    assert (row.protocol.sampling["solver"], row.protocol.sampling["precision"]) == ("heun", "bf16")
    wrong = dataclasses.replace(heun, solver="unipc")
    with pytest.raises(UserError, match="solver unipc does not take flow predictions"):
        evaluate(with_protocol(config, name="other", num_samples=2, sampling=wrong))
    assert not Path(run, "evaluation/other").exists()


def test_samples_of_other_settings_are_neither_mixed_nor_lost(config: EvaluateConfig) -> None:
    def regulated(share: float, num_steps: int = 2) -> EvaluateConfig:
        sampling = SamplingConfig(
            num_steps=num_steps,
            batch_size=8,
            method="regulate",
            regulation=RegulationConfig(share_of_steps=share),
        )
        return with_protocol(config, sampling=sampling, num_samples=8)

    row = measure(regulated(0.5))
    assert evaluate(regulated(0.5)) == [row]
    with pytest.raises(UserError, match="another regulation"):
        evaluate(regulated(1.0))
    with pytest.raises(UserError, match="another num_steps"):
        evaluate(regulated(0.5, num_steps=3))


def test_shards_of_another_encoder_are_refused(
    config: EvaluateConfig, held_out: HeldOut, tmp_path: Path
) -> None:
    foreign = EncoderIdentity(name="other/vae", sha256="f" * 64)
    run = save_run(tmp_path / "foreign", held_out.manifest, vae=foreign)
    with pytest.raises(UserError, match=r"vae .* trained with other/vae"):
        evaluate(dataclasses.replace(config, weights=run))


@pytest.mark.parametrize("field", ["images", "weights", "shards"])
def test_a_missing_folder_is_one_line(config: EvaluateConfig, field: str) -> None:
    with pytest.raises(UserError, match="nowhere") as caught:
        evaluate(dataclasses.replace(config, **{field: "nowhere"}))
    assert "\n" not in str(caught.value)


def test_settings_that_contradict_each_other_are_refused(config: EvaluateConfig) -> None:
    with pytest.raises(UserError, match="24 images, but num_samples is 25"):
        evaluate(with_protocol(config, num_samples=25))
    for changes, named in (
        ({"shards": None}, "shards is not set"),
        ({"task": 1}, "task 1 is not one of num_tasks 1"),
        ({"reference": "r.npz"}, "images or reference"),
    ):
        with pytest.raises(ValueError, match=named):
            dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out scenes in class folders, and their shards."""
    folder = tmp_path_factory.mktemp("classes")
    render_class_set(folder, "val2014", 80)
    encode(
        EncodeConfig(
            source="folder",
            images=str(folder / "val2014"),
            output=str(folder / "shards"),
            vae="scenes/vae",
            image_size=64,
            device="cpu",
            num_workers=1,
        )
    )
    return folder


def save_class_run(folder: Path, manifest: Manifest, classes: tuple[str, ...]) -> str:
    info = WeightsInfo(
        step=7,
        ema_decay=0.99,
        scaling_factor=manifest.scaling_factor,
        vae=manifest.vae,
        text_encoder=None,
        classes=classes,
        recipe_sha256="0" * 64,
    )
    torch.manual_seed(0)
    shape = dataclasses.replace(CLASS_PRESETS["unet_tiny"], num_classes=len(classes))
    backbone = build_backbone(shape)
    save_weights(str(folder / "run/weights/step_00000007/ema"), backbone, info)
    return str(folder / "run")


def test_a_labelled_set_is_evaluated_by_the_names_of_its_classes(
    classes: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    shards = str(classes / "shards")
    manifest = read_manifest(shards)
    assert manifest.classes == tuple(sorted(class_scenes()))
    run = save_class_run(tmp_path, manifest, manifest.classes)
    given = dataclasses.replace(config, weights=run, shards=shards, images=str(classes / "val2014"))
    row = measure(given)
    assert row.frechet_distance is not None
    assert row.kind_accuracy is not None
    assert row.relation_accuracy is None
    (listed,) = Path(run).rglob("samples.jsonl")
    for number, sample in enumerate(samples_of(listed.parent)):
        assert sample["prompt"] == manifest.classes[number].replace("_", " ")
        assert str(sample["image_id"]).startswith(f"{manifest.classes[number]}/")
        assert sample["real"] is not None


def test_classes_and_captions_do_not_mix(
    classes: Path, config: EvaluateConfig, tmp_path: Path
) -> None:
    shards = str(classes / "shards")
    run = save_class_run(tmp_path / "classes", read_manifest(shards), ("cat", "dog"))
    for changes, named in (
        ({"shards": shards}, "holds 75 classes, such as .*, but the weights .* on captions"),
        ({"shards": shards, "weights": run}, "weights were trained on 2 classes, such as cat"),
        ({"weights": run}, "holds captions, but the weights were trained on 2 classes"),
    ):
        with pytest.raises(UserError, match=named):
            evaluate(dataclasses.replace(config, images=None, **changes))
