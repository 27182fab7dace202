"""The verb `demo`: every stage of the real path, small enough for two slow cores."""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import torch

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit.demo_config import DemoConfig
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.evaluation.estimates import Estimate
from ifvit.evaluation.evaluate import evaluate
from ifvit.evaluation.rows import MetricsRow
from ifvit.models.config import PRESETS
from ifvit.sampling.config import SamplingConfig
from ifvit.scenes.image_sets import render_scene_set
from ifvit.storage import join, write_json
from ifvit.studies.config import ReportConfig
from ifvit.studies.report import report
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig
from ifvit.training.train import train

NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 6000, 256, 256
NUM_WORKERS = 2
STEPS_PER_MINUTE = 520
"""Optimizer steps of each model per minute of `--minutes`; fixed, so that a demo repeats."""
GUIDANCE = 1.5
PROMPTS = (
    "one red circle",
    "three blue squares",
    "two green triangles above a yellow circle",
    "four yellow circles",
    "one purple square left of two red triangles",
    "five green circles",
    "a blue triangle below two red squares",
    "three purple circles right of a green square",
)
SUMMARY_KEYS = (
    "retrieval_at_16",
    "clip_score",
    "frechet_distance",
    "count_accuracy",
    "colour_accuracy",
    "kind_accuracy",
    "relation_accuracy",
)


def demo(config: DemoConfig) -> None:
    """Leave `report.html` and `summary.json` in the folder; finished stages are not repeated."""
    started = time.perf_counter()
    images, shards = join(config.folder, "images"), join(config.folder, "shards")
    settings = {
        "early": replace(
            PRESETS["tiny"], conditioning="concat", num_image_blocks=0, num_text_blocks=0
        ),
        "intermediate": PRESETS["tiny"],
    }
    runs = [join(config.folder, name) for name in settings]
    _announce("1/4", "draw scenes in COCO's layout")
    for split, count in (("train2014", NUM_TRAIN), ("val2014", NUM_HELD_OUT)):
        render_scene_set(images, split, count)
    with _worker_processes() as pool:
        _announce("2/4", "encode them into shards of VAE moments and CLIP contexts")
        encodings = [
            replace(_encoding(images, shards, "train2014"), num_tasks=NUM_WORKERS, task=task)
            for task in range(NUM_WORKERS)
        ]
        list(pool.map(encode, [*encodings, _encoding(images, shards, "val2014")]))
        _announce("3/4", "train both fusions side by side, draw held-out captions, measure")
        recipes = [
            replace(_recipe(run, join(shards, "train2014"), config), backbone=backbone)
            for run, backbone in zip(runs, settings.values(), strict=True)
        ]
        evaluations = [
            _evaluation(run, join(shards, "val2014"), join(images, "val2014")) for run in runs
        ]
        measured = list(pool.map(_train_and_measure, recipes, evaluations))
    _announce("4/4", "report")
    page = join(config.folder, "report.html")
    report(ReportConfig(runs=runs, output=page, title="ifvit demo: early against intermediate"))
    summary = dict(zip(settings, measured, strict=True))
    write_json(join(config.folder, "summary.json"), summary)
    _finish(config.folder, summary, time.perf_counter() - started)


def _worker_processes() -> ProcessPoolExecutor:
    """Two processes with half of the cores each.

    Steps of so small a model last milliseconds; two threads spend much of that waiting for each
    other, two processes nothing.
    """
    threads = max(1, (os.cpu_count() or 1) // NUM_WORKERS)
    return ProcessPoolExecutor(
        NUM_WORKERS, get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    )


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A demo that is killed would leave its workers training, and they would hold the runs."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_and_measure(recipe: TrainConfig, evaluation: EvaluateConfig) -> dict[str, float | None]:
    """One model's row of the summary."""
    seconds = train(recipe).seconds
    (row,) = evaluate(evaluation)
    return _summarise(row, seconds)


def _encoding(images: str, shards: str, split: str) -> EncodeConfig:
    return EncodeConfig(
        images=join(images, split),
        captions=join(images, "annotations", f"captions_{split}.json"),
        output=join(shards, split),
        vae="scenes/vae",
        text_encoder="scenes/clip",
        image_size=64,
        samples_per_shard=1000,
        batch_size=50,
    )


def _recipe(run: str, shards: str, config: DemoConfig) -> TrainConfig:
    """One recipe for both backbones."""
    max_steps = max(1, round(config.minutes * STEPS_PER_MINUTE))
    return TrainConfig(
        run=run,
        shards=shards,
        backbone=PRESETS["tiny"],
        optim=OptimConfig(
            learning_rate=4e-3,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            warmup_steps=200,
            cooldown_steps=max_steps * 2 // 3,
            max_grad_norm=1.0,
        ),
        engine=EngineConfig(backend="plain"),  # one process for each run, nothing to partition
        sample_grid=SampleGridConfig(
            every=max(1, max_steps // 4), prompts=PROMPTS, num_steps=15, guidance_scale=GUIDANCE
        ),
        max_steps=max_steps,
        global_batch_size=32,
        micro_batch_size=32,
        min_snr_gamma=1.0,
        ema_decays=(0.99,),
        log_every=10,
        checkpoint_every=200,
        keep_checkpoints=1,
        seed=1234,
    )


def _evaluation(run: str, shards: str, images: str) -> EvaluateConfig:
    return EvaluateConfig(
        weights=run,
        shards=shards,
        images=images,
        protocol=ProtocolConfig(
            name="scenes",
            num_samples=NUM_SAMPLES,
            sampling=SamplingConfig(num_steps=20, guidance_scale=GUIDANCE),
            clip="scenes/clip",
            paper_prefix="",
            scenes=True,
        ),
    )


def _summarise(row: MetricsRow, train_seconds: float) -> dict[str, float | None]:
    estimates: dict[str, Estimate | None] = {key: getattr(row, key) for key in SUMMARY_KEYS}
    values = {key: value.value if value else None for key, value in estimates.items()}
    return {**values, "train_seconds": train_seconds}


def _announce(number: str, what: str) -> None:
    sys.stdout.write(f"\n[{number}] {what}\n")
    sys.stdout.flush()


def _finish(folder: str, summary: dict[str, dict[str, float | None]], seconds: float) -> None:
    sys.stdout.write(f"\nDone in {seconds / 60:.1f} minutes: {Path(folder, 'report.html')}\n")
    for name, row in summary.items():
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if v is not None)
        sys.stdout.write(f"{name:>12}  {numbers}\n")
