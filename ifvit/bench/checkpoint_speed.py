"""The verb `bench checkpoint`: how long saves stop the loop, and how much they slow it down."""

import tempfile
import time

import torch

from ifvit.bench.config import BenchCheckpointConfig
from ifvit.bench.measurement import print_result
from ifvit.models.config import PRESETS
from ifvit.models.weights import WeightsInfo, build_backbone
from ifvit.shards import EncoderIdentity
from ifvit.storage import file_size, join, list_names, write_bytes, write_json
from ifvit.training.checkpoint import MANIFEST, TrainState, step_url
from ifvit.training.config import EngineConfig, OptimConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.guards import StopRequest
from ifvit.training.hooks import SaveCheckpoint
from ifvit.training.lease import Lease
from ifvit.training.loop import StepReport
from ifvit.training.metrics_log import MetricsLog
from ifvit.training.profiling import device_name


def bench_checkpoint(config: BenchCheckpointConfig) -> None:
    """Train the small preset on noise, first without saves and then with saves, print the cost.

    `stall_share` is the fraction of wall time in which the loop stands still. `slowdown` is the
    relative growth of the other steps, because the background threads share the machine.
    `last_save_seconds` is the time that the end of a run waits for its last save.
    """
    training = _Training(config.batch_size)
    training.step()  # the first step also allocates the optimizer state
    quiet = training.time_steps(config.num_steps)
    with tempfile.TemporaryDirectory() as folder:
        run = config.run or folder
        lease = Lease.acquire(run)
        hook = _build_hook(run, config.every, training.engine, lease)
        with lease.held(), hook.open():
            wall = training.time_steps(config.num_steps, hook)
            started = time.perf_counter()
            hook.wait()
            last_save = time.perf_counter() - started
        url = step_url(run, config.num_steps)
        num_bytes = sum(file_size(join(url, name)) or 0 for name in list_names(url))
    result = {
        "stall_share": hook.stall_seconds / wall,
        "slowdown": (wall - hook.stall_seconds) / quiet - 1,
        "stall_seconds_per_save": hook.stall_seconds / (config.num_steps // config.every),
        "last_save_seconds": last_save,
        "step_seconds": quiet / config.num_steps,
        "gigabytes": num_bytes / 1e9,
        "every": config.every,
        "device": device_name(training.engine.device),
    }
    print_result(result, config.json)


class _Training:
    """Steps of the small preset, 48M parameters, on noise with the paper's shapes."""

    def __init__(self, batch_size: int) -> None:
        shape, is_cuda = PRESETS["small"], torch.cuda.is_available()
        self.engine = Engine(
            build_backbone(shape),
            EngineConfig(backend="plain", precision="bf16" if is_cuda else "fp32"),
            OptimConfig(),
            ema_decays=(0.9999,),
        )
        side, device = shape.latent_size, self.engine.device
        self._x_t = torch.randn(batch_size, shape.latent_channels, side, side, device=device)
        self._t = torch.randint(0, 1000, (batch_size,), device=device)
        self._context = torch.randn(batch_size, *shape.context_shape, device=device)

    def step(self) -> None:
        """Forward and backward pass, optimizer step, EMA."""
        with self.engine.accumulate(last=True):
            noise = self.engine.predict_noise(self._x_t, self._t, self._context)
            self.engine.backward(noise.float().square().mean())
        self.engine.step()
        self.engine.update_ema()

    def time_steps(self, count: int, hook: SaveCheckpoint | None = None) -> float:
        """Seconds that `count` steps take, including the saves that fall due."""
        report = StepReport(loss=0.0, loss_by_time=(), grad_norm=0.0, learning_rate=0.0)
        self.engine.synchronize()
        started = time.perf_counter()
        for done in range(1, count + 1):
            self.step()
            if hook is not None and done % hook.every == 0:
                hook(TrainState(step=done), report)
        self.engine.synchronize()
        return time.perf_counter() - started


def _build_hook(run: str, every: int, engine: Engine, lease: Lease) -> SaveCheckpoint:
    config = TrainConfig(run=run, shards=run, backbone=PRESETS["small"], checkpoint_every=every)
    # A checkpoint holds the hash of the shards' manifest, and publishes the rows of the log.
    write_json(join(run, MANIFEST), {})
    write_bytes(join(run, "metrics.jsonl"), b"")
    encoder = EncoderIdentity(name="none", sha256="0" * 64)
    info = WeightsInfo(
        step=0,
        ema_decay=None,
        scaling_factor=1.0,
        vae=encoder,
        text_encoder=encoder,
        recipe_sha256="",
    )
    metrics, stop = MetricsLog(config, engine), StopRequest(engine.world)
    return SaveCheckpoint(config, engine, info, lease, metrics, stop)
