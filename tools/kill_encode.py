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

NUM_IMAGES = 24
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
    """Kill `num_kills` starts and print a summary. Raises SystemExit when a dataset differs."""
    undisturbed = replace(config, output=f"{tempfile.tempdir}/undisturbed")
    assert wait_for(run, undisturbed) == 0
    assert wait_for(storage.remove, config.output) == 0
    began = time.monotonic()
    kills = completed = starts = 0
    life = 1.0  # estimate of the seconds that an undisturbed start takes
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
        f"all equal to the undisturbed one; {time.monotonic() - began:.0f} s"
    )


def expect_equal(expected: EncodeConfig, found: EncodeConfig) -> None:
    """Raise SystemExit if two outputs differ."""
    if wait_for(compare, expected.output, found.output) != 0:
        sys.exit(1)


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
    """Print every file that differs, and exit with 1 if there is one."""
    first, second = hash_files(expected), hash_files(found)
    differing = sorted(
        name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
    )
    for name in differing:
        is_in_both = name in first and name in second
        print(f"{found}/{name}: {'differs' if is_in_both else 'is in one output only'}")
    sys.exit(1 if differing else 0)


def hash_files(url: str) -> dict[str, str]:
    """Hash of every file of a dataset, unfinished files included."""
    names = [name for name in storage.list_names(url) if name != "completed"]
    names += [f"completed/{name}" for name in storage.list_names(f"{url}/completed")]
    return {name: hashlib.sha256(storage.read_bytes(f"{url}/{name}")).hexdigest() for name in names}


if __name__ == "__main__":
    main()
