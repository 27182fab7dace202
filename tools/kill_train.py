"""Kill a training run at random moments and compare it with an undisturbed run.

    python tools/kill_train.py s3://bucket/kill --kills 50
    python tools/kill_train.py /tmp/kill --kills 5 --worlds 1 2 --steps 60

All ranks receive SIGKILL at once, while they start, step, save or upload; the next start has
another number of processes. After each kill the newest complete checkpoint is read in full, and its
step must not decrease. At the end all logged losses and all final tensors are compared. Prints one
JSON object; the exit code is 1 when a difference exceeds the tolerance.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import re
import socket
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

from ifvit.evaluation.rows import read_training_rows
from ifvit.models.config import FusionTransformerConfig
from ifvit.shards.reader import ShardReader
from ifvit.storage import join
from ifvit.training.checkpoint import fetch_newest, open_tensors
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig

FORKS = multiprocessing.get_context("forkserver")
TOLERANCE = 1e-4
"""Largest relative difference of losses; the number of processes changes the order of sums."""


def main() -> None:
    """Run both trainings and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="local folder or s3:// URL for the disturbed run")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--window", type=float, default=6.0, help="longest wait in seconds")
    parser.add_argument("--shards", help="dataset; default: 64 encoded scenes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    FORKS.set_forkserver_preload(["ifvit.training.train"])
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill-train-") as local:
        shards = arguments.shards or encode_scenes(local)
        calm = recipe(join(local, "calm"), shards, arguments.steps, arguments.every)
        finish(start(calm, 1, Path(local)))
        killed = replace(calm, run=join(arguments.folder, "hunted"))
        worlds = kill(killed, arguments, random.Random(arguments.seed), Path(local))
        report = {"kills": len(worlds), "worlds": worlds}
        report |= compare(calm.run, killed.run, Path(local))
    report["minutes"] = (time.monotonic() - started) / 60
    print(json.dumps(report, indent=2))
    sys.exit(report["max_loss_difference"] > TOLERANCE or report["max_tensor_difference"] > 0.01)


def encode_scenes(folder: str) -> str:
    """Render 64 scenes and encode them => folder of the shards."""
    from data_pipeline.config import EncodeConfig
    from data_pipeline.encode import encode
    from ifvit.scenes.image_sets import render_scene_set

    render_scene_set(folder, "train2014", 64)
    captions = join(folder, "annotations", "captions_train2014.json")
    shards, images = join(folder, "shards"), join(folder, "train2014")
    names = {"vae": "scenes/vae", "text_encoder": "scenes/clip", "image_size": 64}
    encode(EncodeConfig(images=images, captions=captions, output=shards, **names))
    return shards


def recipe(run: str, shards: str, steps: int, every: int) -> TrainConfig:
    """Recipe of a tiny model for these shards."""
    reader = ShardReader(shards)
    channels, side, _ = reader.manifest.latent_shape
    length, width = reader.text.context_shape
    shape = FusionTransformerConfig(
        latent_channels=channels,
        latent_size=side,
        patch_size=2,
        width=32,
        num_heads=2,
        context_length=length,
        context_width=width,
        fusion="image 3*cross_attention image",
        num_text_blocks=1,
    )
    return TrainConfig(
        run=run,
        shards=shards,
        backbone=shape,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=10),
        engine=EngineConfig(backend="plain"),
        sample_grid=SampleGridConfig(every=0),
        max_steps=steps,
        global_batch_size=8,
        micro_batch_size=2,
        ema_decays=(0.9,),
        log_every=1,
        checkpoint_every=every,
    )


def start(config: TrainConfig, num_ranks: int, folder: Path) -> list[BaseProcess]:
    """Start one process for each rank, forked from a server that has imported the code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(num_ranks):
        own = {} if num_ranks == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank), **world}
        log = folder / f"rank{rank}.log"
        log.write_text("")
        processes.append(FORKS.Process(target=run_rank, args=(config, own, str(log))))
        processes[-1].start()
    return processes


def run_rank(config: TrainConfig, environment: dict[str, str], log: str) -> None:
    """Train as one rank and write standard error to the file `log`."""
    from ifvit.training.train import train

    os.environ.update(environment)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 2)
        train(config)


def finish(processes: list[BaseProcess]) -> None:
    """Wait for all ranks. Raises SystemExit when one fails."""
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"training ended with {[process.exitcode for process in processes]}")


def kill(
    config: TrainConfig, arguments: argparse.Namespace, chance: random.Random, folder: Path
) -> list[int]:
    """Start and kill the run, then let it finish => number of processes of each killed start."""
    newest, worlds = 0, []
    while len(worlds) < arguments.kills and newest < config.max_steps:
        worlds.append(chance.choice([n for n in arguments.worlds if n not in worlds[-1:]] or [1]))
        processes = start(config, worlds[-1], folder)
        log, is_early = folder / "rank0.log", chance.random() < 0.1
        wait_for_steps(log, processes[0], 4.0 * chance.random() if is_early else math.inf)
        time.sleep(chance.uniform(0.0, arguments.window))
        ended = [process.exitcode for process in processes]
        for process in chance.sample(processes, len(processes)):
            process.kill()
        for process in processes:
            process.join()
        if any(ended):
            raise SystemExit(f"a rank ended by itself: {log.read_text()[-2000:]}")
        step = newest_step(config.run, folder)
        if step < newest:
            raise SystemExit(f"step {newest} was complete and is lost; the newest is {step}")
        newest = step
        print(f"kill {len(worlds)}: {worlds[-1]} ranks, saved step {step}")
    finish(start(config, 1, folder))
    return worlds


def wait_for_steps(log: Path, process: BaseProcess, limit: float) -> None:
    """Return when the log shows progress, when the process has ended, or after `limit` seconds."""
    end = time.monotonic() + limit
    while process.is_alive() and time.monotonic() < end:
        if re.search("step/s|s/step", log.read_text()):
            return
        time.sleep(0.05)


def newest_step(run: str, folder: Path) -> int:
    """Step of the newest checkpoint, after reading and verifying all of it."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        found = fetch_newest(run, Path(cache))
    return found.state.step if found else 0


def compare(calm: str, hunted: str, folder: Path) -> dict[str, object]:
    """Largest relative difference of losses, and of tensors relative to their largest value."""
    losses = []
    for run in (calm, hunted):
        rows = read_training_rows(run)
        losses.append({row.step: row.loss for row in rows if row.loss is not None})
        assert len(losses[-1]) == len(rows), f"{run}: a step was logged twice"
    assert losses[0].keys() == losses[1].keys(), "a logged step is missing"
    caches = [folder / Path(run).name for run in (calm, hunted)]
    one, other = fetch_newest(calm, caches[0]), fetch_newest(hunted, caches[1])
    assert one
    assert other
    assert one.state.step == other.state.step
    with open_tensors(one, caches[0]) as first, open_tensors(other, caches[1]) as second:
        tensors = {
            name: float((first(name) - second(name)).abs().max() / first(name).abs().max())
            for part in one.parts
            for name in part.tensors
            if first(name).abs().max() > 0
        }
    worst = max(tensors, key=tensors.__getitem__)
    return {
        "logged_losses": len(losses[0]),
        "max_loss_difference": max(abs(losses[1][s] - x) / abs(x) for s, x in losses[0].items()),
        "max_tensor_difference": tensors[worst],
        "worst_tensor": worst,
    }


if __name__ == "__main__":
    main()
