import dataclasses
import json

import pytest
import torch
from made_backbone import small_shape

from ifvit.errors import UserError
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights, save_weights
from ifvit.shards.format import EncoderIdentity

INFO = WeightsInfo(
    step=20,
    ema_decay=0.999,
    scaling_factor=0.2301,
    vae=EncoderIdentity(name="scenes/vae", sha256="a" * 64),
    text_encoder=EncoderIdentity(name="scenes/clip", sha256="b" * 64),
    recipe_sha256="cc",
)


@pytest.fixture
def backbone():
    return build_backbone(small_shape(width=8, depth=2, num_image_blocks=0))


@pytest.fixture
def saved(tmp_path, backbone):
    save_weights(str(tmp_path), backbone, INFO)
    return tmp_path


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_weights_and_their_provenance_round_trip(saved, backbone):
    loaded, info = load_weights(str(saved))
    assert info == INFO
    assert not loaded.training
    assert loaded.config == backbone.config
    assert same_weights(loaded, backbone)


def test_saved_weights_are_a_diffusers_model(saved, backbone):
    assert same_weights(FusionUViT.from_pretrained(saved), backbone)


@pytest.fixture
def run(tmp_path, backbone):
    """A run with EMA and raw weights of steps 20 and 100, raw weights of step 3."""
    for step, kind in [(20, "ema"), (20, "raw"), (100, "ema"), (100, "raw"), (3, "raw")]:
        info = dataclasses.replace(INFO, step=step, ema_decay=0.999 if kind == "ema" else None)
        save_weights(str(tmp_path / "weights" / f"step_{step:08d}" / kind), backbone, info)
    return tmp_path


def test_a_run_directory_gives_the_ema_weights_of_its_newest_step(run):
    _, info = load_weights(str(run))
    assert (info.step, info.ema_decay) == (100, 0.999)
    _, info = load_weights(str(run), prefer="raw")
    assert (info.step, info.ema_decay) == (100, None)


def test_a_step_folder_gives_the_weights_of_that_step(run):
    _, info = load_weights(str(run / "weights" / "step_00000003"))
    assert (info.step, info.ema_decay) == (3, None)


def test_a_step_that_is_not_complete_is_skipped(run):
    for kind in ("ema", "raw"):
        (run / "weights" / "step_00000100" / kind / "weights.json").unlink()
    assert load_weights(str(run))[1].step == 20


def test_a_run_without_weights_is_an_error_that_says_to_train_first(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no weights.*train first"):
        load_weights(str(tmp_path))


def test_a_truncated_file_is_one_clear_error(saved):
    path = saved / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{saved}: config.json and diffusion.* do not load"):
        load_weights(str(saved))


@pytest.mark.parametrize(
    "change", [{"width": 16}, {"depth": 3}, {"depth": None}, {"architecture": "unet"}]
)
def test_a_config_of_another_network_is_one_clear_error(saved, change):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{saved}: config.json and diffusion.* do not load"):
        load_weights(str(saved))


def test_a_config_that_lacks_a_key_is_an_error_that_names_it(saved):
    path = saved / "config.json"
    stored = json.loads(path.read_text())
    del stored["depth"]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="depth"):
        load_weights(str(saved))


@pytest.mark.parametrize("text", ['{"step": 1}', "[]", '{"vae": 3, "text_encoder": 4}'])
def test_a_malformed_record_is_one_clear_error(saved, text):
    (saved / "weights.json").write_text(text)
    with pytest.raises(UserError, match=r"weights\.json: not a weights.json of ifvit"):
        load_weights(str(saved))
