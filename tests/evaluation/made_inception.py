"""A small network with the calling convention of inception-2015-12-05.pt."""

from pathlib import Path

import torch
from torch import Tensor, nn

NUM_FEATURES = 12


class Network(nn.Module):
    """Images (B, 3, 299, 299) in [0, 255] => features (B, 12), or logits without the flag."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Conv2d(3, NUM_FEATURES, 8, stride=8)

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert images.shape[3] == 299
        features = self.layers((images - 128) / 128).relu().mean(dim=(2, 3))
        return features if return_features else features * 0 - 1


def save_inception(folder: Path, seed: int = 0) -> str:
    """A TorchScript file in `folder`."""
    path = folder / "inception.pt"
    torch.jit.script(Network(seed).requires_grad_(False)).save(str(path))
    return str(path)
