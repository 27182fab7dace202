"""Where this process computes."""

import torch

from ifvit.distributed import World
from ifvit.errors import UserError


def choose_device(device: str) -> str:
    """`cuda` => this process's GPU; so does `auto` when there is one, and cpu otherwise.

    Raises UserError for an absent GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch sees no GPU here; use cpu or auto")
    if device == "cuda":  # a launcher may show each process only a GPU of its own
        return f"cuda:{World.from_environment().local_rank % torch.cuda.device_count()}"
    return device
