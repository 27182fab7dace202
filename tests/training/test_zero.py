"""A run has the same losses with every engine and any number of processes.

The processes are started once and train all recipes below one after the other.
"""

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from made_backbone import SMALL_UNET
from run_files import FLOW, FLOW_AND_MUON, finish, losses, rows, small_recipe, start
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ifvit.diffusion.config import RepresentationConfig
from ifvit.errors import UserError
from ifvit.models.cost import count_cost
from ifvit.models.weights import describe_backbone, initial_weights, load_weights
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import Preempted
from ifvit.training.optimizers import MOMENTS
from ifvit.training.train import choose_engine, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TOLERANCE = 1e-5
"""Relative difference of the loss of each of 12 steps in fp32."""
ROUNDING = 2e-3
"""The same in 16 bits, where the engines add in another order."""

ENGINES = {
    "ddp": EngineConfig(backend="plain"),
    "zero1": EngineConfig(backend="deepspeed", zero_stage=1),
    "zero2": EngineConfig(backend="deepspeed", zero_stage=2),
    "zero3": EngineConfig(backend="deepspeed", zero_stage=3),
    "zero2_offload": EngineConfig(backend="deepspeed", zero_stage=2, offload_optimizer=True),
    "zero3_offload": EngineConfig(backend="deepspeed", zero_stage=3, offload_optimizer=True),
}
HALF = {
    "zero1_bf16": replace(ENGINES["zero1"], precision="bf16"),
    "zero3_fp16": replace(ENGINES["zero3"], precision="fp16", activation_checkpointing=True),
}
HOPS = ("zero1", "zero3", "zero2_offload")
"""Engines that one run changes between, four steps on each; one process finishes it."""

WIDE = {
    "fusion": "image concat cross_attention separate_cross_attention dual_stream adaln",
    "width": 160,
    "qk_norm": True,
    "num_registers": 1,
}
"""Every entry of fusion maps, and wide enough for DeepSpeed to keep some parameters partitioned."""

Runs = dict[str, TrainConfig]


def build(folder: Path, shards: str, name: str, **fields: object) -> TrainConfig:
    """12 quick steps of 8 samples with clipping and two EMA decays."""
    values: dict[str, object] = {
        "max_steps": 12,
        "ema_decays": (0.9, 0.5),
        "optim": OptimConfig(learning_rate=1e-2, warmup_steps=4, max_grad_norm=0.5),
        **fields,
    }
    return small_recipe(str(folder / name), shards, **values)


def build_all(folder: Path, datasets: dict[str, str], micro_batch_size: int) -> Runs:
    """Every run of the tests below except `hop`, by name."""
    shards = datasets["shards"]
    # These runs precede those with DeepSpeed, which accelerate cannot leave within one process.
    classes = build(folder, datasets["labelled"], "classes", backbone=SMALL_UNET, max_steps=3)
    wide = replace(small_recipe("run", "shards").backbone, **WIDE)
    auto = EngineConfig()
    muon = build(folder, shards, "muon", engine=auto, backbone=wide, max_steps=4, **FLOW_AND_MUON)
    runs = {"classes": classes, "muon": muon}
    for name, engine in ENGINES.items():
        runs[name] = build(folder, shards, name, engine=engine)
    for name, engine in HALF.items():
        runs[name] = build(folder, shards, name, engine=engine, max_steps=8)
    zero3 = ENGINES["zero3"]
    projecting = {"representation_block": 1, "representation_width": 6}
    runs["aligned"] = build(
        folder,
        datasets["featured"],
        "aligned",
        engine=zero3,
        max_steps=6,
        backbone=replace(small_recipe("run", "shards").backbone, **projecting),
        representation=RepresentationConfig(stop_step=4),
    )
    runs["tolerant"] = build(
        folder, datasets["damaged"], "tolerant", engine=zero3, max_steps=8, tolerate_nonfinite=9
    )
    runs["intolerant"] = build(
        folder, datasets["damaged"], "intolerant", engine=ENGINES["zero1"], max_steps=8, log_every=5
    )
    runs["preempted"] = build(folder, shards, "preempted", engine=ENGINES["zero2"])
    return {name: replace(run, micro_batch_size=micro_batch_size) for name, run in runs.items()}


def build_hops(folder: Path, shards: str, micro_batch_size: int) -> list[TrainConfig]:
    """One run of a flow as four recipes."""
    engines = [ENGINES[name] for name in HOPS] + [EngineConfig(backend="plain")]
    wide = replace(small_recipe("run", "shards").backbone, **WIDE)
    return [
        build(
            folder,
            shards,
            "hop",
            engine=engine,
            backbone=wide,
            objective=FLOW,
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=4),
            micro_batch_size=micro_batch_size,
            max_steps=4 * number,
        )
        for number, engine in enumerate(engines, start=1)
    ]


def preempt_after_two_steps() -> None:
    """Send SIGUSR1 to this process when it has trained two steps."""
    real, calls = Engine.update_ema, []

    def update_ema(engine: Engine) -> None:
        real(engine)
        calls.append(engine)
        if len(calls) == 2 and engine.world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    Engine.update_ema = update_ema  # type: ignore[method-assign]


