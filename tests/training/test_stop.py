"""A signal ends a run after a step, saved."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_files import losses, rows

from ifvit.distributed import World
from ifvit.errors import EXIT_PREEMPTED
from ifvit.training import hooks as checkpoint_saver
from ifvit.training.checkpoint import Checkpoint
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import SIGNALS, Preempted, StopRequest
from ifvit.training.hooks import CheckpointSaver
from ifvit.training.train import train

ALONE = World(rank=0, size=1, local_rank=0)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, EXIT_PREEMPTED),
        (signal.SIGUSR1, EXIT_PREEMPTED),
        (signal.SIGUSR2, EXIT_PREEMPTED),
        (signal.SIGINT, 130),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    recipe: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    whole, broken = recipe("whole", max_steps=6), recipe("broken", max_steps=6, log_every=3)
    train(whole)
    handler = signal.getsignal(number)
    real = Engine.step

    def step(engine: Engine) -> object:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 60
        while not noted:  # another thread takes the signal, this one must run to see it
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return real(engine)

    def request(stop: StopRequest, number: int) -> None:
        note(stop, number)
        noted.append(number)

    noted: list[int] = []
    note = StopRequest.request
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
    assert [row["loss"] for row in table.values()] == [losses(whole)[step - 1] for step in table]


def test_a_signal_during_the_last_save_does_not_end_it(
    recipe: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, died = threading.Event(), []

    def wait(saver: CheckpointSaver) -> None:
        if saver._pending is not None:
            waiting.set()
        real_wait(saver)

    def commit(run: str, checkpoint: Checkpoint) -> None:
        assert waiting.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        real_commit(run, checkpoint)

    real_wait, real_commit = CheckpointSaver.wait, checkpoint_saver.commit
    monkeypatch.setattr(CheckpointSaver, "wait", wait)
    monkeypatch.setattr(checkpoint_saver, "commit", commit)
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
