"""A narrow Inception v3 as safetensors, and a file with the calling convention of TorchScript's."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NUM_FEATURES = 64
_NARROWING = 32

# Name, output channels, kernel of the convolutions of a branch: name:channels:kernel.
_A = "1x1:64:1", "5x5_1:48:1 5x5_2:64:5", "3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3", "_pool:64:1"
_B = "3x3:384:3", "3x3dbl_1:64:1 3x3dbl_2:96:3 3x3dbl_3:96:3", ""
_C = (
    "1x1:192:1",
    "7x7_1:128:1 7x7_2:128:1x7 7x7_3:192:7x1",
    "7x7dbl_1:128:1 7x7dbl_2:128:7x1 7x7dbl_3:128:1x7 7x7dbl_4:128:7x1 7x7dbl_5:192:1x7",
    "_pool:192:1",
)
_D = (
    "3x3_1:192:1 3x3_2:320:3",
    "7x7x3_1:192:1 7x7x3_2:192:1x7 7x7x3_3:192:7x1 7x7x3_4:192:3",
    "",
)
_E = (
    "1x1:320:1",
    "3x3_1:384:1 3x3_2a:384:1x3+3x3_2b:384:3x1",
    "3x3dbl_1:448:1 3x3dbl_2:384:3 3x3dbl_3a:384:1x3+3x3dbl_3b:384:3x1",
    "_pool:192:1",
)
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    **dict.fromkeys(("Mixed_7b", "Mixed_7c"), _E),
}
_STEM = "1a_3x3:32:3 2a_3x3:32:3 2b_3x3:64:3 3b_1x1:80:1 4a_3x3:192:3"


def inception_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors with the names of pytorch-fid's file, a 32nd as wide."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, step: str, width: int) -> int:
        """Add one convolution for inputs of this width; return the width of its output."""
        name, channels, kernel = step.split(":")
        size = [int(side) for side in (kernel * 2 if "x" not in kernel else kernel) if side != "x"]
        count = int(channels) // _NARROWING
        weight = torch.randn(count, width, *size, generator=generator)
        tensors[f"{prefix}{name}.conv.weight"] = weight * (2 / weight[0].numel()) ** 0.5
        for part in ("weight", "running_var"):
            tensors[f"{prefix}{name}.bn.{part}"] = 0.5 + torch.rand(count, generator=generator)
        for part in ("bias", "running_mean"):
            tensors[f"{prefix}{name}.bn.{part}"] = 0.1 * torch.randn(count, generator=generator)
        return count

    width = 3
    for step in _STEM.split():
        width = add("Conv2d_", step, width)
    for block, branches in _BLOCKS.items():
        total = 0
        for branch in branches:
            inside = width
            for steps in branch.split():
                inside = sum([add(f"{block}.branch", step, inside) for step in steps.split("+")])
            total += inside
        width = total
    return tensors


def save_inception(folder: Path, seed: int = 0) -> str:
    """A safetensors file in `folder`."""
    path = folder / "inception.safetensors"
    save_file(inception_tensors(seed), path)
    return str(path)


class Script(nn.Module):
    """Images (B, 3, 299, 299) in [0, 255] => features (B, 12), or logits without the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Conv2d(3, 12, 8, stride=8)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.shape[3] == 299
        features = self.layers((images - 128) / 128).relu().mean(dim=(2, 3))
        return features if return_features else features * 0 - 1


def save_script(folder: Path) -> str:
    """A TorchScript file in `folder`."""
    path = folder / "inception.pt"
    torch.jit.script(Script().requires_grad_(False)).save(str(path))
    return str(path)
