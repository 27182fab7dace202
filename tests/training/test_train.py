"""The verb `train` from recipe to weights: every backbone, fine-tuning, failing saves, kills."""

import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from made_backbone import SMALL_CLASSES, SMALL_UNET
from run_files import CONTEXT_SHAPE, FLOW_AND_MUON, finish, losses, start, write_dataset
from torch import Tensor

from ifvit.cli import main
from ifvit.config import dump_config
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig
from ifvit.models.pretrained import identify, resolve_pretrained
from ifvit.models.weights import WeightsInfo, load_weights
from ifvit.shards.format import read_manifest, write_manifest
from ifvit.shards.reader import ShardReader
from ifvit.storage import read_sealed, write_sealed
from ifvit.training import saving
from ifvit.training.checkpoint import committed_steps, fetch_newest, open_tensors
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.lease import Holder
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.train import initial_tensors, train

Recipe = Callable[..., TrainConfig]
LENGTH, WIDTH = CONTEXT_SHAPE
TOKENS = replace(SMALL_CLASSES, long_skip=True)
every_architecture = pytest.mark.parametrize(
    "backbone", [TOKENS, SMALL_UNET], ids=lambda config: config.architecture
)


def on_captions(backbone: BackboneConfig) -> BackboneConfig:
    return replace(backbone, num_classes=None, context_length=LENGTH, context_width=WIDTH)


@every_architecture
def test_a_resumed_run_on_classes_with_flow_and_muon_repeats_the_uninterrupted_one(
    recipe: Recipe, labelled: str, backbone: BackboneConfig
) -> None:
    fields = {"shards": labelled, "backbone": backbone, **FLOW_AND_MUON}
    whole = recipe("whole", max_steps=4, **fields)
    train(whole)
    broken = recipe("broken", max_steps=2, **fields)
    train(broken)
    train(replace(broken, max_steps=4))
    assert losses(broken) == losses(whole)
    loaded, info = load_weights(whole.run)
    assert loaded.config == backbone
    assert (info.text_encoder, info.classes) == (None, ("cat", "dog"))


