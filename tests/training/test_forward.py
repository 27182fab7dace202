"""Ways to compute the blocks that change no result."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from run_files import losses

from ifvit.errors import UserError
from ifvit.models.attention import load_attention
from ifvit.models.weights import build_backbone, load_weights
from ifvit.training.config import EngineConfig, TrainConfig
from ifvit.training.engine import Engine, prepare_forward
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]
PLAIN = EngineConfig(backend="plain")


def test_activations_computed_again_give_the_same_losses(recipe: Recipe) -> None:
    kept = recipe("kept")
    again = recipe("again", engine=replace(PLAIN, activation_checkpointing=True))
    train(kept)
    train(again)
    assert losses(again) == losses(kept)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses_and_averages(recipe: Recipe) -> None:
    backbone = replace(
        recipe().backbone, depth=2, conditioning="concat", num_image_blocks=0, num_text_blocks=0
    )
    eager = recipe("eager", max_steps=4, backbone=backbone)
    compiled = replace(eager, run=f"{eager.run}2", engine=replace(PLAIN, compile=True))
    train(eager)
    train(compiled)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    averages = [dict(load_weights(config.run)[0].state_dict()) for config in (compiled, eager)]
    torch.testing.assert_close(*averages, rtol=1e-3, atol=1e-5)


def test_what_is_drawn_from_takes_any_type(recipe: Recipe) -> None:
    """Weights are fp32 there, which the recipe's kernel may not take."""
    config = recipe()
    backbone = build_backbone(config.backbone)
    backbone.set_attention("math")
    engine = Engine(
        backbone,
        PLAIN,
        config.optim,
        ema_decays=(0.9,),
        micro_batch_size=2,
        num_micro_batches=1,
    )
    for decay in (None, 0.9):
        blocks = engine.gather_backbone(decay).blocks()
        assert {block.attn.attend for block in blocks} == {load_attention("sdpa")}


def test_compilation_without_a_compiler_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"engine\.compile: .* no-such-compiler, which is not on"):
        train(recipe(engine=replace(PLAIN, compile=True)))


def test_cuda_graphs_are_refused_where_they_cannot_be(recipe: Recipe) -> None:
    graphs = replace(PLAIN, compile=True, cuda_graphs=True)
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: needs a CUDA device"):
        train(recipe(engine=graphs))
    with pytest.raises(UserError, match=r"engine\.cuda_graphs: cannot accumulate .* over 2 micro"):
        prepare_forward(
            build_backbone(recipe().backbone), graphs, torch.device("cuda"), num_micro_batches=2
        )
    with pytest.raises(ValueError, match=r"engine\.cuda_graphs: needs engine\.compile"):
        EngineConfig(cuda_graphs=True)


def test_a_kernel_of_16_bits_is_refused_in_fp32_before_anything_is_compiled(
    recipe: Recipe,
) -> None:
    flash = replace(PLAIN, attention="flash", precision="fp32")
    with pytest.raises(UserError, match=r"engine\.attention: flash takes 16 bits.* to bf16 or"):
        prepare_forward(build_backbone(recipe().backbone), flash, torch.device("cuda"))


def test_offload_without_deepspeed_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"engine\.offload_optimizer: needs DeepSpeed"):
        train(recipe(engine=replace(PLAIN, offload_optimizer=True)))


def test_deepspeed_with_nothing_to_partition_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.zero_stage: 0 partitions nothing"):
        EngineConfig(backend="deepspeed", zero_stage=0)
