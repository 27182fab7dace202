"""Sampling and decoding batches of conditions with a real backbone and autoencoder."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from captioned_backbone import CONTEXTS, NULL, build_backbone
from diffusers import AutoencoderKL

from ifvit.diffusion.config import Precision, SolverConfig
from ifvit.diffusion.guidance import Change, FunctionEvaluation
from ifvit.diffusion.sampler import (
    ConditionBatch,
    Sampler,
    generate_images,
    sample_latents,
    sampling_precision,
)
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.errors import UserError
from ifvit.images import to_pixels
from ifvit.models.autoencoders import Autoencoder
from ifvit.shards.format import EncoderIdentity

CONFIG = SolverConfig(num_steps=4, guidance_scale=3.0, seed=7)


@pytest.fixture
def sampler() -> Sampler:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    autoencoder = Autoencoder(vae, EncoderIdentity(name="random", sha256="0" * 64))
    return Sampler(
        backbone=build_backbone(),
        schedule=NoiseSchedule(),
        decode=lambda latents: autoencoder.decode(latents / 0.5),
        null_condition=NULL,
    )


def make_batches(positions: Sequence[int], batch_size: int) -> Iterator[ConditionBatch]:
    for chunk in torch.tensor(positions).split(batch_size):
        captions = [f"caption {position}" for position in chunk.tolist()]
        yield ConditionBatch(positions=chunk, condition=CONTEXTS[chunk % 5], prompts=captions)


def test_text_is_encoded_once_per_caption_for_any_number_of_steps(sampler: Sampler) -> None:
    rows: list[int] = []
    hook = sampler.backbone.text_blocks[0].register_forward_hook(  # type: ignore[attr-defined]
        lambda *call: rows.append(len(call[2][0]))
    )
    config = dataclasses.replace(CONFIG, num_steps=6)
    list(generate_images(sampler, make_batches(range(5), 2), config))
    hook.remove()
    assert rows == [1, 2, 2, 1]


def test_latents_depend_on_the_position_and_not_on_the_batch() -> None:
    backbone = build_backbone()
    null = backbone.encode_condition(NULL)
    together, alone = (
        sample_latents(backbone, NoiseSchedule(), next(make_batches(positions, 5)), null, CONFIG)
        for positions in ([0, 1, 2, 3, 4], [3])
    )
    torch.testing.assert_close(together[3:4], alone, rtol=1e-4, atol=1e-4)
    assert float((together[3] - together[2]).abs().max()) > 0.1


def test_images_are_the_same_for_any_batch_size(sampler: Sampler) -> None:
    alone, some, many = (
        np.concatenate(list(generate_images(sampler, make_batches(range(32), size), CONFIG)))
        for size in (1, 7, 32)
    )
    assert many.shape == (32, 8, 8, 3)
    assert many.dtype == np.uint8
    # One unit: the last bit of a float sum may decide how a value rounds.
    assert np.abs(alone.astype(int) - many).max() <= 1
    assert np.abs(some.astype(int) - many).max() <= 1


def test_images_are_the_decoded_latents(sampler: Sampler) -> None:
    (batch,) = make_batches(range(5), 5)
    null = sampler.backbone.encode_condition(NULL)
    latents = sample_latents(sampler.backbone, sampler.schedule, batch, null, CONFIG)
    with torch.no_grad():
        expected = to_pixels(sampler.decode(latents))
    (images,) = generate_images(sampler, [batch], CONFIG)
    np.testing.assert_array_equal(images, expected)


def test_each_batch_gets_its_own_method_with_its_prompts(sampler: Sampler) -> None:
    num_calls: dict[tuple[str, ...], int] = {}

    class Counter:
        def __init__(self, prompts: Sequence[str]) -> None:
            self.prompts = tuple(prompts)

        def before(self, evaluation: FunctionEvaluation) -> Change:
            num_calls[self.prompts] = evaluation.index + 1
            return Change()

    batches = make_batches([4, 1, 2], 2)
    list(generate_images(sampler, batches, CONFIG, lambda prompts: [Counter(prompts)]))
    assert num_calls == {("caption 4", "caption 1"): 4, ("caption 2",): 4}


def test_seed_solver_and_guidance_change_the_image(sampler: Sampler) -> None:
    def generate(**changes: object) -> bytes:
        config = dataclasses.replace(CONFIG, **changes)
        return next(generate_images(sampler, make_batches(range(5), 5), config)).tobytes()

    pictures = [generate(), generate(seed=8), generate(solver="euler"), generate(guidance_scale=1)]
    assert len(set(pictures)) == 4
    assert generate() == pictures[0]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_precision_is_that_of_the_backbone_while_it_samples(
    sampler: Sampler, precision: Precision
) -> None:
    seen: list[tuple[torch.dtype, str]] = []

    class Watch:
        def before(self, evaluation: FunctionEvaluation) -> Change:
            products = torch.get_float32_matmul_precision()
            seen.append((sampler.backbone.dtype, products))
            assert evaluation.x_t.dtype == torch.float32
            assert evaluation.predict_clean(evaluation.context).dtype == torch.float32
            return Change()

    assert isinstance(sampler.backbone, torch.nn.Module)
    exact = {name: weights.tolist() for name, weights in sampler.backbone.state_dict().items()}
    config = dataclasses.replace(CONFIG, precision=precision, num_steps=2)
    for images in generate_images(sampler, make_batches(range(4), 2), config, lambda _: [Watch()]):
        assert images.std() > 1
        assert torch.get_float32_matmul_precision() == "highest"  # the caller's setting
    assert exact == {name: w.tolist() for name, w in sampler.backbone.state_dict().items()}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    assert seen == 4 * [(dtype, "high" if precision == "tf32" else "highest")]


def test_an_error_restores_the_precision_of_matrix_products(sampler: Sampler) -> None:
    with pytest.raises(ZeroDivisionError), sampling_precision(sampler.backbone, "tf32"):
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"


def test_images_that_are_not_finite_raise_and_do_not_become_black(sampler: Sampler) -> None:
    broken = dataclasses.replace(sampler, decode=lambda latents: latents[:, :3] * torch.nan)
    with pytest.raises(UserError, match="not finite numbers; lower guidance_scale"):
        list(generate_images(broken, make_batches(range(2), 2), CONFIG))