def train_in_turn(recipes: list[TrainConfig]) -> None:
    """Train every recipe on one rank; a run that ends early leaves its message in `ended-RANK`.

    In the run `preempted`, rank 1 receives SIGUSR1 after its second step.
    """
    for config in recipes:
        if Path(config.run).name == "preempted":
            preempt_after_two_steps()
        AcceleratorState._reset_state()
        try:
            train(config)
        except (Preempted, ValueError) as ending:
            rank = os.environ["RANK"]
            Path(config.run, f"ended-{rank}").write_text(str(ending))


def train_all(recipes: list[TrainConfig], num_processes: int) -> None:
    """Train all recipes in one set of processes."""
    assert finish(start(train_in_turn, (recipes,), num_processes)) == [0] * num_processes


@pytest.fixture(scope="module")
def datasets(shards: str, damaged: str, labelled: str, featured: str) -> dict[str, str]:
    """Folders of the datasets by name."""
    return {"shards": shards, "damaged": damaged, "labelled": labelled, "featured": featured}


@pytest.fixture(scope="module")
def pair(datasets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs, trained by two processes in two micro-batches."""
    folder = tmp_path_factory.mktemp("pair")
    runs = build_all(folder, datasets, micro_batch_size=2)
    hops = build_hops(folder, datasets["shards"], micro_batch_size=2)
    train_all([*runs.values(), *hops[:-1]], 2)
    return {**runs, "hop": replace(hops[-1], micro_batch_size=8)}


@pytest.fixture(scope="module")
def alone(datasets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The same runs for one process of plain PyTorch; not trained yet."""
    folder = tmp_path_factory.mktemp("alone")
    runs = build_all(folder, datasets, micro_batch_size=8)
    runs["hop"] = build_hops(folder, datasets["shards"], micro_batch_size=8)[-1]
    plain = EngineConfig(backend="plain")
    return {
        name: replace(run, engine=replace(plain, precision=run.engine.precision))
        for name, run in runs.items()
    }


@pytest.fixture(scope="module")
def reference(alone: Runs) -> TrainConfig:
    """The uninterrupted run of 12 steps."""
    train(alone["ddp"])
    return alone["ddp"]


def assert_same_weights(one: TrainConfig, other: TrainConfig) -> None:
    """The exported weights of both runs, trained and EMA, agree to rounding."""
    for kind in ("raw", "ema", "ema_0.5"):
        folder = f"weights/step_{one.max_steps:08d}/{kind}"
        mine, _ = load_weights(f"{one.run}/{folder}")
        theirs, _ = load_weights(f"{other.run}/{folder}")
        for name, tensor in theirs.state_dict().items():
            assert torch.allclose(mine.state_dict()[name], tensor, rtol=1e-3, atol=1e-5), name


def build_engine(config: TrainConfig) -> Engine:
    """An engine of this recipe before its first step."""
    AcceleratorState._reset_state()
    initial = initial_weights(config.backbone, config.seed)
    return choose_engine(config)(config, initial)


def build_engines(folder: str) -> None:
    """Write the first state of every engine, and the memory that ZeRO stage 3 builds a model in."""
    path = Path(folder)
    for name, config in ENGINES.items():
        wide = replace(small_recipe("run", "shards").backbone, **WIDE)
        built = build_engine(build(path, "shards", name, engine=config, backbone=wide))
        state = {key: tensor.clone() for key, tensor in built.iter_state()}
        if built.world.is_main:
            save_file(state, path / f"{name}.safetensors")

    seen: list[Any] = []
    held: list[int] = []

    def count_values(_module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        if parameter.device.type != "meta":
            seen.append(parameter)
        shards = [one.ds_tensor for one in seen if hasattr(one, "ds_tensor")]
        held.append(sum(one.numel() for one in (*seen, *shards)))

    large = replace(wide, width=256, fusion="12*concat", long_skip=False)
    config = build(path, "shards", "large", engine=ENGINES["zero3"], backbone=large)
    with register_module_parameter_registration_hook(count_values):
        build_engine(config)
    share = max(held) / count_cost(large).params
    (path / f"share-{os.environ['RANK']}").write_text(str(share))


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes note of engines before the first step."""
    folder = tmp_path_factory.mktemp("starts")
    assert finish(start(build_engines, (str(folder),), 2)) == [0, 0]
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_starts_from_the_same_bits(starts: Path, name: str) -> None:
    recipe = small_recipe("run", "shards")
    shape = replace(recipe.backbone, **WIDE)
    initial, state = initial_weights(shape, recipe.seed), load_file(starts / f"{name}.safetensors")
    for parameter, _ in describe_backbone(shape).named_parameters():
        for prefix in ("backbone", "ema0.9", "ema0.5"):
            assert state.pop(f"{prefix}.{parameter}").equal(initial(parameter))
        for moment in MOMENTS:
            assert not state.pop(f"{moment}.{parameter}").any()
    assert not state


def test_stage_3_builds_a_model_without_holding_the_whole_of_it(starts: Path) -> None:
    for rank in (0, 1):
        # Half of the parameters, and all of the few that are made together before they are divided.
        assert 0.5 <= float((starts / f"share-{rank}").read_text()) < 0.6


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_gives_the_losses_of_one_process(
    pair: Runs, reference: TrainConfig, name: str
) -> None:
    assert losses(pair[name]) == pytest.approx(losses(reference), rel=TOLERANCE)
    norms = [[row["grad_norm"] for row in rows(run).values()] for run in (pair[name], reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert_same_weights(pair[name], reference)


@pytest.mark.parametrize("name", HALF)
def test_half_precision_rounds_but_learns_the_same(
    pair: Runs, alone: Runs, reference: TrainConfig, name: str
) -> None:
    train(alone[name])
    assert losses(pair[name]) == pytest.approx(losses(alone[name]), rel=ROUNDING)
    exact = losses(reference)[:8]
    assert losses(pair[name]) == pytest.approx(exact, rel=ROUNDING)
    assert losses(pair[name]) != pytest.approx(exact, rel=1e-6)


def test_a_run_may_change_its_engine_at_every_restart(pair: Runs, alone: Runs) -> None:
    train(pair["hop"])
    train(alone["hop"])
    assert losses(pair["hop"]) == pytest.approx(losses(alone["hop"]), rel=TOLERANCE)
    assert_same_weights(pair["hop"], alone["hop"])


def test_muon_gives_the_losses_of_one_process_which_continues_the_run(
    pair: Runs, alone: Runs
) -> None:
    longer = [replace(run["muon"], max_steps=8, micro_batch_size=8) for run in (pair, alone)]
    for run in longer:
        train(run)
    assert losses(longer[0]) == pytest.approx(losses(longer[1]), rel=TOLERANCE)
    assert_same_weights(*longer)


def test_two_processes_train_another_architecture_on_classes_as_one(
    pair: Runs, alone: Runs
) -> None:
    train(alone["classes"])
    assert losses(pair["classes"]) == pytest.approx(losses(alone["classes"]), rel=1e-4)


def test_two_processes_align_representations_as_one(pair: Runs, alone: Runs) -> None:
    train(alone["aligned"])
    found, expected = rows(pair["aligned"]), rows(alone["aligned"])
    for step in range(1, 7):
        assert (found[step]["representation_loss"] is None) == (step > 4)
        for key in ("loss", "grad_norm", *(["representation_loss"] if step <= 4 else [])):
            assert found[step][key] == pytest.approx(expected[step][key], rel=1e-4), (step, key)
    assert_same_weights(pair["aligned"], alone["aligned"])


def test_tolerated_steps_are_skipped_by_all_processes(pair: Runs, alone: Runs) -> None:
    train(alone["tolerant"])
    skipped, expected = rows(pair["tolerant"]), rows(alone["tolerant"])
    finite = [step for step, row in expected.items() if row["loss"] is not None]
    assert finite == [step for step, row in skipped.items() if row["loss"] is not None]
    assert expected[8]["nonfinite_steps"] == 8 - len(finite) == skipped[8]["nonfinite_steps"] > 0
    for step in finite:
        assert skipped[step]["loss"] == pytest.approx(expected[step]["loss"], rel=TOLERANCE)
    assert_same_weights(pair["tolerant"], alone["tolerant"])


def test_a_gradient_that_is_not_finite_stops_all_processes(pair: Runs, alone: Runs) -> None:
    with pytest.raises(UserError, match="ifvit train --replay") as error:
        train(alone["intolerant"])
    where = re.search(
        r"step \d+, .* at positions \[\d+\] of the batch, images \[7\]", str(error.value)
    )
    assert where is not None
    endings = [Path(pair["intolerant"].run, f"ended-{rank}").read_text() for rank in (0, 1)]
    naming = [ending for ending in endings if "images [7]" in ending]
    assert len(naming) == 1
    for number in re.findall(r"step \d+|positions \[\d+\]", where[0]):
        assert number in naming[0]
    assert len(list(Path(pair["intolerant"].run, "failures").iterdir())) == 1
    assert not Path(pair["intolerant"].run, "checkpoints").exists()


def test_a_signal_on_one_process_stops_all_after_the_same_step(
    pair: Runs, reference: TrainConfig
) -> None:
    run = pair["preempted"]
    assert [Path(run.run, f"ended-{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    assert 2 <= len(losses(run)) <= 4
    train(replace(run, engine=EngineConfig(backend="plain"), micro_batch_size=8))
    assert losses(run) == pytest.approx(losses(reference), rel=TOLERANCE)


def test_four_processes_give_the_losses_of_one(
    shards: str, reference: TrainConfig, tmp_path: Path
) -> None:
    runs = [
        build(tmp_path, shards, name, engine=ENGINES[name], micro_batch_size=micro_batch_size)
        for name, micro_batch_size in (("ddp", 1), ("zero1", 2))
    ]
    train_all(runs, 4)
    for run in runs:
        assert losses(run) == pytest.approx(losses(reference), rel=TOLERANCE)
