"""Shared by both trainings: rendered scenes, pixels in [-1, 1], and the optimizer."""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ifvit.scenes.captions import write_captions
from ifvit.scenes.drawings import render_sampled_scene


class SceneSet:
    """Scenes 0 to count - 1 of the series `seed`: images (N, 3, 64, 64) uint8, five captions each.

    `content` (N,) is equal for images that show the same scene.
    """

    def __init__(self, seed: int, count: int) -> None:
        progress = tqdm(range(count), "render", mininterval=2)
        rendered = [render_sampled_scene(seed, number) for number in progress]
        self.scenes = [one.scene for one in rendered]
        images = np.stack([one.image for one in rendered])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.captions = [write_captions(scene) for scene in self.scenes]
        numbers = {scene: number for number, scene in enumerate(dict.fromkeys(self.scenes))}
        self.content = torch.tensor([numbers[scene] for scene in self.scenes])


def normalise(images: Tensor) -> Tensor:
    """uint8 => float in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def build_optimizer(
    model: torch.nn.Module, lr: float, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Build AdamW with 100 warm-up steps, then cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.01)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / num_steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1]: 10 log10(4 / MSE)."""
    return 10 * math.log10(4 / squared_error)
