"""Processor time of a training step, for studies and benchmarks that match seconds.

`EngineSteps` trains on one batch in memory; `ifvit bench train` measures it, too.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from ifvit.diffusion.config import LatentScaling
from ifvit.diffusion.objectives import Objective
from ifvit.models.config import BackboneConfig
from ifvit.models.weights import initial_weights
from ifvit.records import PositiveFloat, Sha256, record
from ifvit.sampling.samples import hash_json
from ifvit.storage import exists, join, read_sealed, write_sealed
from ifvit.training.config import TrainConfig
from ifvit.training.data import Batch, Batches
from ifvit.training.engine import Engine, choose_normal_sampler
from ifvit.training.guards import StopRequest
from ifvit.training.loop import Hook, TrainState, fit

SCALING_FACTOR = 0.2301
NUM_STEPS, NUM_ROUNDS = 12, 5
"""Steps of one measurement, and measurements of each arm."""


@record
class StepTimes:
    """FOLDER/plan.json: seconds of a training step by the hash of the arm's recipe.

    They decide the lengths of runs and are therefore measured only once.
    """

    step_seconds: dict[Sha256, PositiveFloat]
    """Processor time in one thread without the loader; on a GPU time by the clock."""


def find_step_seconds(
    folder: str, recipes: Mapping[str, TrainConfig], yardstick: str | None = None
) -> dict[str, float]:
    """Return the seconds of a training step of every arm, from FOLDER/plan.json or measured here.

    Arms that are added later are measured together with the arm `yardstick`, and their seconds are
    relative to its seconds in the file.
    """
    url = join(folder, "plan.json")
    known = dict(read_sealed(StepTimes, url).step_seconds) if exists(url) else {}
    keys = {
        arm: hash_json(asdict(replace(recipe, run=folder, seed=0)))
        for arm, recipe in recipes.items()
    }
    missing = {arm: recipe for arm, recipe in recipes.items() if keys[arm] not in known}
    if missing:
        first = yardstick or next(iter(recipes))
        measured = measure_steps({first: recipes[first], **missing})
        scale = known.get(keys[first], measured[first]) / measured[first]
        known |= {keys[arm]: scale * measured[arm] for arm in missing}
        write_sealed(url, StepTimes(step_seconds=known))
    return {arm: known[key] for arm, key in keys.items()}


def measure_steps(recipes: Mapping[str, TrainConfig]) -> dict[str, float]:
    """Measure the seconds of a training step of every arm, in turn.

    Other work on the machine then slows down all arms alike.
    """

    def measure(steps: EngineSteps) -> float:
        is_cpu = steps.engine.device.type == "cpu"
        clock = time.process_time if is_cpu else time.perf_counter
        steps.engine.synchronize()
        started = clock()
        steps(NUM_STEPS)
        steps.engine.synchronize()
        return (clock() - started) / NUM_STEPS

    engines = {
        arm: EngineSteps(replace(recipe, micro_batch_size=recipe.global_batch_size))
        for arm, recipe in recipes.items()
    }
    measures = {arm: partial(measure, steps) for arm, steps in engines.items()}
    measure_rounds(measures, 1)  # the first step also allocates the optimizer state
    seconds = measure_rounds(measures, NUM_ROUNDS)
    return {arm: statistics.median(found) for arm, found in seconds.items()}


def measure_rounds(
    contenders: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
    """Call all contenders in turn, `rounds` times, and return the results of each contender.

    A slow phase of the machine then affects all contenders alike.
    """
    results: dict[str, list[float]] = {name: [] for name in contenders}
    for name in tqdm([*contenders] * rounds, desc="measure", leave=False):
        results[name].append(contenders[name]())
    return results


class EngineSteps:
    """The loop of `ifvit train` on one batch in memory."""

    def __init__(self, config: TrainConfig) -> None:
        self.engine = Engine(config, initial_weights(config.backbone, config.seed))
        self.backbone = self.engine.backbone
        self.state = TrainState()
        self._objective = Objective(
            config.objective,
            scaling=LatentScaling(scale=SCALING_FACTOR),
            seed=config.seed,
            device=self.engine.device,
            sample_normal=choose_normal_sampler(config.engine),
        )
        self._batch = random_batch(config, self.engine.device)

    def __call__(self, num_steps: int, hooks: Sequence[Hook] = ()) -> None:
        """Train for `num_steps` steps."""
        self.state = fit(
            self.state,
            self.state.step + num_steps,
            cast(Batches, _SameBatch(self._batch)),
            self._objective,
            self.engine,
            hooks,
            StopRequest(self.engine.world),
            log_every=num_steps,
        )


class _SameBatch:
    """Stands in for `Batches` in the loop and yields one batch without end."""

    num_micro_batches = 1

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.global_batch_size = len(batch.positions)

    def stream(self, step: int, samples_seen: int, device: torch.device) -> Iterator[Batch]:
        while True:
            yield self._batch


def random_batch(config: TrainConfig, device: torch.device) -> Batch:
    """Sample moments and conditions in the shapes of the recipe, in float16 as in shards."""
    shape, size = config.backbone, config.micro_batch_size
    moments = (size, 2 * shape.latent_channels, shape.latent_size, shape.latent_size)
    return Batch(
        moments=torch.randn(moments, device=device).half(),
        condition=random_condition(shape, size, device),
        positions=torch.arange(size, device=device),
    )


def random_condition(config: BackboneConfig, size: int, device: torch.device) -> Tensor:
    """Sample contexts (B, M, D) in float16, as in shards, or classes (B,)."""
    if config.context_shape is None:
        return torch.arange(size, device=device) % (config.num_classes or 1)
    return torch.randn(size, *config.context_shape, device=device).half()
