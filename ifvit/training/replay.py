"""Non-finite gradients: find the samples that cause one, and compute such a step again.

`train` calls `report_nonfinite` when a gradient is not finite; `ifvit train --replay FILE` calls
`replay` with the file that the report wrote.
"""

import hashlib
import math
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ifvit.diffusion.config import LatentScaling, ObjectiveConfig, RepresentationConfig
from ifvit.diffusion.objectives import Objective
from ifvit.distributed import choose_device
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.config import BackboneConfig, restore_config
from ifvit.models.weights import restore_backbone, step_name
from ifvit.records import (
    NonNegativeInt,
    Sha256,
    dump_sealed,
    parse_sealed,
    record,
    shorten,
)
from ifvit.storage import join, write_file
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.data import BATCH_TENSORS, Batch, Batches
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

    def __str__(self) -> str:
        return f"loss {self.loss}  gradient norm {self.grad_norm}"


@record
class FailedStep:
    """Metadata of a file in failures/: the step that failed, and how to compute it again."""

    step: NonNegativeInt
    outcome: str
    """Loss and gradient norm, as text because JSON has no NaN."""
    precision: Literal["fp32", "bf16", "fp16"]
    backbone: dict[str, Any]
    scaling: LatentScaling
    deterministic: bool = False
    seed: int
    objective: ObjectiveConfig
    representation: RepresentationConfig | None = None
    tensors_sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Computes micro-batches of one step again, without an optimizer."""

    backbone: Backbone
    objective: Objective
    step: int

    def differentiate(self, batch: Batch) -> Outcome:
        """Loss and gradient norm of a micro-batch."""
        self.backbone.zero_grad()
        loss = self.objective(
            self.backbone,
            batch.moments,
            batch.condition,
            self.step,
            batch.positions,
            batch.features,
        ).total
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in self.backbone.parameters() if p.grad is not None]
        return Outcome(loss=loss.item(), grad_norm=nn.utils.get_total_norm(gradients).item())

    def nonfinite_positions(self, batch: Batch) -> Tensor:
        """Positions of the samples that alone are not finite, or of all samples if none is."""
        rows = zip(*(torch.split(tensor, 1) for tensor in batch.tensors.values()), strict=True)
        samples = [Batch.of(dict(zip(batch.tensors, row, strict=True))) for row in rows]
        nonfinite = [sample for sample in samples if not self.differentiate(sample).is_finite]
        return torch.cat([sample.positions for sample in nonfinite or samples]).cpu()


def report_nonfinite(
    failure: NonfiniteGradient,
    batches: Batches,
    objective: Objective,
    engine: Engine,
    config: TrainConfig,
) -> NoReturn:
    """Compute the failed step again and raise a UserError that names the samples.

    All processes call this together. The engine's parameters must be those before that step. A
    process that finds a loss or a gradient that is not finite writes its first such micro-batch and
    the weights to a file for `replay`.
    """
    message = f"{config.run}: step {failure.step + 1}, rank {engine.world.rank}: "
    weights = dict(engine.iter_weights(None))
    backbone = restore_backbone(config.backbone, weights, copy=False)
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

    Raises UserError when the file was not written by a failed training step, or is damaged.
    """
    failed, tensors = _read_failure(config.file)
    shape = restore_config(failed.backbone, config.file)
    try:
        outcome = _differentiate(failed, shape, tensors)
    except Exception as error:
        raise UserError(
            f"{config.file}: its tensors are not those of its backbone and a batch "
            f"({shorten(error)})"
        ) from None
    sys.stdout.write(f"then {shorten(failed.outcome)}\n")
    sys.stdout.write(f"now  {outcome}\n")


def _differentiate(
    failed: FailedStep, shape: BackboneConfig, tensors: dict[str, Tensor]
) -> Outcome:
    """Compute the step again from the tensors of its batch and of its backbone."""
    device = torch.device(choose_device("auto"))
    names = [name for name in BATCH_TENSORS if name in tensors]
    batch = Batch.of({name: tensors.pop(name).to(device) for name in names})
    if batch.positions.dtype != torch.int64:
        raise TypeError("positions are not integers")
    backbone = nn.Module.to(restore_backbone(shape, tensors, copy=False), device)
    prepare_forward(backbone, EngineConfig(precision=failed.precision), device)
    objective = Objective(
        failed.objective,
        scaling=failed.scaling,
        deterministic=failed.deterministic,
        seed=failed.seed,
        device=device,
        representation=failed.representation,
    )
    return Replay(backbone=backbone, objective=objective, step=failed.step).differentiate(batch)


def _read_failure(file: str) -> tuple[FailedStep, dict[str, Tensor]]:
    if not Path(file).is_file():
        raise UserError(f"{file}: no such file; use a file from the failures folder of a run")
    try:
        with safe_open(file, "pt") as stored:
            facts = (stored.metadata() or {})["failure"]
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{file}: not written by a failed training step ({shorten(error)}); use a file from "
            "the failures folder of a run"
        ) from None
    failed = parse_sealed(FailedStep, facts, file)
    if _sha256(tensors) != failed.tensors_sha256:
        raise UserError(f"{file}: damaged, its tensors have another sha256; restore the file")
    return failed, tensors


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_failure(
    path: str, batch: Batch, outcome: Outcome, replayed: Replay, config: TrainConfig
) -> None:
    tensors = {
        name: tensor.cpu().contiguous()
        for name, tensor in (batch.tensors | replayed.backbone.state_dict()).items()
    }
    failed = FailedStep(
        step=replayed.step,
        outcome=str(outcome),
        precision=config.engine.precision,
        backbone=asdict(config.backbone),
        scaling=replayed.objective.scaling,
        deterministic=replayed.objective.deterministic,
        seed=replayed.objective.seed,
        objective=replayed.objective.config,
        representation=replayed.objective.representation,
        tensors_sha256=_sha256(tensors),
    )
    with write_file(path) as temporary:
        save_file(tensors, Path(temporary), {"failure": dump_sealed(failed).decode()})
