"""Kill encode jobs at random moments; the dataset must equal that of an undisturbed job.

    python tools/kill_encode.py --kills 100 --output /tmp/kills
    python tools/kill_encode.py --kills 100 --output s3://bucket/kills

Every start is a process that encodes one of up to three partitions and receives SIGKILL at a random
moment. Each complete dataset is compared file by file with the one of an undisturbed local job, and
deleted. The exit code is 1 when a file differs. The output is deleted first.
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from data_pipeline.config import EncodeConfig
from data_pipeline.encode import encode
from ifvit import storage
from ifvit.scenes.image_sets import render_scene_set

UNFINISHED = 3
"""Exit code of a start after which shards of other tasks are missing."""
KILLED = -9


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", required=True, help="folder or s3:// prefix; deleted first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked children have no OpenMP threads
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # temporary files of killed processes are deleted with it
        render_scene_set(folder, "train2014", 24)
        config = EncodeConfig(
            images=f"{folder}/train2014",
            captions=f"{folder}/annotations/captions_train2014.json",
            output=f"{folder}/undisturbed",
            vae="scenes/vae",
            text_encoder="scenes/clip",
            image_size=64,
            samples_per_shard=2,
            batch_size=2,
            flip=True,
        )
        assert wait_for(run, config) == 0
        kill(config, options.output, options.kills, random.Random(options.seed))


def kill(undisturbed: EncodeConfig, output: str, num_kills: int, chance: random.Random) -> None:
    """Kill `num_kills` starts and print a summary. Raises SystemExit when a dataset differs."""
    wait_for(storage.remove, output)
    began = time.monotonic()
    kills = completed = starts = 0
    life = 1.0  # estimate of the seconds that an undisturbed start takes
    code = KILLED
    while kills < num_kills or code != 0:
        num_tasks = chance.randint(1, 3)
        config = replace(
            undisturbed, output=output, num_tasks=num_tasks, task=chance.randrange(num_tasks)
        )
        started = time.monotonic()
        code = wait_for(run, config, delay=chance.uniform(0, life) if kills < num_kills else None)
        starts += 1
        kills += code == KILLED
        life += 0.2 * (time.monotonic() - started) if code == KILLED else -0.3 * life
        if code == 0:
            completed += 1
            if wait_for(compare, undisturbed.output, output) or wait_for(storage.remove, output):
                sys.exit(1)
        elif code not in (UNFINISHED, KILLED):
            sys.exit(f"a start ended with exit code {code}")
    print(
        f"{output}: {starts} starts, {kills} killed, {completed} datasets completed, all equal to "
        f"the undisturbed one; {time.monotonic() - began:.0f} s"
    )


def wait_for(action: Callable[..., object], *args: object, delay: float | None = None) -> int:
    """Exit code of a forked process that runs `action`; it is killed after `delay` seconds."""
    process = multiprocessing.get_context("fork").Process(target=action, args=args)
    process.start()
    process.join(delay)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run(config: EncodeConfig) -> None:
    """Run the encode job without its output."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if encode(config) is None:
        sys.exit(UNFINISHED)


def compare(expected: str, found: str) -> None:
    """Exit with a message when files of two datasets differ, unfinished ones included."""
    hashes = [
        {
            (name, hashlib.sha256(storage.read_bytes(f"{url}/{name}")).hexdigest())
            for name in storage.walk_files(url)
        }
        for url in (expected, found)
    ]
    if differing := sorted({name for name, _ in hashes[0] ^ hashes[1]}):
        sys.exit(f"{found}: differs in {', '.join(differing)}")


if __name__ == "__main__":
    main()
