import dataclasses
import json

import pytest
import torch
from made_backbone import small_shape

from ifvit.errors import UserError
from ifvit.models import weights
from ifvit.models.fusion_transformer import FusionTransformer
from ifvit.models.weights import WeightsInfo, build_backbone, load_weights, save_weights
from ifvit.records import dump_sealed
from ifvit.shards.format import EncoderIdentity, TextEncoderIdentity
from ifvit.storage import sha256_of

INFO = WeightsInfo(
    step=20,
    ema_decay=0.999,
    scaling_factor=0.2301,
    vae=EncoderIdentity(name="scenes/vae", sha256="a" * 64),
    text_encoder=TextEncoderIdentity(name="scenes/clip", sha256="b" * 64),
    recipe_sha256="c" * 64,
)


@pytest.fixture
def backbone():
    return build_backbone(small_shape(width=8, fusion="3*cross_attention"))


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
    assert same_weights(FusionTransformer.from_pretrained(saved), backbone)


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


TENSORS = "diffusion_pytorch_model.safetensors"


def change_stored(folder, **changes):
    """Change weights.json, with a new seal."""
    path = folder / "weights.json"
    path.write_bytes(dump_sealed(json.loads(path.read_text()) | changes))


def change_config(folder, **changes):
    """Change config.json, and its hash in weights.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    change_stored(folder, config_sha256=sha256_of(path))


@pytest.mark.parametrize("name", [TENSORS, "config.json", "weights.json"])
@pytest.mark.parametrize("place", [0.05, 0.5, 0.95])
def test_a_flipped_bit_in_any_file_is_one_line(saved, name, place):
    load_weights(str(saved))  # the hash of the intact file must not be remembered for the damaged
    data = bytearray((saved / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(UserError, match=name) as error:
        load_weights(str(saved))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [TENSORS, "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None, "folder"])
def test_a_broken_or_missing_file_is_one_line(saved, name, content):
    path = saved / name
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((UserError, OSError), match=name) as error:
        load_weights(str(saved))
    assert "\n" not in str(error.value)


def test_a_file_is_hashed_once_per_process(saved, monkeypatch):
    load_weights(str(saved))
    monkeypatch.setattr(weights, "sha256_of", lambda path: pytest.fail(f"{path} hashed again"))
    load_weights(str(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 16}, "the configuration describes"),
        ({"fusion": "3*concat image"}, "the configuration describes"),
        ({"fusion": None}, "fusion"),
        ({"fusion": "999*image"}, "fusion: 999 blocks; give 1 to 256"),
        ({"fusion": "256*image", "num_text_blocks": 0}, "the configuration describes"),
        ({"width": 65536, "num_heads": 1, "mlp_ratio": 256}, "the configuration describes"),
        ({"latent_size": 65536}, "the configuration describes"),
        ({"init_std": float("nan")}, "init_std"),
        ({"architecture": "unet"}, "config.json"),
        ({"architecture": ["os", "system"]}, "architecture"),
        ({"text": json.loads("[" * 200 + "]" * 200)}, "text"),
    ],
)
def test_a_config_of_another_network_is_one_line(saved, change, message):
    change_config(saved, **change)
    with pytest.raises(UserError, match=message) as error:
        load_weights(str(saved))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[" * 5000 + "]" * 5000, '{"width": ' + "9" * 9999 + "}", "[]"])
def test_a_hostile_config_is_one_line(saved, text):
    (saved / "config.json").write_text(text)
    change_stored(saved, config_sha256=sha256_of(saved / "config.json"))
    with pytest.raises(UserError, match=r"config\.json") as error:
        load_weights(str(saved))
    assert "\n" not in str(error.value)


def test_a_config_that_lacks_a_key_is_an_error_that_names_it(saved):
    path = saved / "config.json"
    stored = json.loads(path.read_text())
    del stored["width"]
    path.write_text(json.dumps(stored))
    change_stored(saved, config_sha256=sha256_of(path))
    with pytest.raises(UserError, match="width"):
        load_weights(str(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": -1.0}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"step": -1}, "step"),
        ({"step": "3"}, "step"),
        ({"ema_decay": 2}, "ema_decay"),
        ({"null_context": "ones"}, "null_context"),
        ({"vae": 3}, "vae"),
        ({"recipe_sha256": "../x"}, "recipe_sha256"),
        ({"classes": ["cat"]}, "either a text_encoder or classes"),
        ({"classes": ["cat"], "text_encoder": None}, "names 1 classes"),
    ],
)
def test_an_impossible_provenance_is_one_line(saved, change, message):
    stored = json.loads((saved / "weights.json").read_text())
    change_stored(saved, info=stored["info"] | change)
    with pytest.raises(UserError, match=message) as error:
        load_weights(str(saved))
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"step": 1}', "[]", "", "{", '{"seal": 3}', "[" * 5000])
def test_a_malformed_record_is_one_line(saved, text):
    (saved / "weights.json").write_text(text)
    with pytest.raises(UserError, match=r"weights\.json: ") as error:
        load_weights(str(saved))
    assert "\n" not in str(error.value)
