"""Blocks and layers against diffusers and torch on shared weights, and rotary positions."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward, JointTransformerBlock
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import AdaLayerNormSingle
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from made_backbone import small_shape
from torch import nn

from ifvit.models.blocks import BlockInputs, build_block
from ifvit.models.layers import Attention, RMSNorm, SwiGLU, rotate, rotation_table
from ifvit.models.weights import build_backbone

WIDTH, HEADS, NUM_TEXT = 32, 2, 6


def randomise(module):
    """Weights of about unit gain, so that every parameter has an effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return module.eval()


def random_tokens(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[-2]))


def shared(ours, theirs, names):
    """Copy weights of our block to theirs; biases that ours lacks are zero.

    `names` maps the start of our names to theirs; a tuple splits a tensor among several.
    """
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    for name, value in ours.state_dict().items():
        prefix = max((one for one in names if name.startswith(one)), key=len)
        targets = names[prefix]
        targets = (targets,) if isinstance(targets, str) else targets
        for target, part in zip(targets, value.chunk(len(targets)), strict=True):
            state[target + name[len(prefix) :]] = part
    theirs.load_state_dict(state)
    return theirs.eval()


def use_exact_gelu(feed_forward):
    feed_forward.net[0].approximate = "none"


STREAM = {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2", "modulation": "norm1"}
SELF_ATTENTION = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": "attn1.to_out.0",
}
DUAL = {
    "image.modulation": "norm1",
    "image.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image.attn.norm_q": "attn.norm_q",
    "image.attn.norm_k": "attn.norm_k",
    "image.attn.proj": "attn.to_out.0",
    "image.mlp.fc1": "ff.net.0.proj",
    "image.mlp.fc2": "ff.net.2",
    "image.norm1": "norm1.norm",
    "image.norm2": "norm2",
    "text.norm1": "norm1_context.norm",
    "text.norm2": "norm2_context",
    "text.modulation": "norm1_context",
    "text.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text.attn.kv": ("attn.add_k_proj", "attn.add_v_proj"),
    "text.attn.norm_q": "attn.norm_added_q",
    "text.attn.norm_k": "attn.norm_added_k",
    "text.attn.proj": "attn.to_add_out",
    "text.mlp.fc1": "ff_context.net.0.proj",
    "text.mlp.fc2": "ff_context.net.2",
}


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("is_last", [False, True])
def test_dual_stream_is_the_joint_block_of_stable_diffusion_3(is_last, qk_norm):
    fusion = "dual_stream image" if is_last else "2*dual_stream"
    config = small_shape(fusion=fusion, modulation="adaln_zero", qk_norm=qk_norm, long_skip=False)
    ours = randomise(build_block(config, 0))
    theirs = JointTransformerBlock(
        WIDTH, HEADS, WIDTH // HEADS, is_last, qk_norm="rms_norm" if qk_norm else None
    )
    for feed_forward in [theirs.ff] + [theirs.ff_context] * (not is_last):
        use_exact_gelu(feed_forward)
    shared(ours, theirs, DUAL)
    if is_last:  # diffusers' last text norm has the scale first
        for parameter in theirs.norm1_context.linear.parameters():
            parameter.data = torch.cat(parameter.data.chunk(2)[::-1])
    tokens, text = random_tokens(3, 17, WIDTH), random_tokens(3, NUM_TEXT, WIDTH)
    vector = random_tokens(3, WIDTH)
    with torch.no_grad():
        image, updated = ours(tokens, BlockInputs(text=text, vector=vector))
        expected_text, expected = theirs(tokens, text, vector)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(updated, text if is_last else expected_text, rtol=0, atol=1e-5)


