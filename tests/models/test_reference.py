import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from uvit_oracle import Layout, Oracle, fork_layout, random_weights, uvit_layout

from ifvit.errors import UserError
from ifvit.models import from_published_state_dict

TIMESTEPS = (0, 412)
SETTINGS = [(0, 0), (2, 1), (0, 1), (2, 0), (3, 2), (1, 3)]


def tensors(weights):
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}


@contextlib.contextmanager
def quiet_about_fixed_queries() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the fork's cross-attention code")
        yield


def assert_predicts_like_the_oracle(layout: Layout, *, size=8, width=16, context=(5, 12), heads=2):
    weights = random_weights(
        layout, width=width, patch=2, num_patches=(size // 2) ** 2, context=context
    )
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((len(TIMESTEPS), 4, size, size))
    captions = rng.standard_normal((len(TIMESTEPS), *context))
    given = {} if heads is None else {"num_heads": heads, "context_length": context[0]}
    backbone = from_published_state_dict(tensors(weights), **given)
    oracle = Oracle(weights, layout, heads or width // 64)

    assert not backbone.training
    with torch.no_grad():
        predicted = backbone(
            torch.tensor(latents, dtype=torch.float32),
            torch.tensor(TIMESTEPS),
            torch.tensor(captions, dtype=torch.float32),
        )
    # Both code bases count timesteps from 1.
    expected = [
        oracle.predict(latents[i], TIMESTEPS[i] + 1, captions[i]) for i in range(len(TIMESTEPS))
    ]
    np.testing.assert_allclose(predicted.numpy(), np.stack(expected), atol=1e-4)
    return backbone


@pytest.mark.parametrize("depth", [2, 6])
def test_uvit_weights_predict_what_the_oracle_predicts(depth):
    assert_predicts_like_the_oracle(uvit_layout("concat", depth, 0, 0))


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
@pytest.mark.parametrize(("num_image", "num_text"), SETTINGS)
def test_fork_weights_predict_what_the_oracle_predicts(conditioning, num_image, num_text):
    with quiet_about_fixed_queries():
        backbone = assert_predicts_like_the_oracle(
            fork_layout(conditioning, 6, num_image, num_text)
        )
    assert backbone.config.conditioning == conditioning
    assert backbone.config.num_image_blocks == num_image
    assert backbone.config.num_text_blocks == num_text


@pytest.mark.parametrize(
    "layout", [uvit_layout("concat", 2, 0, 0), fork_layout("cross_attention", 4, 1, 1)]
)
def test_heads_and_context_length_of_the_paper_need_not_be_given(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = assert_predicts_like_the_oracle(
            layout, size=32, width=64, context=(77, 24), heads=None
        )
    assert backbone.config.latent_size == 32
    assert backbone.config.context_length == 77
    assert backbone.config.num_heads == 1


@pytest.mark.parametrize("length", [8, 9])  # with 9 all tokens together are a square, too
def test_other_context_lengths_leave_the_largest_square_of_image_tokens(length):
    layout = uvit_layout("concat", 2, 0, 0)
    weights = random_weights(layout, width=64, patch=2, num_patches=16, context=(length, 12))
    assert from_published_state_dict(tensors(weights)).config.context_length == length


def test_shapes_show_the_width_of_the_mlp():
    weights = small_uvit()
    for name in [name for name in weights if ".mlp.fc1." in name]:
        weights[name] = weights[name][:128]
    for name in [name for name in weights if name.endswith(".mlp.fc2.weight")]:
        weights[name] = weights[name][:, :128]
    assert from_published_state_dict(weights).config.mlp_ratio == 2


def test_the_forks_fixed_number_of_queries_is_not_passed_over_in_silence():
    layout = fork_layout("cross_attention", 4, 1, 1)
    weights = random_weights(layout, width=64, patch=2, num_patches=16, context=(8, 12))
    with pytest.warns(UserWarning, match="257 queries"):
        from_published_state_dict(tensors(weights))


def small_uvit():
    layout = uvit_layout("concat", 4, 0, 0)
    return tensors(random_weights(layout, width=64, patch=2, num_patches=16, context=(8, 12)))


def test_loading_copies_and_leaves_the_given_tensors_alone():
    weights = small_uvit()
    backbone = from_published_state_dict(weights)
    before = weights["norm.weight"].clone()
    with torch.no_grad():
        backbone.norm.weight.zero_()
    assert torch.equal(weights["norm.weight"], before)


def test_foreign_weights_are_refused_by_their_first_keys():
    with pytest.raises(
        UserError, match=r"unexpected encoder\.0, encoder\.1, encoder\.2, encoder\.3 and 2"
    ):
        from_published_state_dict({f"encoder.{i}": torch.zeros(1) for i in range(6)})


def test_nothing_at_all_is_refused():
    with pytest.raises(UserError, match="missing pos_embed"):
        from_published_state_dict({})


def test_class_conditional_weights_are_refused_by_the_key_that_differs():
    weights = small_uvit()
    weights["label_emb.weight"] = weights.pop("context_embed.weight")
    with pytest.raises(UserError, match=r"unexpected label_emb\.weight; missing context_embed"):
        from_published_state_dict(weights)


def test_a_key_too_many_and_one_too_few_are_both_named():
    weights = small_uvit()
    weights["time_embed.0.weight"] = torch.zeros(1)
    del weights["in_blocks.1.norm1.weight"]
    message = r"unexpected time_embed\.0\.weight; missing in_blocks\.1\.norm1\.weight"
    with pytest.raises(UserError, match=message):
        from_published_state_dict(weights)


def test_a_key_too_many_alone_is_named():
    weights = small_uvit() | {"time_embed.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"keys: unexpected time_embed\.0\.weight$"):
        from_published_state_dict(weights)


def test_a_tensor_of_another_shape_is_named():
    weights = small_uvit() | {"norm.weight": torch.zeros(65)}
    with pytest.raises(UserError, match=r"norm\.weight has shape \(65,\)"):
        from_published_state_dict(weights)


def test_a_tensor_of_another_rank_is_named():
    weights = small_uvit() | {"pos_embed": torch.zeros(25, 64)}
    with pytest.raises(UserError, match="pos_embed has 2 dimensions, not 3"):
        from_published_state_dict(weights)


def test_a_width_that_hides_the_number_of_heads_asks_for_it():
    layout = uvit_layout("concat", 2, 0, 0)
    weights = random_weights(layout, width=16, patch=2, num_patches=16, context=(8, 12))
    with pytest.raises(UserError, match="num_heads"):
        from_published_state_dict(tensors(weights))
