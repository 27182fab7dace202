"""ImageReward loaded from its released format, against rewards of its own package."""

from pathlib import Path

import pytest
import torch
from made_image_reward import released_weights, write_image_reward
from torch import Tensor

from ifvit.errors import UserError
from ifvit.models.image_reward import ImageReward, load_image_reward

PROMPTS = ["two red bus", "a blue sheep"]
GOLDEN = [5.874577045440674, 6.060009956359863]
"""Rewards by image-reward 1.5 for `released_weights()`, PROMPTS and `images()`."""


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_image_reward(tmp_path)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> ImageReward:
    return load_image_reward(str(folder))


def test_rewards_equal_those_of_the_released_package(model: ImageReward) -> None:
    rewards = model.score(images(), PROMPTS)
    torch.testing.assert_close(rewards, torch.tensor(GOLDEN), rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_resized_and_get_a_gradient(model: ImageReward) -> None:
    # Also for values beyond white: nothing is clamped.
    large = (2 * torch.nn.functional.interpolate(images(), (64, 64))).requires_grad_()
    model.score(large, PROMPTS).sum().backward()
    assert large.grad is not None
    assert (large.grad.abs().sum(dim=1) > 0).all()


def test_prompts_do_not_see_each_other(model: ImageReward) -> None:
    alone = [model.score(images()[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)]
    torch.testing.assert_close(model.score(images(), PROMPTS), torch.cat(alone))


def test_a_prompt_is_read_up_to_35_tokens(model: ImageReward) -> None:
    def reward(num_words: int) -> Tensor:
        prompt = " ".join((["red", "blue", "bus"] * 20)[:num_words])
        return model.score(images()[:1], [prompt])

    assert torch.equal(reward(60), reward(33))  # and the start and end token
    assert not torch.equal(reward(33), reward(32))


class Payload:
    """Touches a file when a pickle that holds it is loaded without weights_only."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.file,)


def test_a_file_that_would_run_code_or_is_broken_is_one_clear_error(folder: Path) -> None:
    torch.save({"x": Payload(folder / "has_run")}, folder / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward.pt: cannot be read"):
        load_image_reward(str(folder))
    assert not (folder / "has_run").exists()
    (folder / "ImageReward.pt").write_bytes(b"not a zip file")
    with pytest.raises(UserError, match=r"ImageReward.pt: cannot be read"):
        load_image_reward(str(folder))


def test_missing_tensor_is_named(folder: Path) -> None:
    weights = released_weights()
    del weights["mlp.layers.7.bias"]
    torch.save(weights, folder / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward.pt: not the weights of ImageReward.*mlp.7"):
        load_image_reward(str(folder))
