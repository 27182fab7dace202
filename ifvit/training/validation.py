"""Validation: the held-out loss of the EMA weights while a run trains; a hook."""

from ifvit.evaluation.held_out_loss import HeldOutLoss
from ifvit.models.weights import WeightsInfo
from ifvit.shards.reader import ShardReader
from ifvit.training.config import TrainConfig
from ifvit.training.engine import Engine
from ifvit.training.hooks import gather_ema
from ifvit.training.loop import StepReport, TrainState
from ifvit.training.metrics_log import MetricsLog


class Validation:
    """Adds the held-out loss of the EMA weights to the row of the step.

    Only the main process computes it, always in the same chunks and in fp32. It is therefore equal
    for any number of processes, after every restart and in evaluations, and runs of any precision
    compare. The noise does not depend on the run's seed, so that runs of several seeds compare.
    """

    name = "validation"
    on_stop = False

    def __init__(
        self, config: TrainConfig, engine: Engine, info: WeightsInfo, metrics: MetricsLog
    ) -> None:
        assert config.validation.shards is not None
        self.every = config.validation.every
        self._engine, self._metrics = engine, metrics
        reader = ShardReader(config.validation.shards, config.cache)
        self._loss = HeldOutLoss(reader, config.validation.num_samples, info, engine.device)

    def __call__(self, state: TrainState, report: StepReport) -> None:
        """Compute the loss on the main process while the others wait."""
        backbone = gather_ema(self._engine)
        if backbone is not None:
            self._metrics.add_validation(state.step, self._loss.measure(backbone))
        self._engine.barrier()
