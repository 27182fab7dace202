"""The randomness contract: a run is one sequence of losses, however it was carried out."""

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from run_files import finish, losses, rows, start, write_dataset

from ifvit.cli import main
from ifvit.config import dump_config
from ifvit.errors import UserError
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.engine import build_optimizer, learning_rate
from ifvit.training.train import train

Recipe = Callable[..., TrainConfig]


def launch(config: TrainConfig, num_processes: int) -> list[BaseProcess]:
    """Start `ifvit train` in its own processes."""
    recipe = Path(config.run).with_suffix(".yaml")
    recipe.write_text(dump_config(config))
    return start(main, (["train", "--config", str(recipe)],), num_processes)


def test_resumed_run_repeats_the_uninterrupted_one(recipe: Recipe) -> None:
    whole = recipe("whole", checkpoint_every=3)
    train(whole)
    broken = recipe("broken", checkpoint_every=3)
    train(replace(broken, max_steps=5))
    train(broken)
    assert losses(broken) == losses(whole)
    assert {r["grad_norm"] for r in rows(broken).values()} == {
        r["grad_norm"] for r in rows(whole).values()
    }


def test_losses_do_not_depend_on_micro_batch_size(recipe: Recipe) -> None:
    whole, split = recipe("whole"), recipe("split", micro_batch_size=2)
    train(whole)
    train(split)
    assert losses(split) == pytest.approx(losses(whole), rel=1e-5)


def test_first_update_has_rate_zero_and_warm_up_is_linear(recipe: Recipe) -> None:
    config = recipe()
    train(config)
    rates = [row["learning_rate"] for row in rows(config).values()]
    assert rates == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])


def test_rate_falls_linearly_to_zero_over_the_cooldown() -> None:
    optim = OptimConfig(learning_rate=1.0, warmup_steps=2, cooldown_steps=4)
    rates = [learning_rate(step, 10, optim) for step in range(11)]
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


def test_the_first_update_is_adamws_with_decay_on_every_parameter() -> None:
    config = OptimConfig(weight_decay=0.2, betas=(0.7, 0.6))
    parameters = [torch.full((3,), 4.0, requires_grad=True), torch.tensor(-2.0, requires_grad=True)]
    optimizer = build_optimizer(parameters, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    optimizer.step()
    for parameter, before in zip(parameters, (4.0, -2.0), strict=True):
        # Corrected for their zero start the moments are g and g^2, and their quotient is 1.
        expected = (1 - 0.5 * 0.2) * before - 0.5
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected))
        moments = optimizer.state[parameter]
        torch.testing.assert_close(moments["exp_avg"], torch.full_like(parameter, 0.3 * 3.0))
        torch.testing.assert_close(moments["exp_avg_sq"], torch.full_like(parameter, 0.4 * 9.0))


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_run_continues_on_another_number_of_processes(recipe: Recipe) -> None:
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


def test_another_recipe_in_the_same_run_directory_is_refused(recipe: Recipe) -> None:
    config = recipe(max_steps=2)
    train(config)
    with pytest.raises(UserError, match="started with seed: 1234, the recipe now says 5"):
        train(replace(config, seed=5))
    slower = replace(config.optim, learning_rate=1e-5)
    with pytest.raises(UserError, match=r"started with optim\.learning_rate: .* now says 1e-05"):
        train(replace(config, optim=slower))
    train(replace(config, run=f"{config.run}_slower", resume=config.run, optim=slower, max_steps=3))
    train(replace(config, max_steps=3, micro_batch_size=4))


def test_a_complete_run_says_so(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(max_steps=1)
    train(config)
    assert "complete at" not in capsys.readouterr().err
    train(config)
    assert "complete at step 1; a larger max_steps goes on" in capsys.readouterr().err


def test_other_shards_than_the_run_was_trained_on_are_refused(
    recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(max_steps=2)
    train(config)
    other = write_dataset(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="trained on other shards"):
        train(replace(config, shards=other, max_steps=3))


def test_backbone_of_another_latent_size_is_refused(recipe: Recipe) -> None:
    config = recipe()
    wrong = replace(config, backbone=replace(config.backbone, latent_size=16))
    with pytest.raises(UserError, match="latents are 4x8x8, but the backbone takes 4x16x16"):
        train(wrong)
    wrong = replace(config, backbone=replace(config.backbone, context_width=768))
    with pytest.raises(UserError, match="context are 5x12, but the backbone takes 5x768"):
        train(wrong)


def test_shards_of_another_encoder_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="encoded with vae made-up, the recipe names scenes/vae"):
        train(recipe(vae="scenes/vae"))


def test_gradient_is_clipped_to_the_norm_of_the_recipe(recipe: Recipe) -> None:
    free, clipped = recipe("free"), recipe("clipped")
    train(free)
    train(replace(clipped, optim=replace(clipped.optim, max_grad_norm=1e-4)))
    assert losses(clipped)[:2] == losses(free)[:2]
    assert losses(clipped)[4:] != losses(free)[4:]


def test_loss_falls_on_a_small_set(recipe: Recipe) -> None:
    config = recipe(max_steps=60, optim=OptimConfig(learning_rate=3e-3, warmup_steps=5))
    train(config)
    history = losses(config)
    assert sum(history[-10:]) < 0.9 * sum(history[:10])
