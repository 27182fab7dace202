"""How far two images are apart to a network's eye: LPIPS (Zhang et al. 2018) on CLIP's features.

LPIPS proper needs AlexNet or VGG with learned channel weights; this has its form with all weights
1 and the layers of a CLIP image tower, which every evaluation has at hand. Its values compare with
each other and not with published LPIPS.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ifvit.images import Pixels, to_model_range

LayerFeatures = Callable[[Tensor], Sequence[Tensor]]
"""Images (B, 3, H, W) in [-1, 1] => features (B, tokens, channels) of each layer."""


@torch.no_grad()
def perceptual_distances(
    layers_of: LayerFeatures, pairs: Iterable[tuple[Pixels, Pixels]], device: str
) -> NDArray[np.float64]:
    """Distances (N,) in [0, 4] of pairs of batches uint8 (B, H, W, 3), 0 for equal images.

    Features are brought to unit length over channels, their squared differences summed over
    channels and averaged over tokens and layers.
    """
    return np.concatenate([_distances(layers_of, *pair, device) for pair in pairs])


def _distances(
    layers_of: LayerFeatures, first: Pixels, second: Pixels, device: str
) -> NDArray[np.float64]:
    layers = [layers_of(to_model_range(pixels, device)) for pixels in (first, second)]
    per_layer = [
        (functional.normalize(one, dim=2) - functional.normalize(other, dim=2))
        .square()
        .sum(dim=2)
        .mean(dim=1)
        for one, other in zip(*layers, strict=True)
    ]
    distances: NDArray[np.float64] = torch.stack(per_layer).mean(dim=0).double().cpu().numpy()
    return distances
