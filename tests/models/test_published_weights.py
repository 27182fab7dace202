"""Weights of other code bases predict what an oracle predicts, and become a run that generates."""

import json
import pickle
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from uvit_oracle import Layout, Oracle, fork_layout, random_weights, uvit_layout

from ifvit.cli import main
from ifvit.errors import UserError
from ifvit.models import from_published_state_dict
from ifvit.models.config import ImportConfig, symmetric_fusion
from ifvit.models.published_weights import import_weights
from ifvit.models.weights import find_weights, load_weights

TIMESTEPS = (0, 412)
FUSIONS = [(0, 0), (2, 1), (0, 1), (2, 0), (3, 2), (1, 3)]
UVIT = uvit_layout(4)


def published(layout, *, width=64, context=(8, 12), patches=16, scale=1.0):
    weights = random_weights(layout, width=width, patch=2, num_patches=patches, context=context)
    return {name: scale * torch.tensor(value).float() for name, value in weights.items()}


def assert_predicts_like_the_oracle(layout: Layout, *, size=8, width=16, context=(5, 12), heads=2):
    weights = random_weights(
        layout, width=width, patch=2, num_patches=(size // 2) ** 2, context=context
    )
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((len(TIMESTEPS), 4, size, size))
    captions = rng.standard_normal((len(TIMESTEPS), *context))
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    given = {} if heads is None else {"num_heads": heads, "context_length": context[0]}
    backbone = from_published_state_dict(tensors, **given)
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
    return backbone.config


@pytest.mark.parametrize("depth", [2, 6])
def test_uvit_weights_predict_what_the_oracle_predicts(depth):
    assert_predicts_like_the_oracle(uvit_layout(depth))


@pytest.mark.parametrize("conditioning", ["concat", "cross_attention"])
@pytest.mark.parametrize(("num_image", "num_text"), FUSIONS)
@pytest.mark.filterwarnings("ignore:the fork's cross-attention code")
def test_fork_weights_predict_what_the_oracle_predicts(conditioning, num_image, num_text):
    config = assert_predicts_like_the_oracle(fork_layout(conditioning, 6, num_image, num_text))
    assert config.fusion == symmetric_fusion(conditioning, 7, num_image)
    assert config.num_text_blocks == num_text


@pytest.mark.parametrize("layout", [uvit_layout(2), fork_layout("cross_attention", 4, 1, 1)])
def test_heads_and_context_length_of_the_paper_need_not_be_given(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = assert_predicts_like_the_oracle(
            layout, size=32, width=64, context=(77, 24), heads=None
        )
    assert (config.latent_size, config.context_length, config.num_heads) == (32, 77, 1)


@pytest.mark.parametrize("length", [8, 9])  # with 9, all tokens together are a square as well
def test_other_context_lengths_leave_the_largest_square_of_image_tokens(length):
    weights = published(UVIT, context=(length, 12))
    assert from_published_state_dict(weights).config.context_length == length


def test_shapes_show_the_width_of_the_mlp():
    weights = published(UVIT)
    for name in weights:
        if ".mlp.fc1." in name:
            weights[name] = weights[name][:128]
        if name.endswith(".mlp.fc2.weight"):
            weights[name] = weights[name][:, :128]
    assert from_published_state_dict(weights).config.mlp_ratio == 2


def test_a_warning_tells_that_the_forks_number_of_queries_is_fixed():
    with pytest.warns(UserWarning, match="257 queries"):
        from_published_state_dict(published(fork_layout("cross_attention", 4, 1, 1)))


def test_loading_copies_the_given_tensors():
    weights = published(UVIT)
    backbone = from_published_state_dict(weights)
    before = weights["norm.weight"].clone()
    with torch.no_grad():
        backbone.head_norm.weight.zero_()
    assert torch.equal(weights["norm.weight"], before)


def foreign():
    return {f"encoder.{i}": torch.zeros(1) for i in range(6)}


def without(*keys):
    return {name: value for name, value in published(UVIT).items() if name not in keys}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, r"unexpected encoder\.0, encoder\.1, encoder\.2, encoder\.3 and 2"),
        (dict, "missing pos_embed"),
        (
            lambda: {**without("context_embed.weight"), "label_emb.weight": torch.zeros(3, 64)},
            r"unexpected label_emb\.weight; missing context_embed",
        ),
        (
            lambda: {**without("in_blocks.1.norm1.weight"), "time_embed.0.weight": torch.zeros(1)},
            r"unexpected time_embed\.0\.weight; missing in_blocks\.1\.norm1\.weight",
        ),
        (
            lambda: {**without(), "time_embed.0.weight": torch.zeros(1)},
            r"keys: unexpected time_embed\.0\.weight$",
        ),
        (
            lambda: {**without(), "norm.weight": torch.zeros(65)},
            r"norm\.weight has shape \(65,\)",
        ),
        (
            lambda: {**without(), "pos_embed": torch.zeros(25, 64)},
            "pos_embed has 2 dimensions, not 3",
        ),
        (lambda: published(UVIT, width=16), "num_heads"),
    ],
)
def test_other_weights_are_one_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        from_published_state_dict(make())


