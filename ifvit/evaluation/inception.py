"""The Inception network of FID, built from its tensors alone.

`features` loads it from safetensors, a format that holds no code. Names of tensors are those of
pytorch-fid's file `pt_inception-2015-12-05-6726825d.pth` and of torchvision's Inception v3. Widths
are those of the tensors. Shapes: B batch, H, W image, C channels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from ifvit.errors import UserError

IMAGE_SIZE = 299
_EPSILON = 1e-3
"""Constant that batch normalisation adds to the variance."""

# A block is a row of branches whose outputs are concatenated. A branch is a row of steps: names of
# convolutions (`+`: two of them side by side, `/2`: stride 2 without padding) and poolings.
_A = ("1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3", "average _pool")
_B = ("3x3/2", "3x3dbl_1 3x3dbl_2 3x3dbl_3/2", "max/2")
_C = (
    "1x1",
    "7x7_1 7x7_2 7x7_3",
    "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5",
    "average _pool",
)
_D = ("3x3_1 3x3_2/2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/2", "max/2")
_E = ("1x1", "3x3_1 3x3_2a+3x3_2b", "3x3dbl_1 3x3dbl_2 3x3dbl_3a+3x3dbl_3b")
_BLOCKS = {
    **dict.fromkeys(("Mixed_5b", "Mixed_5c", "Mixed_5d"), _A),
    "Mixed_6a": _B,
    **dict.fromkeys(("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"), _C),
    "Mixed_7a": _D,
    "Mixed_7b": (*_E, "average _pool"),
    "Mixed_7c": (*_E, "max _pool"),  # as in the network of FID, unlike torchvision's
}


class Inception:
    """Inception v3 up to its last average pooling."""

    def __init__(self, tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        """Raises UserError unless `tensors` are those of the network."""
        self._tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}
        try:
            self(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta"))
        except KeyError as error:
            raise UserError(f"no tensor {error.args[0]}") from None
        except (RuntimeError, IndexError) as error:
            raise UserError(f"its tensors do not fit ({str(error).splitlines()[0]})") from None
        self._tensors = {name: tensor.float().to(device) for name, tensor in tensors.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, 299, 299) in [0, 255] => features (B, C)."""
        x = self._convolve("Conv2d_1a_3x3", (images - 128) / 128, stride=2)
        x = self._convolve("Conv2d_2a_3x3", x, is_padded=False)
        x = self._convolve("Conv2d_2b_3x3", x)
        x = functional.max_pool2d(x, 3, stride=2)
        x = self._convolve("Conv2d_3b_1x1", x)
        x = self._convolve("Conv2d_4a_3x3", x, is_padded=False)
        x = functional.max_pool2d(x, 3, stride=2)
        for name, branches in _BLOCKS.items():
            x = torch.cat([self._follow(f"{name}.branch", branch, x) for branch in branches], dim=1)
        return x.mean(dim=(2, 3))

    def _follow(self, prefix: str, branch: str, x: Tensor) -> Tensor:
        for step in branch.split():
            if step == "average":
                x = functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            elif step == "max":
                x = functional.max_pool2d(x, 3, stride=1, padding=1)
            elif step == "max/2":
                x = functional.max_pool2d(x, 3, stride=2)
            elif step.endswith("/2"):
                x = self._convolve(prefix + step.removesuffix("/2"), x, stride=2)
            else:
                x = torch.cat([self._convolve(prefix + name, x) for name in step.split("+")], dim=1)
        return x

    def _convolve(
        self, name: str, x: Tensor, *, stride: int = 1, is_padded: bool | None = None
    ) -> Tensor:
        """Convolution without bias, batch norm and ReLU; padding keeps the size at stride 1."""
        weight = self._tensors[f"{name}.conv.weight"]
        is_padded = stride == 1 if is_padded is None else is_padded
        padding = (weight.shape[2] // 2, weight.shape[3] // 2) if is_padded else (0, 0)
        mean, variance, scale, shift = (
            self._tensors[f"{name}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = functional.conv2d(x, weight, stride=stride, padding=padding)
        return functional.batch_norm(x, mean, variance, scale, shift, eps=_EPSILON).relu()
