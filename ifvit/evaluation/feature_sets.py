"""What is kept of the features of many images: moments of all, a random part as they are.

N images, F feature width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ifvit.errors import UserError
from ifvit.evaluation.frechet import (
    FeatureNetwork,
    Features,
    FeatureStatistics,
    RunningStatistics,
)
from ifvit.images import Pixels, to_model_range
from ifvit.side_channel import SideChannel

Positions = NDArray[np.int64]
Item = TypeVar("Item")

_SEED = 0


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Moments of all features, and `part` (n, F) float32 of them."""

    statistics: FeatureStatistics
    part: Features


def random_part(total: int, limit: int) -> Positions:
    """At most `limit` of the positions 0 ... total - 1, in random order, always the same."""
    return np.random.default_rng(_SEED).permutation(total)[:limit]


@torch.no_grad()
def collect_features(
    networks: Mapping[str, FeatureNetwork],
    batches: Iterable[Pixels],
    positions: Sequence[int],
    parts: Mapping[str, Positions],
    device: str,
    channel: SideChannel,
) -> dict[str, FeatureSet]:
    """Features by every network of the images of all processes, on all of them.

    `batches` uint8 (B, H, W, 3) are this process's images, `positions` where they stand among all.
    Of network `name` the features of the positions `parts[name]` are kept, in that order.
    Raises UserError for features that are not finite, which make every number meaningless.
    """
    collectors = {name: _Collector(parts[name]) for name in networks}
    start = 0
    for pixels in batches:
        images = to_model_range(pixels, device)
        for name, network in networks.items():
            features = network(images).float().cpu().numpy()
            if not np.isfinite(features).all():
                raise UserError(f"{name}: features are not finite; its weights are damaged")
            collectors[name].add(positions[start : start + len(pixels)], features)
        start += len(pixels)
    return {name: collector.finish(channel) for name, collector in collectors.items()}


class _Collector:
    """Takes the features of one network, batch by batch."""

    def __init__(self, part: Positions) -> None:
        self._running = RunningStatistics()
        self._place = {position: place for place, position in enumerate(part.tolist())}
        self._places: list[int] = []
        self._kept: list[Features] = []

    def add(self, positions: Sequence[int], features: Features) -> None:
        """Features (B, F) of the images at `positions`."""
        self._running.add(features)
        rows = [row for row, position in enumerate(positions) if position in self._place]
        self._places += [self._place[positions[row]] for row in rows]
        self._kept.append(features[rows])

    def finish(self, channel: SideChannel) -> FeatureSet:
        """What all processes have taken."""
        gathered = channel.gather((self._running, self._places, self._kept))
        whole = RunningStatistics()
        for running, _, _ in gathered:
            whole.merge(running)
        kept = [rows for _, _, pieces in gathered for rows in pieces]
        part = np.empty((len(self._place), kept[0].shape[1]), np.float32)
        start, places = 0, [place for _, numbers, _ in gathered for place in numbers]
        for rows in kept:
            part[places[start : start + len(rows)]] = rows
            start += len(rows)
        return FeatureSet(statistics=whole.finish(), part=part)
