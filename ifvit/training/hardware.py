"""What a device is, can do and has used."""

import resource

import torch

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165.2e12}
"""Dense bf16 tensor-core FLOP/s from the vendors' data sheets, by a part of the device's name."""


def device_name(device: torch.device) -> str:
    """The GPU's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of one such device, None where unknown."""
    name = device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most, on its GPU or in its whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