def test_weights_state_where_the_recipe_finds_the_autoencoder(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, folder = write_dataset(tmp_path / "shards"), resolve_pretrained("scenes/vae")
    made_by = replace(identify("scenes/vae", folder), name="/gone/vae")
    write_manifest(shards, replace(read_manifest(shards), vae=made_by))
    shutil.copytree(folder, tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    config = recipe(shards=shards, vae="vae", max_steps=1)
    train(config)
    assert load_weights(config.run)[1].vae == replace(made_by, name=f"{tmp_path}/vae")


def test_a_run_states_its_null_context_and_keeps_it(recipe: Recipe, labelled: str) -> None:
    config = recipe(max_steps=1, null_context="zeros")
    train(config)
    assert load_weights(config.run)[1].null_context == "zeros"
    with pytest.raises(UserError, match="null_context: zeros, the recipe now says empty_caption"):
        train(replace(config, null_context="empty_caption"))
    with pytest.raises(UserError, match="null_context: the backbone knows classes"):
        recipe(shards=labelled, backbone=TOKENS, null_context="zeros")


def test_a_run_that_died_in_its_first_save_starts_from_its_initial_weights_again(
    recipe: Recipe, whole: TrainConfig
) -> None:
    tuned = recipe(initial_weights=whole.run, max_steps=1)
    Path(tuned.run, "checkpoints/step_00000005").mkdir(parents=True)
    initial = initial_tensors(tuned, ShardReader(tuned.shards))
    weights = load_weights(whole.run)[0].state_dict()
    assert all(initial(name).equal(tensor) for name, tensor in weights.items())


@every_architecture
def test_every_backbone_also_trains_on_captions(recipe: Recipe, backbone: BackboneConfig) -> None:
    config = recipe(
        backbone=on_captions(backbone),
        max_steps=2,
        engine=EngineConfig(backend="plain", activation_checkpointing=True),
    )
    train(config)
    loaded, info = load_weights(config.run)
    assert loaded.config == config.backbone
    assert info.text_encoder is not None


def test_a_run_starts_from_weights_and_is_resumed_without_them(
    recipe: Recipe, other_shards: str, tmp_path: Path
) -> None:
    first = recipe("first", max_steps=2, scaling_factor=0.5)
    train(first)
    tuned = recipe("tuned", shards=other_shards, scaling_factor=0.5, initial_weights=first.run)
    initial = initial_tensors(tuned, ShardReader(other_shards))
    weights = load_weights(first.run)[0].state_dict()
    assert all(initial(name).equal(tensor) for name, tensor in weights.items())

    train(replace(tuned, max_steps=5))
    Path(first.run).rename(tmp_path / "gone")
    train(tuned)
    whole = replace(tuned, run=f"{tuned.run}_whole", initial_weights=str(tmp_path / "gone"))
    train(whole)
    assert losses(tuned) == losses(whole)


def test_initial_weights_that_do_not_fit_are_an_error(recipe: Recipe, whole: TrainConfig) -> None:
    tuned = recipe(scaling_factor=0.25, initial_weights=whole.run)
    with pytest.raises(UserError, match=r"has scaling_factor: 0\.6.*, but the recipe says 0\.25"):
        train(tuned)
    with pytest.raises(UserError, match="has null_context: empty_caption, but the recipe says zer"):
        train(replace(tuned, scaling_factor=None, null_context="zeros"))
    with pytest.raises(UserError, match=r"has backbone\.width: 32, but the recipe says 64"):
        train(replace(tuned, backbone=replace(whole.backbone, width=64)))


def test_offload_without_deepspeed_is_an_error(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"engine\.offload_optimizer: needs DeepSpeed"):
        train(recipe(engine=EngineConfig(backend="plain", offload_optimizer=True)))


@pytest.mark.parametrize(
    "fields", [{"backend": "deepspeed"}, {"offload_optimizer": True}, {"zero_stage": 2}]
)
def test_muon_with_zero_is_an_error(recipe: Recipe, fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"optim\.optimizer: muon needs engine\.backend: plain"):
        recipe(engine=EngineConfig(**fields), **FLOW_AND_MUON)


def test_a_run_that_was_taken_over_commits_nothing_more(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(max_steps=1)

    def lose_lease(folder: str, backbone: Backbone, info: WeightsInfo) -> None:
        holder = read_sealed(Holder, f"{config.run}/lease/000001.json")
        write_sealed(f"{config.run}/lease/000002.json", replace(holder, host="node7"))

    monkeypatch.setattr(saving, "save_weights", lose_lease)
    with pytest.raises(UserError, match=r"taken over by process \d+ on node7"):
        train(config)
    assert not Path(config.run, "checkpoints", "latest").exists()
    (part,) = Path(config.run, "checkpoints", "step_00000001").iterdir()
    assert part.suffix == ".safetensors"


def launch(config: TrainConfig, num_processes: int) -> list[BaseProcess]:
    """Start `ifvit train` in its own processes."""
    recipe = Path(config.run).with_suffix(".yaml")
    recipe.write_text(dump_config(config))
    return start(main, (["train", "--config", str(recipe)],), num_processes)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_killed_run_continues_on_another_number_of_processes(recipe: Recipe) -> None:
    whole = recipe("whole", micro_batch_size=4, max_steps=24)
    train(whole)
    killed = recipe("killed", micro_batch_size=4, max_steps=24, checkpoint_every=4)
    (process,) = launch(killed, 1)
    metrics = Path(killed.run, "metrics.jsonl")
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()

    halfway = replace(killed, max_steps=16, micro_batch_size=2)
    assert finish(launch(replace(halfway, engine=EngineConfig(backend="deepspeed")), 2)) == [0, 0]
    train(killed)
    assert losses(killed) == pytest.approx(losses(whole), rel=1e-4)


def run_with_a_fault(recipe: str, log: str, faulty_rank: int) -> None:
    """Run `ifvit train`; on rank 1 a shard is damaged, on rank 0 the disk fills up."""
    rank = int(os.environ["RANK"])
    os.dup2(os.open(f"{log}{rank}", os.O_WRONLY | os.O_CREAT), 2)
    if rank == faulty_rank == 1:
        ShardReader.read_moments = Mock(side_effect=UserError("shard 7: damaged"))  # type: ignore[method-assign]
    elif rank == faulty_rank == 0:
        full = OSError(28, "No space left on device")
        MetricsLog.__call__ = Mock(side_effect=full)  # type: ignore[method-assign]
    main(["train", "--config", recipe])


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("faulty_rank", "cause"), [(0, "No space left on device"), (1, "shard 7: damaged")]
)
def test_all_processes_end_with_one_line_when_one_of_them_fails(
    recipe: Recipe, tmp_path: Path, faulty_rank: int, cause: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_config(recipe(micro_batch_size=4)))
    log = tmp_path / "log"
    processes = start(run_with_a_fault, (str(path), str(log), faulty_rank), 2)
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [2, 2]
    lines = [Path(f"{log}{rank}").read_text().splitlines() for rank in (0, 1)]
    assert cause in lines[faulty_rank][-1]
    assert "another process of this launch has ended" in lines[1 - faulty_rank][-1]
    assert "Traceback" not in "".join(lines[0] + lines[1])


def read_state(run: str, cache: Path) -> tuple[int, dict[str, Tensor]]:
    """Step and tensors of the newest complete checkpoint, verified; step 0 without one."""
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        saved = fetch_newest(run, Path(folder))
        if saved is None:
            return 0, {}
        with open_tensors(saved, Path(folder)) as read:
            return saved.state.step, {n: read(n) for part in saved.parts for n in part.tensors}


def wait_for_checkpoint(run: str, newest: int, processes: Sequence[BaseProcess]) -> None:
    """Wait until the run has a complete checkpoint after step `newest`, or its processes end."""
    deadline = time.monotonic() + 120
    while committed_steps(run)[-1:] <= [newest] and any(p.is_alive() for p in processes):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.05)


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_left_alone(
    recipe: Recipe, run: str, tmp_path: Path, num_kills: int
) -> None:
    """All ranks are killed at once, while they start, step, save or upload."""
    chance, newest = random.Random(0), 0
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=10)
    fields = {"max_steps": 8 * num_kills, "checkpoint_every": 2, "micro_batch_size": 2}
    calm = recipe("calm", optim=optim, **fields)
    train(calm)
    hunted = replace(calm, run=run)
    for number in range(num_kills):
        processes = start(train, (hunted,), (1, 2, 4)[number % 3])
        if number % 2:  # however slow the machine is, some work is saved between two kills
            wait_for_checkpoint(run, newest, processes)
        time.sleep(chance.uniform(0.0, 1.0) if number % 2 else chance.uniform(1.0, 4.0))
        assert not any(process.exitcode for process in processes)
        for process in chance.sample(processes, len(processes)):
            process.kill()
        for process in processes:
            process.join()
        step, _ = read_state(run, tmp_path)
        assert step >= newest, f"step {newest} was complete and is lost"
        newest = step
    assert newest
    train(hunted)
    assert losses(hunted) == pytest.approx(losses(calm), rel=1e-5)
    (_, found), (_, expected) = (read_state(each, tmp_path) for each in (run, calm.run))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 0.01 * tensor.abs().max()
