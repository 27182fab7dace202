"""Non-finite gradients: find the samples that cause one, and compute such a step again.

`train` calls `report_nonfinite` when a gradient is not finite; `ifvit train --replay FILE` calls
`replay` with the file that the report wrote.
"""

import json
import math
import sys
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ifvit.diffusion.objectives import NoisePrediction
from ifvit.diffusion.schedules import NoiseSchedule
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import restore_config
from ifvit.models.weights import restore_backbone, step_name
from ifvit.storage import join, write_file
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine, prepare_forward
from ifvit.training.guards import NonfiniteGradient


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Mean loss of one micro-batch, and the norm of its gradient."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether both numbers are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Computes micro-batches of one step again, without an optimizer."""

    backbone: Backbone
    objective: NoisePrediction
    step: int

    def differentiate(self, batch: Batch) -> Outcome:
        """Loss and gradient norm of a micro-batch."""
        self.backbone.zero_grad()
        loss = self.objective(
            self.backbone, batch.moments, batch.condition, self.step, batch.positions
        ).total
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        return Outcome(loss=loss.item(), grad_norm=nn.utils.get_total_norm(gradients).item())

    def nonfinite_positions(self, batch: Batch) -> Tensor:
        """Positions of the samples that alone are not finite, or of all samples if none is."""
        rows = zip(*(tensor.split(1) for tensor in vars(batch).values()), strict=True)
        samples = [Batch(**dict(zip(vars(batch), row, strict=True))) for row in rows]
        nonfinite = [sample for sample in samples if not self.differentiate(sample).is_finite]
        return torch.cat([sample.positions for sample in nonfinite or samples]).cpu()


def report_nonfinite(
    failure: NonfiniteGradient,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    config: TrainConfig,
) -> NoReturn:
    """Compute the failed step again and raise a UserError that names the samples.

    All processes call this together. The engine's parameters must be those before that step. A
    process that finds a loss or a gradient that is not finite writes its first such micro-batch and
    the weights to a file for `replay`.
    """
    message = f"{config.run}: step {failure.step + 1}, rank {engine.world.rank}: "
    backbone = engine.gather_backbone(None)
    prepare_forward(backbone, EngineConfig(precision=config.engine.precision), engine.device)
    replayed = Replay(backbone=backbone, objective=objective, step=failure.step)
    with closing(batches.stream(failure.step, failure.samples_seen, engine.device)) as stream:
        for batch in islice(stream, batches.num_micro_batches):
            outcome = replayed.differentiate(batch)
            if not outcome.is_finite:
                break
    if outcome.is_finite:
        message += "the gradient is not finite, but no micro-batch of this process causes it"
    else:
        name = f"{step_name(failure.step + 1)}-rank_{engine.world.rank}.safetensors"
        path = join(config.run, "failures", name)
        _write_failure(path, batch, outcome, replayed, config)
        positions = replayed.nonfinite_positions(batch)
        images = batches.image_ids(failure.samples_seen, positions)
        message += (
            f"loss {outcome.loss}, gradient norm {outcome.grad_norm} at positions "
            f"{positions.tolist()} of the batch, images {images}; check these images, or compute "
            f"the step again with: ifvit train --replay {path}"
        )
    engine.barrier()  # a launcher ends the other processes, which may still be writing
    raise UserError(message)


def replay(config: ReplayConfig) -> None:
    """Print loss and gradient norm of the micro-batch in `config.file`, as stored and as of now.

    Raises UserError when the file was not written by a failed training step.
    """
    try:
        with safe_open(config.file, "pt") as file:
            facts = json.loads(file.metadata()["failure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{config.file}: not written by a failed training step ({error}); use a file from the "
            "failures folder of a run"
        ) from None
    device = torch.device(choose_device("auto"))
    batch = Batch(**{name: tensors.pop(name).to(device) for name in Batch.__dataclass_fields__})
    backbone = nn.Module.to(restore_backbone(restore_config(facts["backbone"]), tensors), device)
    prepare_forward(backbone, EngineConfig(precision=facts["precision"]), device)
    objective = NoisePrediction(schedule=NoiseSchedule(device), **facts["objective"])
    replayed = Replay(backbone=backbone, objective=objective, step=facts["step"])
    then, now = Outcome(**facts["outcome"]), replayed.differentiate(batch)
    for label, outcome in (("then", then), ("now", now)):
        sys.stdout.write(f"{label:<5}loss {outcome.loss}  gradient norm {outcome.grad_norm}\n")


def _write_failure(
    path: str, batch: Batch, outcome: Outcome, replayed: Replay, config: TrainConfig
) -> None:
    facts = {
        "step": replayed.step,
        "outcome": asdict(outcome),
        "precision": config.engine.precision,
        "backbone": asdict(config.backbone),
        "objective": {
            "scaling_factor": replayed.objective.scaling_factor,
            "seed": replayed.objective.seed,
            "min_snr_gamma": replayed.objective.min_snr_gamma,
        },
    }
    tensors = vars(batch) | replayed.backbone.state_dict()
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with write_file(path) as temporary:
        save_file(contiguous, Path(temporary), {"failure": json.dumps(facts)})
