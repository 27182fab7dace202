"""When a gradient is not finite: which samples made it so, and a file that shows it again."""

import json
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

from ifvit.device import choose_device
from ifvit.diffusion.objective import NoisePrediction
from ifvit.diffusion.schedule import NoiseSchedule
from ifvit.errors import UserError
from ifvit.models.backbone import Backbone
from ifvit.models.build import restore_backbone
from ifvit.models.config import restore_config
from ifvit.models.weights import step_name
from ifvit.storage import join, write_file
from ifvit.training.batch import Batch
from ifvit.training.batches import Batches
from ifvit.training.config import EngineConfig, ReplayConfig, TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.forward import prepare_forward
from ifvit.training.state import TrainState

_TENSORS = ("moments", "condition", "positions")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one micro-batch comes to: its mean loss and the norm of its gradient."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Whether training can go on with it."""
        return bool(torch.tensor([self.loss, self.grad_norm]).isfinite().all())


def report_nonfinite(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    engine: Engine,
    config: TrainConfig,
) -> NoReturn:
    """Compute the step after `state` again and raise a UserError that names culprits; collective.

    The engine's parameters must still be those of `state`. A process that meets a loss or a
    gradient that is not finite leaves its first such micro-batch, with the weights, in a file
    that `replay` takes.
    """
    message = f"{config.run}: step {state.step + 1}, rank {engine.world.rank}: "
    backbone = engine.whole_backbone(None)
    prepare_forward(backbone, EngineConfig(precision=config.engine.precision), engine.device)
    found = _find_nonfinite(state, batches, objective, backbone, engine)
    if found is None:
        message += "the gradient is not finite, but no micro-batch of this process makes it so"
    else:
        batch, outcome = found
        name = f"{step_name(state.step + 1)}-rank_{engine.world.rank}.safetensors"
        path = join(config.run, "failures", name)
        _dump(path, batch, outcome, state, objective, backbone, config)
        positions = _culprits(batch, objective, backbone, state.step)
        message += (
            f"loss {outcome.loss}, gradient norm {outcome.grad_norm} at positions "
            f"{positions.tolist()} of the batch, images {batches.image_ids(state, positions)}; "
            f"see it again with: ifvit train --replay {path}"
        )
    engine.barrier()  # or a launcher would end the processes that are still writing
    raise UserError(message)


def replay(config: ReplayConfig) -> None:
    """Print what the micro-batch of `config.file` came to, and what it comes to here and now."""
    try:
        with safe_open(config.file, "pt") as file:
            facts = json.loads(file.metadata()["failure"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{config.file}: not written by a failed training step ({error})") from None
    device = torch.device(choose_device("auto"))
    batch = Batch(**{name: tensors.pop(name).to(device) for name in _TENSORS})
    backbone = nn.Module.to(restore_backbone(restore_config(facts["backbone"]), tensors), device)
    prepare_forward(backbone, EngineConfig(precision=facts["precision"]), device)
    objective = NoisePrediction(schedule=NoiseSchedule(device), **facts["objective"])
    now, then = _differentiate(backbone, objective, batch, facts["step"]), facts["outcome"]
    for what, (loss, norm) in {"then": then.values(), "now": asdict(now).values()}.items():
        sys.stdout.write(f"{what:<5}loss {loss}  gradient norm {norm}\n")


def _find_nonfinite(
    state: TrainState,
    batches: Batches,
    objective: NoisePrediction,
    backbone: Backbone,
    engine: Engine,
) -> tuple[Batch, Outcome] | None:
    with closing(batches.from_state(state, engine.device)) as stream:
        for batch in islice(stream, batches.num_micro_batches):
            outcome = _differentiate(backbone, objective, batch, state.step)
            if not outcome.is_finite:
                return batch, outcome
    return None


def _differentiate(
    backbone: Backbone, objective: NoisePrediction, batch: Batch, step: int
) -> Outcome:
    backbone.zero_grad()
    loss = objective(backbone, batch.moments, batch.condition, step, batch.positions).total
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.get_total_norm([p.grad for p in backbone.parameters() if p.grad is not None])
    return Outcome(loss=loss.item(), grad_norm=norm.item())


def _culprits(batch: Batch, objective: NoisePrediction, backbone: Backbone, step: int) -> Tensor:
    """Positions of the samples that are not finite by themselves, or of all if none is."""
    alone = [
        Batch(**{name: getattr(batch, name)[i : i + 1] for name in _TENSORS})
        for i in range(len(batch.positions))
    ]
    guilty = [one for one in alone if not _differentiate(backbone, objective, one, step).is_finite]
    return torch.cat([one.positions for one in guilty or alone]).cpu()


def _dump(
    path: str,
    batch: Batch,
    outcome: Outcome,
    state: TrainState,
    objective: NoisePrediction,
    backbone: Backbone,
    config: TrainConfig,
) -> None:
    facts = {
        "step": state.step,
        "outcome": asdict(outcome),
        "precision": config.engine.precision,
        "backbone": asdict(config.backbone),
        "objective": {
            "scaling_factor": objective.scaling_factor,
            "seed": objective.seed,
            "min_snr_gamma": objective.min_snr_gamma,
        },
    }
    tensors = {name: getattr(batch, name) for name in _TENSORS} | backbone.state_dict()
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with write_file(path) as temporary:
        save_file(contiguous, Path(temporary), {"failure": json.dumps(facts)})
