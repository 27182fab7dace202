"""The verb `demo`: all stages from images to the report, small enough for two slow cores.

Modules that import torch are imported inside functions, because `ifvit demo --help` reads
`DemoConfig` from here.
"""

import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

from data_pipeline.config import EncodeConfig
from ifvit.diffusion.config import ObjectiveConfig
from ifvit.evaluation.config import EvaluateConfig, ProtocolConfig
from ifvit.models.config import BackboneConfig
from ifvit.models.presets import PRESETS, with_setting
from ifvit.records import PositiveFloat, record
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import join, write_json
from ifvit.studies.config import ReportConfig
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 6000, 256, 256
NUM_WORKERS = 2
STEPS_PER_MINUTE = 520
"""Optimizer steps of each model per minute of `--minutes`; fixed, so that the demo repeats."""
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

Summary = dict[str, float | None]


@record
class DemoConfig:
    """Render scenes, encode, train early and intermediate fusion, generate, evaluate, report."""

    folder: str = "runs/demo"
    """Output folder; run the demo again to continue there."""
    minutes: PositiveFloat = 4.5
    """Training time of both models together on a machine with two slow cores, in minutes."""


def demo(config: DemoConfig) -> None:
    """Write `report.html` and `summary.json` to the folder; finished stages are not repeated."""
    from data_pipeline.encode import encode
    from ifvit.scenes.image_sets import render_scene_set
    from ifvit.studies.report import report

    started = time.perf_counter()
    images, shards = join(config.folder, "images"), join(config.folder, "shards")
    backbones: dict[str, BackboneConfig] = {
        "early": with_setting(PRESETS["tiny"], "concat_early"),
        "intermediate": PRESETS["tiny"],
    }
    runs = [join(config.folder, name) for name in backbones]
    _announce("1/4", "render scenes in COCO's layout")
    for split, count in (("train2014", NUM_TRAIN), ("val2014", NUM_HELD_OUT)):
        render_scene_set(images, split, count)
    with _worker_processes() as pool:
        _announce("2/4", "encode them into shards of VAE moments and CLIP contexts")
        encodings = [
            replace(_encoding(images, shards, "train2014"), num_tasks=NUM_WORKERS, task=task)
            for task in range(NUM_WORKERS)
        ]
        list(pool.map(encode, [*encodings, _encoding(images, shards, "val2014")]))
        _announce("3/4", "train both fusions, generate from held-out captions, evaluate")
        recipes = [
            _recipe(run, join(shards, "train2014"), backbone, config.minutes)
            for run, backbone in zip(runs, backbones.values(), strict=True)
        ]
        evaluations = [
            _evaluation(run, join(shards, "val2014"), join(images, "val2014")) for run in runs
        ]
        rows = list(pool.map(_train_and_evaluate, recipes, evaluations))
    _announce("4/4", "report")
    page = join(config.folder, "report.html")
    report(ReportConfig(runs=runs, output=page))
    summary = dict(zip(backbones, rows, strict=True))
    write_json(join(config.folder, "summary.json"), summary)
    _finish(config.folder, summary, time.perf_counter() - started)


def _worker_processes() -> ProcessPoolExecutor:
    """Open a pool of two processes with half of the cores each.

    Steps of so small a model last milliseconds. Two threads would spend much of that waiting for
    each other; two processes do not wait.
    """
    threads = max(1, (os.cpu_count() or 1) // NUM_WORKERS)
    return ProcessPoolExecutor(
        NUM_WORKERS, get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    )


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit when the parent dies; the workers of a killed demo would go on training otherwise."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train_and_evaluate(recipe: TrainConfig, evaluation: EvaluateConfig) -> Summary:
    """Return one model's row of the summary."""
    from ifvit.evaluation.evaluate import evaluate
    from ifvit.training.train import train

    seconds = train(recipe).seconds
    (row,) = evaluate(evaluation)
    estimates = {key: getattr(row, key) for key in SUMMARY_KEYS}
    values = {key: estimate.value if estimate else None for key, estimate in estimates.items()}
    return {**values, "train_seconds": seconds}


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


def _recipe(run: str, shards: str, backbone: BackboneConfig, minutes: float) -> TrainConfig:
    """The same recipe for both backbones."""
    max_steps = max(1, round(minutes * STEPS_PER_MINUTE))
    return TrainConfig(
        run=run,
        shards=shards,
        backbone=backbone,
        optim=OptimConfig(
            learning_rate=4e-3,
            weight_decay=0.01,
            betas=(0.9, 0.999),
            warmup_steps=200,
            cooldown_steps=max_steps * 2 // 3,
            max_grad_norm=1.0,
        ),
        engine=EngineConfig(backend="plain"),  # one process for each run
        sample_grid=SampleGridConfig(
            every=max(1, max_steps // 4), prompts=PROMPTS, num_steps=15, guidance_scale=GUIDANCE
        ),
        max_steps=max_steps,
        global_batch_size=32,
        micro_batch_size=32,
        objective=ObjectiveConfig(min_snr_gamma=1.0),
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


def _announce(number: str, what: str) -> None:
    print(f"\n[{number}] {what}", flush=True)


def _finish(folder: str, summary: dict[str, Summary], seconds: float) -> None:
    print(f"\nDone in {seconds / 60:.1f} minutes: {Path(folder, 'report.html')}")
    for name, row in summary.items():
        numbers = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if v is not None)
        print(f"{name:>12}  {numbers}")
