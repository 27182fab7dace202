"""Generated images, a study of them and an exported pipeline, and how the program reads them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from made_autoencoders import save_autoencoder
from made_backbone import SMALL_CLASSES
from mutations import Format

from ifvit.images import encode_png
from ifvit.models.autoencoders import load_autoencoder
from ifvit.rating.answers import Answer, Store
from ifvit.rating.config import CreateConfig
from ifvit.rating.create import create
from ifvit.rating.results import read_results
from ifvit.rating.study import read_study
from ifvit.sampling.config import SamplingConfig
from ifvit.sampling.pipeline import FusionPipeline
from ifvit.sampling.samples import SampleRow, claim_folder, write_samples
from ifvit.storage import read_bytes, read_sealed, write_sealed
from ifvit.studies.config import RECORD
from ifvit.studies.stages import RunRecord
from ifvit.studies.step_time import StepTimes


def _write_samples(folder: Path, colour: int) -> None:
    folder.mkdir(parents=True)
    settings = SamplingConfig(num_steps=2, seed=3).settings
    claim_folder(str(folder), settings)
    rows = []
    for position in range(2):
        pixels = np.full((8, 8, 3), colour + position, np.uint8)
        (folder / f"{position:05d}.png").write_bytes(encode_png(pixels))
        name = f"{position:05d}.png"
        rows.append(SampleRow(file=name, prompt=f"prompt {position}", position=position))
    write_samples(str(folder), rows)


def make_study(folder: Path) -> list[Format]:
    for number, name in enumerate(("early", "late")):
        _write_samples(folder / name, 100 * number)
    create_study(folder)
    study = read_study(str(folder / "study"))
    store = Store(study.folder)
    for rater in store.raters():
        for task in study.tasks(rater.id)[:2]:
            store.add(
                Answer(rater=rater.id, item=task.item.number, repetition=task.repetition,
                       shown=task.shown, value=task.shown, skip_reason=None)
            )  # fmt: skip
    store.close()
    of_study = (results_of_study,)
    return [
        Format(name="study.json", folder=folder, file="study/study.json", readers=of_study,
               sealed=True),
        Format(name="study database", folder=folder, file="study/study.sqlite", readers=of_study,
               sealed=True),
    ]  # fmt: skip


def create_study(box: Path) -> None:
    folders = {name: str(box / name) for name in ("early", "late")}
    create(CreateConfig(study=str(box / "study"), preference=folders, raters=2))


def results_of_study(box: Path) -> object:
    study = read_study(str(box / "study"))
    images = {name: read_bytes(str(box / "study" / "images" / name)) for name in study.image_files}
    return replace(study, folder=Path()), images, read_results(str(box / "study"))


def make_generated(folder: Path) -> list[Format]:
    for number, name in enumerate(("early", "late")):
        _write_samples(folder / name, 100 * number)
    return [
        Format(name="generated samples.jsonl", folder=folder, file="early/samples.jsonl",
               readers=(new_study,), sealed=True),
        Format(name="generated settings.json", folder=folder, file="early/settings.json",
               readers=(new_study, claim_again), sealed=True),
        Format(name="generated image", folder=folder, file="early/00000.png",
               readers=(new_study,), sealed=False),
    ]  # fmt: skip


def new_study(box: Path) -> object:
    create_study(box)
    study = read_study(str(box / "study"))
    return replace(study, folder=Path())


def claim_again(box: Path) -> object:
    return claim_folder(str(box / "early"), SamplingConfig(num_steps=2, seed=3).settings)


def make_pipeline(folder: Path) -> list[Format]:
    from diffusers import AutoencoderKL

    from ifvit.diffusion.schedules import NoiseSchedule
    from ifvit.diffusion.solvers import build_scheduler
    from ifvit.models.weights import build_backbone

    torch.manual_seed(0)
    shape = replace(SMALL_CLASSES, latent_size=4, width=8, num_heads=1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipeline = FusionPipeline(
        backbone=build_backbone(shape), vae=vae, text_encoder=None, tokenizer=None,
        scheduler=build_scheduler("dpm_solver_pp", NoiseSchedule()), classes=("cat", "dog"),
        scaling_factor=[0.5] * 4, shift_factor=[0.1] * 4,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    files = ("model_index.json", "backbone/config.json", "scheduler/scheduler_config.json")
    files += ("vae/config.json", "backbone/diffusion_pytorch_model.safetensors")
    return [
        Format(name=f"pipeline {file}", folder=folder, file=file, readers=(open_pipeline,),
               sealed=False)
        for file in files
    ]  # fmt: skip


def open_pipeline(box: Path) -> object:
    pipeline = FusionPipeline.from_pretrained(str(box))
    return pipeline.backbone.state_dict(), pipeline.vae.state_dict(), dict(pipeline.config)


def make_dc(folder: Path) -> list[Format]:
    save_autoencoder("dc", folder)
    return [
        Format(name="AutoencoderDC config", folder=folder, file="config.json", readers=(open_vae,),
               sealed=False)
    ]  # fmt: skip


def open_vae(box: Path) -> object:
    vae = load_autoencoder(str(box)).vae
    return vae.state_dict(), dict(vae.config)


def make_study_runs(folder: Path) -> list[Format]:
    write_sealed(f"{folder}/base/seed1/{RECORD}", RunRecord(stages_sha256="a" * 64))
    write_sealed(f"{folder}/plan.json", StepTimes(step_seconds={"b" * 64: 0.5, "c" * 64: 2.0}))
    return [
        Format(name="end of a study's run", folder=folder, file=f"base/seed1/{RECORD}",
               readers=(look_for_end,), sealed=True),
        Format(name="step times", folder=folder, file="plan.json", readers=(list_times,),
               sealed=True),
    ]  # fmt: skip


def look_for_end(box: Path) -> object:
    return read_sealed(RunRecord, f"{box}/base/seed1/{RECORD}")


def list_times(box: Path) -> object:
    return read_sealed(StepTimes, f"{box}/plan.json")


STUDIES = (make_study, make_generated, make_pipeline, make_dc, make_study_runs)
