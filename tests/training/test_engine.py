"""The engine of one process: EMA, optimizer, loss scale, and ways to compute the forward pass."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from made_backbone import backbone_inputs, small_shape
from run_files import FLOW_AND_MUON, losses, rows, small_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from ifvit.diffusion.config import LatentScaling, ObjectiveConfig
from ifvit.diffusion.objectives import Objective
from ifvit.errors import UserError
from ifvit.models.presets import PRESETS
from ifvit.models.weights import build_backbone, initial_weights, load_weights
from ifvit.training import engine
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.engine import (
    EMA,
    GROWTH_INTERVAL,
    Engine,
    LossScale,
    prepare_forward,
)
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
PLAIN = EngineConfig(backend="plain")


def test_ema_is_the_closed_form_of_its_recursion_in_fp32() -> None:
    parameter = torch.ones(1, requires_grad=True)
    ema = EMA([parameter], decay=0.9999)
    for value in (2.0, -1.0, 4.0):
        with torch.no_grad():
            parameter.fill_(value)
        ema.update([parameter])
    d = ema.decay
    expected = d**3 + (1 - d) * (d**2 * 2.0 + d * -1.0 + 4.0)
    assert ema.tensors[0].item() == pytest.approx(expected, rel=1e-6)
    assert ema.tensors[0].bfloat16().item() == 1.0  # bf16 would round the updates away
    assert not ema.tensors[0].requires_grad


def test_a_run_exports_the_ema_of_its_weights_also_across_a_restart(recipe: Recipe) -> None:
    config = recipe(max_steps=6, checkpoint_every=1, ema_decays=(0.9, 0.5))
    train(replace(config, max_steps=3))
    train(config)
    first = build_backbone(config.backbone, config.seed).state_dict()
    emas = {"ema": (0.9, first), "ema_0.5": (0.5, first)}
    for step in range(1, 7):
        folder = f"{config.run}/weights/step_{step:08d}"
        backbone, info = load_weights(f"{folder}/raw")
        assert (info.step, info.ema_decay) == (step, None)
        assert info.scaling_factor == pytest.approx(1 / 1.5)  # of the shards' standard deviation
        weights = backbone.state_dict()
        for kind, (decay, before) in emas.items():
            ema = {n: decay * before[n] + (1 - decay) * weights[n] for n in weights}
            emas[kind] = (decay, ema)
            exported, info = load_weights(f"{folder}/{kind}")
            assert (info.step, info.ema_decay) == (step, decay)
            torch.testing.assert_close(dict(exported.state_dict()), ema)
    assert not torch.allclose(emas["ema"][1]["pos_embed"], weights["pos_embed"])


def test_the_gradient_is_clipped_to_the_norm_of_the_recipe(
    recipe: Recipe, whole: TrainConfig
) -> None:
    clipped = recipe(optim=replace(whole.optim, max_grad_norm=1e-4))
    train(clipped)
    assert losses(clipped)[:2] == losses(whole)[:2]
    assert losses(clipped)[4:] != losses(whole)[4:]


def test_the_loss_scale_doubles_after_enough_finite_gradients_and_halves_down_to_one() -> None:
    scale = LossScale(value=4.0)
    for _ in range(GROWTH_INTERVAL):
        scale = scale.adapt(finite=True)
    assert scale == LossScale(value=8.0)
    scale = scale.adapt(finite=True)
    assert scale.finite_updates == 1
    for _ in range(3):
        scale = scale.adapt(finite=False)
    assert scale == LossScale(value=1.0, overflows=3)
    assert scale.adapt(finite=False).value == 1.0


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [({"activation_checkpointing": True}, 0.0), ({"precision": "fp16"}, 1e-2)],
)
def test_recomputed_activations_change_no_loss_and_fp16_only_rounds(
    recipe: Recipe, whole: TrainConfig, fields: dict[str, Any], tolerance: float
) -> None:
    config = recipe(engine=replace(PLAIN, **fields))
    train(config)
    assert losses(config) == pytest.approx(losses(whole), rel=tolerance, abs=0)


def test_fp16_skips_updates_that_overflow_and_resumes_with_its_loss_scale(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LossScale", partial(LossScale, value=2.0**22))
    fields = {"engine": EngineConfig(precision="fp16"), **FLOW_AND_MUON}
    half, broken = (recipe(name, **fields) for name in ("half", "broken"))
    assert train(half).nonfinite_steps == 0
    train(replace(broken, max_steps=6))
    train(broken)
    table, expected = rows(broken), rows(half)
    for key in ("loss", "loss_scale", "overflows"):
        assert [row[key] for row in table.values()] == [row[key] for row in expected.values()]
    # Some updates were skipped, so AdamW's number of updates differs from the number of steps.
    assert 0 < table[8]["overflows"] < 5
    assert table[8]["loss_scale"] == 2.0**22 / 2 ** table[8]["overflows"]


EVERY_ENTRY = "image concat cross_attention separate_cross_attention 2*dual_stream adaln image"
MODERN = {
    "mlp": "swiglu",
    "norm": "rms_norm",
    "qk_norm": True,
    "rotary": True,
    "num_registers": 2,
    "modulation": "shared",
}


def take_steps(options: dict[str, Any], engine_fields: dict[str, Any]) -> list[float]:
    """Losses of three steps of every entry of fusion maps, and the norms of their gradients."""
    shape = replace(small_recipe("run", "shards").backbone, fusion=EVERY_ENTRY, **options)
    config = small_recipe("run", "x", backbone=shape, engine=replace(PLAIN, **engine_fields))
    built = Engine(config, initial_weights(shape, config.seed))
    objective = Objective(ObjectiveConfig(), scaling=LatentScaling(scale=0.2), seed=1)
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(2, 8, 8, 8, generator=generator)
    contexts = torch.randn(2, *shape.context_shape, generator=generator)  # type: ignore[misc]
    found = []
    for step in range(1, 4):
        built.set_learning_rate(step, 10)
        total = objective(built.predict, moments, contexts, step, torch.arange(2)).total
        built.backward(total)
        found += [total.item(), built.step().item()]
    return found


@pytest.mark.parametrize("options", [{}, MODERN], ids=["paper", "modern"])
def test_every_entry_trains_recomputed_and_in_16_bits(options: dict[str, Any]) -> None:
    exact = take_steps(options, {})
    assert take_steps(options, {"activation_checkpointing": True}) == exact
    for precision in ("bf16", "fp16"):
        fields = {"precision": precision, "activation_checkpointing": True}
        assert take_steps(options, fields) == pytest.approx(exact, rel=5e-2)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_ema_weights(recipe: Recipe) -> None:
    fusion = "separate_cross_attention dual_stream"
    backbone = replace(recipe().backbone, fusion=fusion, num_text_blocks=0, **MODERN)
    eager = recipe("eager", max_steps=3, backbone=backbone)
    compiled = replace(eager, run=f"{eager.run}2", engine=replace(PLAIN, compile=True))
    train(eager)
    train(compiled)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    weights = [dict(load_weights(config.run)[0].state_dict()) for config in (compiled, eager)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_block_is_compiled_also_where_it_is_recomputed(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    graphs, original = [], torch.compile

    def note(graph: torch.nn.Module, inputs: object) -> torch.nn.Module:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda code, **_: original(code, backend=note))
    monkeypatch.setenv("CXX", "true")  # this backend needs no compiler
    torch.compiler.reset()
    backbone = build_backbone(small_shape(fusion="image concat adaln"))
    options = replace(PLAIN, compile=True, activation_checkpointing=recompute)
    prepare_forward(backbone, options, torch.device("cpu"))
    backbone(*backbone_inputs(backbone.config)).sum().backward()
    assert len(graphs) == len(backbone.parts()) == 3 + backbone.config.num_text_blocks


def test_compilation_without_a_compiler_is_an_error(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"engine\.compile: .* no-such-compiler, which is not on"):
        train(recipe(engine=replace(PLAIN, compile=True)))


def test_a_16_bit_kernel_in_fp32_is_an_error_before_compilation(recipe: Recipe) -> None:
    flash = replace(PLAIN, attention="flash", precision="fp32")
    with pytest.raises(UserError, match=r"engine\.attention: flash needs a 16-bit .* to bf16 or"):
        prepare_forward(build_backbone(recipe().backbone), flash, torch.device("cuda"))


def test_deepspeed_with_nothing_to_partition_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"engine\.zero_stage: 0 partitions nothing"):
        EngineConfig(backend="deepspeed", zero_stage=0)


def test_initial_tensors_are_taken_one_at_a_time() -> None:
    config = small_recipe("run", "shards")
    sample, given = initial_weights(config.backbone, config.seed), []

    def initial(name: str) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in given)
        full = sample(name)
        given.append(weakref.ref(full))
        return full

    built = Engine(config, initial)
    assert {name: True for name, _ in built.iter_weights(None)} == {
        name: tensor.equal(sample(name)) for name, tensor in built.iter_weights(0.9)
    }
    assert len(given) == len(dict(built.iter_weights(None)))


class NoteWaits(TorchDispatchMode):
    """Collects operations whose result has a value or a shape that the host must know."""

    WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.name().split(".")[0] in self.WAITING:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("fields", "optimizer", "tolerate_nonfinite", "num_waits"),
    [
        ({}, "adamw", 0, 0),
        ({"precision": "bf16"}, "muon", 0, 0),
        ({"precision": "fp16"}, "adamw", 0, 1),
        ({}, "adamw", 1, 1),
    ],
)
def test_the_host_waits_for_the_device_only_when_it_must_look_at_the_gradient(
    fields: dict[str, Any],
    optimizer: Literal["adamw", "muon"],
    tolerate_nonfinite: int,
    num_waits: int,
) -> None:
    config = small_recipe(
        "run",
        "shards",
        backbone=PRESETS["tiny"],
        engine=replace(PLAIN, **fields),
        optim=OptimConfig(optimizer=optimizer, max_grad_norm=1.0),
        tolerate_nonfinite=tolerate_nonfinite,
    )
    plain = Engine(config, initial_weights(config.backbone, config.seed))
    objective = Objective(ObjectiveConfig(), scaling=LatentScaling(scale=0.2), seed=1)
    moments, contexts = torch.randn(2, 8, 8, 8), torch.randn(2, 16, 64)

    def step() -> None:
        plain.set_learning_rate(0, 10)
        total = objective(plain.predict, moments, contexts, 3, torch.arange(2)).total
        plain.backward(total)
        plain.step()
        plain.update_ema()

    step()
    with NoteWaits() as noted:
        step()
    assert len(noted.names) == num_waits
