"""Kill encode jobs at random moments until N have died; the dataset must come out the same.

    python tools/kill_encode.py --kills 100 --output /tmp/kills
    python tools/kill_encode.py --kills 100 --output s3://bucket/kills

Every start is a process of its own that holds a random share of the work (all of it, or one of
two or three tasks) and meets SIGKILL at a random moment of its life. Whenever the dataset is
complete it is compared, file by file, with that of one undisturbed local run, and begun anew.
Exit code 1 when a file differs. The output is emptied first.
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

NUM_IMAGES = 24
UNFINISHED = 3
"""Exit code of a start that left work to other tasks."""
KILLED = -9


def main() -> None:
    """Kill, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--output", required=True, help="folder or s3:// prefix, emptied first")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no OpenMP threads, so it must want none
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # what killed processes leave there goes with it
        render_scene_set(folder, "train2014", NUM_IMAGES)
        config = EncodeConfig(
            images=f"{folder}/train2014",
            captions=f"{folder}/annotations/captions_train2014.json",
            output=options.output,
            vae="scenes/vae",
            text_encoder="scenes/clip",
            image_size=64,
            samples_per_shard=2,
            batch_size=2,
            flip=True,
        )
        kill(config, options.kills, random.Random(options.seed))


def kill(config: EncodeConfig, num_kills: int, chance: random.Random) -> None:
    """Print what happened. Raises SystemExit when a completed dataset differs."""
    undisturbed = replace(config, output=f"{tempfile.tempdir}/undisturbed")
    assert wait_for(run, undisturbed) == 0
    assert wait_for(storage.remove, config.output) == 0
    began = time.monotonic()
    kills = completed = starts = 0
    life = 1.0  # seconds that a start takes when it is left alone, learned on the way
    while kills < num_kills:
        num_tasks = chance.randint(1, 3)
        one = replace(config, num_tasks=num_tasks, task=chance.randrange(num_tasks))
        started = time.monotonic()
        code = wait_for(run, one, delay=chance.uniform(0, life))
        starts += 1
        kills += code == KILLED
        if code not in (0, UNFINISHED, KILLED):
            sys.exit(f"a start ended with exit code {code}")
        life += 0.2 * (time.monotonic() - started) if code == KILLED else -0.3 * life
        if code == 0:
            expect_equal(undisturbed, config)
            assert wait_for(storage.remove, config.output) == 0
            completed += 1
    assert wait_for(run, config) == 0
    expect_equal(undisturbed, config)
    print(
        f"{config.output}: {starts} starts, {kills} killed, {completed + 1} datasets completed, "
        f"each equal to the undisturbed one, file by file; {time.monotonic() - began:.0f} s"
    )


def expect_equal(expected: EncodeConfig, found: EncodeConfig) -> None:
    """Raise SystemExit if two outputs differ; compared in a process of its own, like all else."""
    if wait_for(compare, expected.output, found.output) != 0:
        sys.exit(1)


def wait_for(action: Callable[..., object], *args: object, delay: float | None = None) -> int:
    """Exit code of a forked process that runs `action`; -9 if it was still alive after `delay`."""
    process = multiprocessing.get_context("fork").Process(target=action, args=args)
    process.start()
    process.join(delay)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run(config: EncodeConfig) -> None:
    """The encode job, quietly; what it prints is the same a hundred times."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    if encode(config) is None:
        sys.exit(UNFINISHED)


def compare(expected: str, found: str) -> None:
    """Print every file that differs; exit code 1 if one does."""
    first, second = hash_files(expected), hash_files(found)
    differing = sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )
    for name in differing:
        print(f"{found}/{name}: {'differs' if name in first and name in second else 'odd'}")
    sys.exit(1 if differing else 0)


def hash_files(url: str) -> dict[str, str]:
    """Every file of a dataset, those that a kill left half done too, and its hash."""
    names = [name for name in storage.list_names(url) if name != "completed"]
    names += [f"completed/{name}" for name in storage.list_names(f"{url}/completed")]
    return {name: hashlib.sha256(storage.read_bytes(f"{url}/{name}")).hexdigest() for name in names}


if __name__ == "__main__":
    main()
