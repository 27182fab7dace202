"""Weights of other code bases become a run that draws."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from uvit_oracle import fork_layout, random_weights, uvit_layout

from ifvit.cli import main
from ifvit.errors import UserError
from ifvit.models import from_published_state_dict
from ifvit.models.config import ImportConfig
from ifvit.models.published_weights import import_weights
from ifvit.models.weights import load_weights

LAYOUTS = {
    "uvit.pth": uvit_layout("concat", 2, 0, 0),
    "fork.safetensors": fork_layout("concat", 6, 2, 1),
}


def write(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Random weights that fit the shipped encoders of 64 x 64 scenes."""
    weights = random_weights(LAYOUTS[name], width=64, patch=2, num_patches=16, context=(16, 64))
    tensors = {key: 0.1 * torch.tensor(value).float() for key, value in weights.items()}
    if name.endswith(".pth"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_file_becomes_a_run_that_draws(name: str, tmp_path: Path) -> None:
    tensors = write(tmp_path, name)
    run = str(tmp_path / "run")
    encoders = ["--vae", "scenes/vae", "--text_encoder", "scenes/clip", "--scaling_factor", "0.5"]
    main(["import", str(tmp_path / name), run, *encoders])
    backbone, info = load_weights(run)
    assert (info.step, info.ema_decay, info.scaling_factor) == (1_000_000, 0.9999, 0.5)
    expected = from_published_state_dict(tensors, context_length=16)
    assert backbone.config == expected.config
    assert backbone.config.timestep_offset == 1  # both code bases count timesteps from 1
    for key, tensor in expected.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], tensor), key
    drawn = str(tmp_path / "samples")
    main(["generate", "--weights", run, "--prompt", "x", "--num_steps", "2", "--output", drawn])
    assert Path(drawn, "00000.png").is_file()


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
    ids=["code", "text", "nothing", "no tensors", "another network"],
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
