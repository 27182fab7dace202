"""Mistakes end a run before its first step; a signal ends it after a step, saved."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from made_backbone import SMALL_CLASSES
from run_files import losses, rows, small_recipe

from ifvit.diffusion.config import ObjectiveConfig
from ifvit.distributed import World
from ifvit.errors import EXIT_PREEMPTED, UserError
from ifvit.training import guards, saving
from ifvit.training.checkpoint import Checkpoint, commit
from ifvit.training.config import EngineConfig, OptimConfig, SampleGridConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import SIGNALS, Preempted, StopRequest, check_recipe, write_recipe
from ifvit.training.saving import SaveCheckpoint
from ifvit.training.train import train

ALONE = World(rank=0, size=1, local_rank=0)
Recipe = Callable[..., TrainConfig]
SMALL = small_recipe("run", "shards").backbone


@pytest.mark.parametrize(("max_steps", "is_short"), [(60, True), (100, False)])
def test_a_run_too_short_for_its_learning_rate_is_named(
    max_steps: int, is_short: bool, recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(learning_rate=4e-3, warmup_steps=20, cooldown_steps=80)
    check_recipe(recipe(max_steps=max_steps, optim=optim))
    expected = "are 100 together, but max_steps is 60; the learning rate never reaches 0.004"
    assert (expected in capsys.readouterr().err) == is_short


def test_another_recipe_in_the_same_run_directory_is_an_error(recipe: Recipe) -> None:
    config = recipe(max_steps=2)
    train(config)
    with pytest.raises(UserError, match="started with seed: 1234, the recipe now says 5"):
        train(replace(config, seed=5))
    other = replace(config.backbone, norm="rms_norm")
    with pytest.raises(UserError, match=r"backbone\.norm: .* or train in a new run: --run NEW$"):
        train(replace(config, backbone=other))
    muon = replace(config.optim, optimizer="muon")
    with pytest.raises(UserError, match=r"optim\.optimizer: .* or train in a new run: --run NEW$"):
        train(replace(config, optim=muon))
    objective = ObjectiveConfig(prediction="flow")
    with pytest.raises(
        UserError, match=r"prediction: epsilon, .* or train in a new run: --run NEW$"
    ):
        train(replace(config, objective=objective))
    slower = replace(config.optim, learning_rate=1e-5)
    remedy = r"continue in a new run: --run NEW --branch .*run@latest$"
    with pytest.raises(UserError, match=rf"optim\.learning_rate: .* now says 1e-05; .* {remedy}"):
        train(replace(config, optim=slower))
    train(replace(config, max_steps=3, micro_batch_size=4))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[1]",
        b"!!python/name:os.system",
        b"\xff",
        b"run: x",
        b"[" * 20_000,
        b"max_steps: .nan",
    ],
)
def test_a_broken_config_of_a_run_is_one_line(recipe: Recipe, content: bytes) -> None:
    config = recipe()
    path = Path(config.run, "config.yaml")
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        train(config)
    assert str(error.value).isprintable()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"config\.yaml: not a regular file"):
        train(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("scaling_factor", value) for value in (0.0, -1.0, math.nan, math.inf)),
        *(("max_steps", value) for value in (0, -1, 10**30)),
        *(("ema_decays", value) for value in ((), (1.0,), (math.nan,), (0.5, 0.5))),
        ("caption_dropout", 1.5),
        ("scaling_factor", 1e-320),
        ("global_batch_size", 10**12),
        ("micro_batch_size", 10**12),
        ("shards", ""),
        ("shards", "x\ny"),
        ("shuffle_window", 0),
        ("num_workers", 10**9),
        ("tolerate_nonfinite", -1),
        ("keep_every", -1),
        ("keep_exports", 0),
        ("export_every", 7),
    ],
)
def test_an_impossible_number_in_a_recipe_is_named(recipe: Recipe, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        recipe(**{key: value})


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (OptimConfig, "learning_rate", -1.0),
        (OptimConfig, "betas", (0.9, 1.0)),
        (OptimConfig, "max_grad_norm", 0.0),
        (OptimConfig, "weight_decay", math.inf),
        (OptimConfig, "warmup_steps", -1),
        (EngineConfig, "timeout_minutes", 1e9),
        (SampleGridConfig, "num_steps", 0),
        (SampleGridConfig, "every", -1),
    ],
)
def test_an_impossible_number_in_a_part_of_a_recipe_is_named(
    part: Any, key: str, value: Any
) -> None:
    with pytest.raises(UserError, match=key):
        part(**{key: value})


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        (
            "shards",
            {"backbone": replace(SMALL, latent_size=16)},
            "latents are 4x8x8, but the backbone takes 4x16x16",
        ),
        (
            "shards",
            {"backbone": replace(SMALL, context_width=768)},
            "contexts are 5x12, but the backbone takes 5x768",
        ),
        (
            "shards",
            {"backbone": SMALL_CLASSES},
            r"holds captions, not classes; set backbone\.context_length",
        ),
        ("shards", {"vae": "scenes/vae"}, "with vae made-up, but the recipe names scenes/vae"),
        ("labelled", {}, "holds class labels, not captions"),
        (
            "labelled",
            {"backbone": replace(SMALL_CLASSES, num_classes=3)},
            r"has 2 classes, but the backbone 3; set backbone\.num_classes",
        ),
    ],
)
def test_shards_that_do_not_fit_the_recipe_are_an_error(
    recipe: Recipe,
    request: pytest.FixtureRequest,
    dataset: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(shards=request.getfixturevalue(dataset), **fields))


def test_a_disk_too_full_for_the_next_checkpoint_is_an_error(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["free"])
    muon = OptimConfig(optimizer="muon")
    config = recipe(ema_decays=(0.9, 0.99), max_steps=1, optim=muon)
    train(config)
    files = list(Path(config.run).rglob("*.safetensors"))
    written = sum(path.stat().st_size for path in files)
    assert len(files) == 1 + 3
    free = iter([written, int(0.9 * written)])
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda path: usage(free=next(free)))
    write_recipe(config)
    with pytest.raises(UserError, match=r"0\.0 GB free, but the next checkpoint .* free some"):
        write_recipe(config)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_PREEMPTED),
        (signal.SIGUSR1, EXIT_PREEMPTED),
        (signal.SIGUSR2, EXIT_PREEMPTED),
        (signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_same_command_continues(
    recipe: Recipe,
    whole: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    broken = recipe("broken", max_steps=6, log_every=3)
    handler = signal.getsignal(number)
    real = Engine.step

    def step(engine: Engine) -> object:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 60
        while not received:  # another thread takes the signal, and this one must run to see it
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return real(engine)

    def request(stop: StopRequest, number: int) -> None:
        real_request(stop, number)
        received.append(number)

    received: list[int] = []
    real_request = StopRequest.request
    monkeypatch.setattr(StopRequest, "request", request)
    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(Preempted) as ending:
        train(broken)
    monkeypatch.undo()
    assert ending.value.code == code
    assert f"{number.name}: stopped after step 2;" in capsys.readouterr().err
    assert signal.getsignal(number) is handler
    assert Path(broken.run, "checkpoints", "step_00000002", "manifest.json").exists()
    train(broken)
    table = rows(broken)
    means = [sum(losses(whole)[step - 3 : step]) / 3 for step in table]
    assert [row["loss"] for row in table.values()] == means


def test_a_signal_during_the_last_save_does_not_end_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, calls, died = threading.Event(), count(1), []

    def wait(saves: SaveCheckpoint) -> None:
        if next(calls) == 2:  # the first call precedes the only save
            waiting.set()
        real_wait(saves)

    def commit_after_signal(checkpoint: Checkpoint) -> None:
        assert waiting.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        commit(checkpoint)

    real_wait = SaveCheckpoint.wait
    monkeypatch.setattr(SaveCheckpoint, "wait", wait)
    monkeypatch.setattr(saving, "commit", commit_after_signal)
    before = signal.signal(signal.SIGTERM, lambda *_: died.append(True))
    try:
        train(recipe(max_steps=1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not died


def test_programs_that_training_starts_do_not_get_its_signals() -> None:
    waits = [sys.executable, "-c", "import sys; sys.exit(len(sys.stdin.read()))"]
    with StopRequest(ALONE).listen():
        child = subprocess.Popen(waits, stdin=subprocess.PIPE)
        for number in SIGNALS:
            child.send_signal(number)
        child.communicate(b"abc")
    assert child.returncode == 3
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(SIGNALS)


def test_a_request_counts_from_the_next_question_on() -> None:
    stop = StopRequest(ALONE)
    stop.ask()
    stop.request()
    assert stop.answer() is None
    stop.ask()
    assert stop.answer() is signal.SIGTERM
