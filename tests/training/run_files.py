"""A small dataset and recipe, what its run left, and how several processes are started."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from made_backbone import small_shape
from made_shards import make_samples, write_shards

from ifvit.evaluation.metrics import Estimate, MetricsRow, Protocol, write_row
from ifvit.evaluation.rows import FOLDER, row_url
from ifvit.sampling.config import SamplingConfig
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

CONTEXT_SHAPE = (5, 12)


def write_dataset(folder: Path, seed: int = 0) -> str:
    """21 samples in two shards: moments (8, 8, 8), one to three captions each."""
    write_shards(folder, make_samples(21, context_shape=CONTEXT_SHAPE, seed=seed), (12, 9))
    return str(folder)


def small_recipe(run: str, shards: str, **fields: object) -> TrainConfig:
    """8 quick steps for latents (4, 8, 8) and contexts (5, 12); `fields` override the rest."""
    defaults: dict[str, object] = {
        "backbone": small_shape(context_length=CONTEXT_SHAPE[0], context_width=CONTEXT_SHAPE[1]),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=4),
        "engine": EngineConfig(backend="plain"),
        "sample_grid": SampleGridConfig(every=0),
        "max_steps": 8,
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "ema_decays": (0.9,),
        "log_every": 1,
        "checkpoint_every": 100,
        "num_workers": 1,
    }
    return TrainConfig(run=run, shards=shards, **{**defaults, **fields})  # type: ignore[arg-type]


def write_evaluation(run: str, step: int, metric: str, value: float | None) -> None:
    """An evaluation of a step's weights that has measured `metric` only; None: not even that."""
    found = value and Estimate(value=value, standard_error=0.1, num_samples=9, low=0.0, high=9.9)
    unknown = dict.fromkeys(Protocol.__dataclass_fields__)
    protocol = Protocol(**{**unknown, "sampling": SamplingConfig().settings})  # type: ignore[arg-type]
    unmeasured = dict.fromkeys(MetricsRow.__dataclass_fields__)
    row = {**unmeasured, "step": step, metric: found, "protocol": protocol}
    write_row(row_url(f"{run}/{FOLDER}", "scenes", 1.5, step), MetricsRow(**row))  # type: ignore[arg-type]


def rows(config: TrainConfig) -> dict[int, dict[str, float]]:
    """metrics.jsonl by step; a step must stand there once."""
    lines = Path(config.run, "metrics.jsonl").read_text().splitlines()
    table = [json.loads(line) for line in lines]
    by_step = {row["step"]: row for row in table}
    assert len(by_step) == len(table)
    return by_step


def losses(config: TrainConfig) -> list[float]:
    """The loss of every step, from 1 on without a gap."""
    table = rows(config)
    assert list(table) == list(range(1, len(table) + 1))
    return [row["loss"] for row in table.values()]


def start(arguments: Sequence[str], num_processes: int) -> list[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` once for each rank, in the environment that a launcher would give it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            env={**os.environ, **ours, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(num_processes)
    ]


def finish(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes of all; when one fails the others are ended, which would wait for it for ever."""
    try:
        for process in processes:
            if process.wait(timeout=900):
                break
    finally:
        for process in processes:
            process.terminate()
    return [process.wait() for process in processes]
