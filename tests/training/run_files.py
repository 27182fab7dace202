"""A small dataset and recipe, what its run left, and how several processes are started."""

import multiprocessing
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.other import get_free_port
from made_backbone import small_shape
from made_shards import make_samples, write_shards

from ifvit.diffusion.config import ObjectiveConfig
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import FOLDER, MetricsRow, Protocol, read_training_rows, row_url
from ifvit.sampling.config import SamplingConfig
from ifvit.storage import write_sealed
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

CONTEXT_SHAPE = (5, 12)
FORKS = multiprocessing.get_context("forkserver")
"""Processes forked from one that has imported what takes longer than these runs take to train."""
FORKS.set_forkserver_preload(["ifvit.training.train", "ifvit.training.zero"])


FLOW = ObjectiveConfig(prediction="flow", timesteps="logit_normal")
FLOW_AND_MUON = {
    "objective": FLOW,
    "optim": OptimConfig(optimizer="muon", learning_rate=1e-3, warmup_steps=4, max_grad_norm=0.5),
}
"""Fields of a recipe with the objective and the optimizer that are not the defaults."""


def write_dataset(folder: Path, seed: int = 0) -> str:
    """21 samples in two shards: moments (8, 8, 8), one to three captions each."""
    write_shards(folder, make_samples(21, context_shape=CONTEXT_SHAPE, seed=seed), (12, 9))
    return str(folder)


def small_recipe(run: str, shards: str, **fields: object) -> TrainConfig:
    """8 quick steps for latents (4, 8, 8) and contexts (5, 12); `fields` override the rest."""
    defaults: dict[str, object] = {
        "backbone": small_shape(
            context_length=CONTEXT_SHAPE[0], context_width=CONTEXT_SHAPE[1], init_std=0.02
        ),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=4),
        "engine": EngineConfig(backend="plain"),
        "sample_grid": SampleGridConfig(every=0),
        "max_steps": 8,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "ema_decays": (0.9,),
        "log_every": 1,
        "checkpoint_every": 100,
        "keep_exports": 100,
        "num_workers": 1,
        "trackers": (),
    }
    return TrainConfig(run=run, shards=shards, **{**defaults, **fields})  # type: ignore[arg-type]


def write_evaluation(run: str, step: int, metric: str, value: float | None) -> None:
    """An evaluation of a step's weights that has measured `metric` besides the CLIP Score."""
    protocol = Protocol(
        name="scenes",
        num_samples=9,
        prompts_sha256="a" * 64,
        caption_rule="first",
        score_caption="same",
        sampling=SamplingConfig(guidance_scale=1.5).settings,
        image_size=64,
        resize="center_crop+lanczos",
        features="scenes/clip",
        features_sha256="b" * 64,
        paper_prefix="",
        inception=None,
        inception_sha256=None,
        num_reference_images=None,
        reference_sha256=None,
    )
    low = Estimate(value=0.1, standard_error=0.1, num_samples=9, low=0.0, high=9.9)
    row = MetricsRow(
        weights="ema",
        weights_sha256="c" * 64,
        step=step,
        ema_decay=None,
        protocol=protocol,
        frechet_distance=None,
        clip_score=low,
        clip_score_paper=low,
        retrieval_at_16=None,
    )
    measured = {} if value is None else {metric: replace(low, value=value)}
    write_sealed(row_url(f"{run}/{FOLDER}", "scenes", 1.5, step), replace(row, **measured))


def rows(config: TrainConfig) -> dict[int, dict[str, Any]]:
    """metrics.jsonl by step; no step may occur twice."""
    table = read_training_rows(config.run)
    by_step = {row.step: asdict(row) for row in table}
    assert len(by_step) == len(table)
    return by_step


def losses(config: TrainConfig, first_step: int = 1) -> list[float]:
    """The loss of every step from `first_step` on; no step may be missing."""
    table = rows(config)
    assert list(table) == list(range(first_step, first_step + len(table)))
    return [row["loss"] for row in table.values()]


def start(
    target: Callable[..., None], arguments: Sequence[object], num_processes: int
) -> list[BaseProcess]:
    """`target(*ARGUMENTS)` once for each rank, in the environment that a launcher would give it."""
    world = {
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    processes = []
    for rank in range(num_processes):
        own = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(FORKS.Process(target=_run_rank, args=(own, target, arguments)))
        processes[-1].start()
    return processes


def _run_rank(
    environment: dict[str, str], target: Callable[..., None], arguments: Sequence[object]
) -> None:
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    target(*arguments)


def finish(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Exit codes of all; when one fails the others are ended, which would wait for it for ever."""
    for process in processes:
        process.join(timeout=900)
        if process.exitcode:
            break
    for process in processes:
        process.terminate()
        process.join()
    return [process.exitcode for process in processes]
