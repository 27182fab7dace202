"""The Inception network of FID and KID, as the TorchScript file of StyleGAN2 and clean-fid."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ifvit import storage
from ifvit.errors import UserError
from ifvit.shards import EncoderIdentity

ORIGINAL = "inception-2015-12-05"
"""Name of TensorFlow's network of FID's authors, converted by NVIDIA."""
_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{ORIGINAL}.pt"
_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
_INPUT_SIZE = 299


class Inception:
    """Images => features of the last pooling, (B, 2048) for the original network."""

    def __init__(self, network: torch.jit.ScriptModule, identity: EncoderIdentity) -> None:
        self._network = network
        self.identity = identity

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] => (B, F).

        Resized as pytorch-fid does it: bilinear, without antialiasing, before any rounding.
        """
        size = (_INPUT_SIZE, _INPUT_SIZE)
        resized = functional.interpolate(images, size, mode="bilinear", align_corners=False)
        features: Tensor = self._network((resized + 1.0) * 127.5, return_features=True)
        return features


def load_inception(name: str, device: str = "cpu") -> Inception:
    """Open a TorchScript file, or `inception-2015-12-05`, which is downloaded once and checked.

    It is called with images (B, 3, 299, 299) in [0, 255] and `return_features=True`.
    Raises UserError for a file that is none or cannot be fetched.
    """
    path = _find(name)
    try:
        network = torch.jit.load(str(path), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"inception {name}: not a TorchScript file ({reason})") from None
    digest = storage.sha256_of(path)
    if name == ORIGINAL and digest != _SHA256:
        raise UserError(f"{path}: damaged, its sha256 is not {_SHA256}; delete it")
    return Inception(network, EncoderIdentity(name=name, sha256=digest))


def _find(name: str) -> Path:
    if name != ORIGINAL:
        if not Path(name).is_file():
            raise UserError(f"inception {name}: no such file; name one or use {ORIGINAL}")
        return Path(name)
    path = Path(torch.hub.get_dir(), "checkpoints", f"{ORIGINAL}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(_URL, str(path), hash_prefix=_SHA256)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"inception {name}: cannot be downloaded ({error}); fetch {_URL} to {path}"
            ) from None
    return path
