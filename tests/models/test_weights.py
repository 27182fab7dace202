import dataclasses
import json

import pytest
import torch
from made_backbone import small_shape

from ifvit.errors import UserError
from ifvit.models.fusion_transformer import FusionUViT
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights, save_weights
from ifvit.shards import EncoderIdentity

INFO = WeightsInfo(
    step=20,
    ema_decay=0.999,
    scaling_factor=0.2301,
    vae=EncoderIdentity(name="scenes/vae", sha256="aa"),
    text_encoder=EncoderIdentity(name="scenes/clip", sha256="bb"),
    recipe_sha256="cc",
)


@pytest.fixture
def backbone():
    return build_backbone(small_shape(width=8, depth=2, num_image_blocks=0))


def same_weights(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_weights_and_their_provenance_round_trip(tmp_path, backbone):
    save_weights(str(tmp_path), backbone, INFO)
    loaded, info = load_weights(str(tmp_path))
    assert info == INFO
    assert not loaded.training
    assert loaded.config == backbone.config
    assert same_weights(loaded, backbone)


def test_saved_weights_are_a_diffusers_model(tmp_path, backbone):
    save_weights(str(tmp_path), backbone, INFO)
    assert same_weights(FusionUViT.from_pretrained(tmp_path), backbone)


def save_step(run, backbone, step, kind):
    decay = 0.999 if kind == "ema" else None
    info = dataclasses.replace(INFO, step=step, ema_decay=decay)
    save_weights(str(run / "weights" / f"step_{step:08d}" / kind), backbone, info)


def test_a_run_directory_gives_its_newest_step_and_averaged_weights(tmp_path, backbone):
    for step in (20, 100, 3):
        save_step(tmp_path, backbone, step, "ema")
        save_step(tmp_path, backbone, step, "raw")
    _, info = load_weights(str(tmp_path))
    assert (info.step, info.ema_decay) == (100, 0.999)
    _, info = load_weights(str(tmp_path), prefer="raw")
    assert (info.step, info.ema_decay) == (100, None)


def test_a_step_folder_gives_that_step_and_what_it_has(tmp_path, backbone):
    save_step(tmp_path, backbone, 3, "raw")
    save_step(tmp_path, backbone, 20, "ema")
    _, info = load_weights(str(tmp_path / "weights" / "step_00000003"))
    assert (info.step, info.ema_decay) == (3, None)


def test_a_step_that_was_not_finished_is_passed_over(tmp_path, backbone):
    save_step(tmp_path, backbone, 3, "ema")
    save_step(tmp_path, backbone, 20, "ema")
    (tmp_path / "weights" / "step_00000020" / "ema" / "weights.json").unlink()
    assert load_weights(str(tmp_path))[1].step == 3


def test_a_run_without_weights_says_to_train_first(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no weights.*train first"):
        load_weights(str(tmp_path))


def test_a_truncated_file_is_one_clear_error(tmp_path, backbone):
    save_weights(str(tmp_path), backbone, INFO)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{tmp_path}: config.json and diffusion.* do not load"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize("change", [{"width": 16}, {"depth": 3}, {"depth": None}])
def test_a_config_of_another_network_is_one_clear_error(tmp_path, backbone, change):
    save_weights(str(tmp_path), backbone, INFO)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"{tmp_path}: config.json and diffusion.* do not load"):
        load_weights(str(tmp_path))


def test_a_config_that_lacks_a_key_names_it(tmp_path, backbone):
    save_weights(str(tmp_path), backbone, INFO)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    del stored["depth"]
    path.write_text(json.dumps(stored))
    with pytest.raises(UserError, match="depth"):
        load_weights(str(tmp_path))


@pytest.mark.parametrize("text", ['{"step": 1}', "[]", '{"vae": 3, "text_encoder": 4}'])
def test_a_malformed_record_is_one_clear_error(tmp_path, backbone, text):
    save_weights(str(tmp_path), backbone, INFO)
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(UserError, match=r"weights\.json: not a weights.json"):
        load_weights(str(tmp_path))
