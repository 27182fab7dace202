"""Encoders in local folders: found from other directories, and named anew when they move."""

import shutil
from pathlib import Path

import pytest
from untrained import save_untrained

from ifvit.errors import UserError
from ifvit.models.autoencoders import load_autoencoder
from ifvit.models.pretrained import resolve_pretrained
from ifvit.sampling.config import ExportConfig, GenerateConfig
from ifvit.sampling.export import export
from ifvit.sampling.generate import generate


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Encoders `a/vae` and `a/clip`, named so from this directory, and weights trained on them."""
    monkeypatch.chdir(tmp_path)
    for kind in ("vae", "clip"):
        shutil.copytree(resolve_pretrained(f"scenes/{kind}"), f"a/{kind}")
    save_untrained(tmp_path / "weights", "a/vae", "a/clip")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    return tmp_path


def config(folder: Path, **changes: object) -> GenerateConfig:
    given = {"weights": str(folder / "weights"), "prompt": "a red circle", "num_steps": 2}
    return GenerateConfig(**{**given, "output": str(folder / "out"), "device": "cpu", **changes})


def test_a_relative_folder_is_found_from_another_directory(moved: Path) -> None:
    generate(config(moved))
    export(ExportConfig(weights=str(moved / "weights"), output="pipeline"))


@pytest.mark.parametrize("flag", ["vae", "text_encoder"])
def test_an_encoder_that_moved_is_named_by_a_flag(moved: Path, flag: str) -> None:
    old, new = moved / "a" / {"vae": "vae", "text_encoder": "clip"}[flag], moved / "b"
    old.rename(new)
    with pytest.raises(UserError, match=rf"^{old}: no such folder; .*--{flag}$"):
        generate(config(moved))
    generate(config(moved, **{flag: "../b"}))
    export(ExportConfig(weights=str(moved / "weights"), output="pipeline", **{flag: "../b"}))


def test_another_encoder_is_refused(moved: Path) -> None:
    other = load_autoencoder("../a/vae").vae
    next(other.parameters()).data += 1
    other.save_pretrained(moved / "other")
    with pytest.raises(UserError, match=rf"^vae {moved}/other has sha256 .*; use that"):
        generate(config(moved, vae="../other"))
