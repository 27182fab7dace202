"""Folders of encoders from strangers: a whole model, or one line; no code, no file elsewhere."""

import ast
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ifvit.errors import UserError
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.clip import load_clip
from ifvit.models.pretrained import read_pickled_tensors, resolve_pretrained
from ifvit.models.text_encoders import load_text_encoder

ROOT = Path(__file__).parents[2]
WEIGHTS = {"vae": "diffusion_pytorch_model.safetensors", "clip": "model.safetensors"}
LOADERS: dict[str, Callable[[str], object]] = {"vae": load_autoencoder, "clip": load_text_encoder}


def copy_encoder(kind: str, folder: Path) -> Path:
    shutil.copytree(resolve_pretrained(f"scenes/{kind}"), folder)
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def change(path: Path, key: str, value: object) -> None:
    """Change one key of a JSON file; `text_config.x` is a key of a part."""
    stored = json.loads(path.read_text())
    *parts, last = key.split(".")
    target = stored
    for part in parts:
        target = target[part]
    target[last] = value
    path.write_text(json.dumps(stored))


def assert_one_line(kind: str, folder: Path, words: str = "") -> None:
    with pytest.raises(UserError, match=words) as error:
        LOADERS[kind](str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("vae", "layers_per_block", 10**9),
        ("vae", "layers_per_block", 30),
        ("vae", "block_out_channels", [16] * 10**5),
        ("vae", "block_out_channels", [65536, 65536, 65536, 65536]),
        ("vae", "block_out_channels", [16, 32, 48]),
        ("vae", "norm_num_groups", 7),
        ("vae", "down_block_types", ["../x", "os.system", "a", "b"]),
        ("vae", "act_fn", "os.system"),
        ("vae", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("clip", "text_config.num_hidden_layers", 10**9),
        ("clip", "text_config.num_hidden_layers", 200),
        ("clip", "text_config.hidden_size", 65536),
        ("clip", "text_config.vocab_size", 10**30),
        ("clip", "text_config.vocab_size", 10**7),
        ("clip", "text_config.num_attention_heads", 7),
        ("clip", "text_config.hidden_act", "os.system"),
        ("clip", "quantization_config", {"quant_method": "bitsandbytes"}),
        ("clip", "text_config", [3]),
    ],
)
def test_a_configuration_of_an_impossible_model_is_one_line(
    kind: str, key: str, value: object, tmp_path: Path
) -> None:
    folder = copy_encoder(kind, tmp_path / "encoder")
    change(folder / "config.json", key, value)
    assert_one_line(kind, folder)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b"[" * 5000, b'{"a": ' * 5000])
def test_a_broken_configuration_is_one_line(kind: str, text: bytes, tmp_path: Path) -> None:
    folder = copy_encoder(kind, tmp_path / "encoder")
    (folder / "config.json").write_bytes(text)
    assert_one_line(kind, folder, r"config\.json")


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "pipe", "folder", "lacks one"])
def test_broken_weights_are_one_line(kind: str, damage: str, tmp_path: Path) -> None:
    folder = copy_encoder(kind, tmp_path / "encoder")
    path = folder / WEIGHTS[kind]
    data, tensors = path.read_bytes(), load_file(path)
    path.unlink()
    if damage == "empty":
        path.touch()
    elif damage == "truncated":
        path.write_bytes(data[:-10])
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage == "folder":
        path.mkdir()
    elif damage == "lacks one":
        del tensors[min(name for name in tensors if "text" in name or kind == "vae")]
        tensors["large"] = torch.zeros(10**6)
        save_file(tensors, path)
    assert_one_line(kind, folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "absent.safetensors"])
def test_an_index_of_shards_names_files_of_its_folder_only(shard: str, tmp_path: Path) -> None:
    folder = copy_encoder("clip", tmp_path / "encoder")
    shutil.copy(folder / WEIGHTS["clip"], tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"text_projection.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_line("clip", folder, r"model\.safetensors\.index\.json")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b"[" * 5000])
def test_broken_files_beside_a_clip_are_one_line(name: str, text: bytes, tmp_path: Path) -> None:
    folder = copy_encoder("clip", tmp_path / "encoder")
    (folder / name).write_bytes(text)
    with pytest.raises(UserError) as error:
        load_clip(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_compressed_archive_is_not_unpacked_into_memory(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    assert (tmp_path / "bomb.pth").stat().st_size < 10**5
    with pytest.raises(UserError, match=r"bomb\.pth: a compressed archive"):
        read_pickled_tensors(tmp_path / "bomb.pth")


def test_tensors_that_repeat_one_number_are_not_expanded(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pth")
    with pytest.raises(UserError, match=r"wide\.pth: its tensors are larger than the file"):
        read_pickled_tensors(tmp_path / "wide.pth")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02" + b"(" * 10**5,
        b"\x80\x04\x8d" + b"\xff" * 8,
        b"cos\nsystem\n.",
    ],
)
def test_a_broken_pickle_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(UserError, match=r"x\.pth") as error:
        read_pickled_tensors(tmp_path / "x.pth")
    assert "\n" not in str(error.value)


OWN_CLASSES = {"AutoencoderKL", "autoencoder_class", "scheduler", "super()"}
"""Receivers that cannot run a folder's code: models and schedulers of diffusers take no such
option, and `super()` is the pipeline, whose options are collected in one variable."""


def test_nothing_that_is_loaded_may_bring_code() -> None:
    wrong = []
    for package in ("ifvit", "data_pipeline", "slurm", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                if call.func.attr not in ("from_pretrained", "from_config"):
                    continue
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                value = given.get("trust_remote_code")
                is_off = isinstance(value, ast.Constant) and value.value is False
                if not is_off and ast.unparse(call.func.value) not in OWN_CLASSES:
                    wrong.append(f"{path}:{call.lineno}")
    assert wrong == []


def test_pickles_are_read_without_code() -> None:
    for path in (ROOT / "ifvit").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given["weights_only"] == "True", path