def test_dual_stream_without_modulation_is_that_block_with_affine_norms():
    ours = randomise(build_block(small_shape(fusion="2*dual_stream", long_skip=False), 0))
    theirs = JointTransformerBlock(WIDTH, HEADS, WIDTH // HEADS)
    theirs.norm1.norm, theirs.norm1_context.norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    theirs.norm2, theirs.norm2_context = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    use_exact_gelu(theirs.ff)
    use_exact_gelu(theirs.ff_context)
    shared(ours, theirs, DUAL)
    for norm in (theirs.norm1, theirs.norm1_context):
        norm.linear.bias.data.view(6, WIDTH)[[2, 5]] = 1.0  # the gates
    tokens, text = random_tokens(3, 17, WIDTH), random_tokens(3, NUM_TEXT, WIDTH)
    with torch.no_grad():
        image, updated = ours(tokens, BlockInputs(text=text))
        expected_text, expected = theirs(tokens, text, torch.zeros(3, WIDTH))
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(updated, expected_text, rtol=0, atol=1e-5)


def pixart_block(**options):
    block = BasicTransformerBlock(
        WIDTH, HEADS, WIDTH // HEADS, activation_fn="gelu", norm_eps=1e-6, **options
    )
    use_exact_gelu(block.ff)
    return block


SEPARATE = {
    **STREAM,
    **SELF_ATTENTION,
    "modulation.table": "scale_shift_table",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.text.kv": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": "attn2.to_out.0",
}


def test_separate_cross_attention_with_shared_modulation_is_the_block_of_pixart():
    config = small_shape(fusion="separate_cross_attention", modulation="shared")
    ours = randomise(build_block(config, 0))
    theirs = pixart_block(
        norm_type="ada_norm_single", norm_elementwise_affine=False, cross_attention_dim=WIDTH
    )
    shared(ours, theirs, SEPARATE)
    tokens, text = random_tokens(3, 17, WIDTH), random_tokens(3, NUM_TEXT, WIDTH)
    single = randomise(AdaLayerNormSingle(WIDTH))
    project = nn.Sequential(nn.SiLU(), single.linear)  # as in `FusionTransformer`
    with torch.no_grad():
        projected, embedded = single(torch.tensor([0, 400, 999]), hidden_dtype=torch.float32)
        inputs = BlockInputs(
            text=text, keys_values=ours.text_keys_values(text), vector=project(embedded)
        )
        image, unchanged = ours(tokens, inputs)
        expected = theirs(tokens, encoder_hidden_states=text, timestep=projected)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert torch.equal(unchanged, text)


def test_separate_cross_attention_starts_without_effect_of_text():
    block = build_backbone(small_shape(fusion="2*separate_cross_attention")).blocks[0]
    tokens, texts = random_tokens(3, 17, WIDTH), random_tokens(2, 3, NUM_TEXT, WIDTH)
    first, second = (
        block(tokens, BlockInputs(text=text, keys_values=block.text_keys_values(text)))[0]
        for text in texts
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("entry", ["image", "adaln"])
def test_a_modulated_block_is_the_adaln_zero_block_of_dit(entry):
    config = small_shape(fusion=f"{entry} concat", modulation="adaln_zero")
    ours = randomise(build_block(config, 0))
    theirs = pixart_block(
        norm_type="ada_norm_zero", norm_elementwise_affine=False, num_embeds_ada_norm=10
    )
    shared(ours, theirs, {**STREAM, **SELF_ATTENTION})
    embed = randomise(theirs.norm1.emb)
    tokens, steps, classes = (
        random_tokens(3, 17, WIDTH),
        torch.tensor([0, 400, 999]),
        torch.arange(3),
    )
    with torch.no_grad():
        vector = embed(steps, classes, hidden_dtype=torch.float32)
        image, _ = ours(tokens, BlockInputs(vector=vector))
        expected = theirs(tokens, timestep=steps, class_labels=classes)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "head_width"), [(4, 16), (16, 64), (3, 72)])
def test_rotary_positions_are_those_of_flux_in_two_axes(side, head_width):
    num_before, num_after = 3, 5
    heads = random_tokens(2, num_before + side**2 + num_after, 4, head_width)
    ids = torch.zeros(heads.shape[1], 2)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    ids[num_before : num_before + side**2] = grid.float()
    angles = FluxPosEmbed(theta=10_000, axes_dim=[head_width // 2, head_width // 2])(ids)
    expected = apply_rotary_emb(heads, angles, sequence_dim=1)
    table = rotation_table(side, num_before, num_after, head_width, heads.device)
    torch.testing.assert_close(rotate(heads, table), expected, rtol=0, atol=1e-5)
    without_text = rotate(heads[:, :-num_after], table)
    torch.testing.assert_close(without_text, expected[:, :-num_after], rtol=0, atol=1e-5)


def test_rotation_keeps_the_type_and_works_in_the_finer_one():
    table = rotation_table(4, 1, 2, 16, torch.device("cpu"))
    heads = random_tokens(2, 19, 2, 16)
    for dtype, tolerance in [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)]:
        rotated = rotate(heads.to(dtype), table)
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated.float(), rotate(heads, table), rtol=0, atol=tolerance)


def test_queries_and_keys_are_normalised_by_head_before_the_rotation():
    config = small_shape(qk_norm=True, rotary=True)
    attention = randomise(Attention(config))
    norms = [nn.RMSNorm(16, eps=1e-6) for _ in range(2)]
    for norm, ours in zip(norms, (attention.norm_q, attention.norm_k), strict=True):
        norm.load_state_dict(ours.state_dict())
    tokens = random_tokens(2, 23, WIDTH)
    table = rotation_table(4, 1, 6, 16, tokens.device)
    query, key, value = attention.project(tokens, table)
    weights = attention.qkv.weight.view(3, HEADS, 16, WIDTH)
    expected = [torch.einsum("blc,hec->blhe", tokens, weight) for weight in weights]
    torch.testing.assert_close(query, rotate(norms[0](expected[0]), table), rtol=0, atol=1e-5)
    torch.testing.assert_close(key, rotate(norms[1](expected[1]), table), rtol=0, atol=1e-5)
    torch.testing.assert_close(value, expected[2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype, affine):
    options = {"eps": 1e-6, "elementwise_affine": affine, "dtype": dtype}
    ours, theirs = randomise(RMSNorm(WIDTH, **options)), nn.RMSNorm(WIDTH, **options)
    theirs.load_state_dict(ours.state_dict())
    tokens = random_tokens(2, 5, WIDTH).to(dtype)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("width", "ratio"), [(32, 4), (96, 4), (24, 1), (512, 3)])
def test_swiglu_is_that_of_diffusers_with_the_weights_of_two_matrices(width, ratio):
    ours = randomise(SwiGLU(width, ratio * width))
    hidden = ours.fc2.in_features
    theirs = FeedForward(width, activation_fn="swiglu", inner_dim=hidden, bias=False)
    shared(ours, theirs, {"fc1": "net.0.proj", "fc2": "net.2"})
    tokens = random_tokens(2, 5, width)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0, atol=1e-5)
    num_weights = sum(parameter.numel() for parameter in ours.parameters())
    assert hidden % 8 == 0
    assert 0 <= 2 * ratio * width**2 - num_weights < 3 * width * 8