@pytest.mark.parametrize("name", ["uvit.pth", "fork.safetensors"])
def test_a_published_file_becomes_a_run_that_generates(name: str, tmp_path: Path) -> None:
    layout = UVIT if name == "uvit.pth" else fork_layout("concat", 6, 2, 1)
    tensors = published(layout, context=(16, 64), scale=0.1)  # fits the encoders of scenes
    (torch.save if name.endswith(".pth") else save_file)(tensors, tmp_path / name)
    run = str(tmp_path / "run")
    encoders = ["--vae", "scenes/vae", "--text_encoder", "scenes/clip", "--scaling_factor", "0.5"]
    main(["import", str(tmp_path / name), run, *encoders])
    backbone, info = load_weights(run)
    assert (info.step, info.ema_decay, info.scaling_factor) == (1_000_000, 0.9999, 0.5)
    expected = from_published_state_dict(tensors, context_length=16)
    assert backbone.config == expected.config
    assert info.null_context == ("empty_caption" if name == "uvit.pth" else "zeros")
    assert backbone.config.timestep_offset == 1  # both code bases count timesteps from 1
    for key, tensor in expected.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], tensor), key
    samples = str(tmp_path / "samples")
    main(["generate", "--weights", run, "--prompt", "x", "--num_steps", "2", "--output", samples])
    assert Path(samples, "00000.png").is_file()


def test_one_run_cannot_hold_two_imports_of_one_file(tmp_path: Path) -> None:
    save_file(published(UVIT, context=(16, 64)), tmp_path / "uvit.safetensors")
    config = ImportConfig(
        file=str(tmp_path / "uvit.safetensors"),
        run=str(tmp_path / "run"),
        vae="scenes/vae",
        text_encoder="scenes/clip",
    )
    import_weights(config)
    import_weights(config)
    with pytest.raises(UserError, match=r"/ema: holds weights of another import; choose another"):
        import_weights(replace(config, null_context="zeros"))


@pytest.mark.parametrize("layout", [UVIT, fork_layout("concat", 4, 1, 1)], ids=["uvit", "fork"])
@pytest.mark.parametrize("null_context", ["empty_caption", "zeros"])
def test_a_flag_overrides_the_null_context_that_the_names_suggest(
    layout: Layout, null_context: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = str(tmp_path / "weights.pth"), str(tmp_path / "run")
    torch.save(published(layout, context=(16, 64)), path)
    encoders = ["--vae", "scenes/vae", "--text_encoder", "scenes/clip"]
    main(["import", path, run, *encoders, "--null_context", null_context])
    stored = json.loads(Path(find_weights(run), "weights.json").read_text())
    assert stored["info"]["null_context"] == null_context
    assert capsys.readouterr().out.endswith(f", null context {null_context}\n")


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run by a pickle",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Code(), protocol=2), "cannot be read as tensors"),
        (b"not a file of tensors", "cannot be read as tensors"),
        (b"", "cannot be read as tensors"),
        ({"nnet": {}, "step": 3}, "not a state dict; save nnet_ema"),
        ({"encoder.weight": torch.zeros(1)}, "not weights of U-ViT or of its fusion fork"),
    ],
)
def test_other_files_are_one_clear_error(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    config = ImportConfig(
        file=str(path), run=str(tmp_path / "run"), vae="scenes/vae", text_encoder="scenes/clip"
    )
    with pytest.raises(UserError, match=message) as error:
        import_weights(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert "run by a pickle" not in capsys.readouterr().out
