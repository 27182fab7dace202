"""The evaluations that may stand side by side, and why others may not."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow, Protocol, differences
from ifvit.evaluation.runs import Run
from ifvit.studies.comparisons import Metric
from ifvit.studies.variants import SeedMean, Setting, group_runs, mean_over_seeds

_PAPER_SCALE = 2.0


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Runs by setting, and of their evaluations those that were made as `reference` was.

    `rows` holds per run the rows that differ from `reference` in step and guidance scale alone.
    """

    settings: dict[Setting, list[Run]]
    reference: MetricsRow | None
    """None: nothing was evaluated."""
    rows: dict[str, list[MetricsRow]]
    """By the run's name; empty for a run that is not compared."""
    excluded: list[str]
    """Sentences about runs and steps that were evaluated otherwise."""

    def has(self, metric: Metric) -> bool:
        """Whether any setting has the number."""
        return any(self.mean(setting, metric) for setting in self.settings)

    def mean(self, setting: Setting, metric: Metric) -> SeedMean | None:
        """Over the setting's runs, at the reference's step and guidance scale."""
        if self.reference is None or setting not in self.settings:
            return None
        return self._mean(
            setting, metric, self.reference.step, self.reference.protocol.guidance_scale
        )

    def over_steps(self, setting: Setting, metric: Metric) -> dict[int, SeedMean]:
        """By training step, at the reference's guidance scale."""
        if self.reference is None:
            return {}
        scale = self.reference.protocol.guidance_scale
        steps = sorted({row.step for row in self._rows(setting)})
        means = {step: self._mean(setting, metric, step, scale) for step in steps}
        return {step: mean for step, mean in means.items() if mean}

    def over_guidance(self, setting: Setting, metric: Metric) -> dict[float, SeedMean]:
        """By guidance scale, at the reference's step."""
        if self.reference is None:
            return {}
        step = self.reference.step
        scales = sorted({row.protocol.guidance_scale for row in self._rows(setting)})
        means = {scale: self._mean(setting, metric, step, scale) for scale in scales}
        return {scale: mean for scale, mean in means.items() if mean}

    def _rows(self, setting: Setting) -> list[MetricsRow]:
        return [row for run in self.settings[setting] for row in self.rows[run.name]]

    def _mean(self, setting: Setting, metric: Metric, step: int, scale: float) -> SeedMean | None:
        found = [
            estimate
            for row in self._rows(setting)
            if (row.step, row.protocol.guidance_scale) == (step, scale)
            and (estimate := metric.of(row))
        ]
        return mean_over_seeds(found) if found else None


def make_sheet(runs: Sequence[Run], series: str | None = None) -> Sheet:
    """Group the runs; `series` is NAME/wSCALE, as their evaluation folders call it.

    Without it: the series of most rows, of several that whose scale is nearest to 2, the paper's.
    The reference is the last row that most runs share. Raises UserError for runs that make no
    setting and for a series that no run has.
    """
    settings = group_runs(runs)
    rows = [row for run in runs for row in run.rows]
    if not rows:
        return Sheet(
            settings=settings, reference=None, rows={r.name: [] for r in runs}, excluded=[]
        )
    chosen = series or _main_series(rows)
    last = [found[-1] for run in runs if (found := _of_series(run, chosen))]
    if not last:
        known = ", ".join(sorted({series_of(row.protocol) for row in rows}))
        raise UserError(f"--series {chosen}: no run has it; choose one of {known}")
    reference = max(last, key=lambda row: sum(not _reasons(row, other) for other in last))
    kept: dict[str, list[MetricsRow]] = {}
    excluded = []
    for run in runs:
        reasons = _exclusion(run, chosen, reference)
        found = [] if reasons else _rows_of(run, reference.protocol.name)
        kept[run.name] = [row for row in found if not _differences(row, reference)]
        excluded += [f"{run.name} is not compared: {reasons}"] if reasons else []
        excluded += [
            f"{run.name} is left out at step {row.step:,}: {'; '.join(others)}"
            for row in found
            if (others := _differences(row, reference))
        ]
    return Sheet(settings=settings, reference=reference, rows=kept, excluded=excluded)


def series_of(protocol: Protocol) -> str:
    """`scenes/w1.5`, as the folders of a run's evaluations are called."""
    return f"{protocol.name}/w{protocol.guidance_scale:g}"


def _main_series(rows: Sequence[MetricsRow]) -> str:
    counts = Counter(series_of(row.protocol) for row in rows)
    scales = {series_of(row.protocol): row.protocol.guidance_scale for row in rows}
    return min(counts, key=lambda name: (-counts[name], abs(scales[name] - _PAPER_SCALE), name))


def _of_series(run: Run, series: str) -> list[MetricsRow]:
    return [row for row in run.rows if series_of(row.protocol) == series]


def _exclusion(run: Run, series: str, reference: MetricsRow) -> str:
    """Why a run's numbers are not the reference's kin; empty if they are."""
    rows = _of_series(run, series)
    if not rows:
        others = ", ".join(sorted({series_of(row.protocol) for row in run.rows}))
        return f"evaluated as {others}, not as {series}" if others else "it was not evaluated"
    same_step = [row for row in rows if row.step == reference.step]
    return "; ".join(_reasons((same_step or rows)[-1], reference))


def _reasons(row: MetricsRow, reference: MetricsRow) -> list[str]:
    step = f"step {row.step:,} against {reference.step:,}"
    found = [step] if row.step != reference.step else []
    return found + differences(row.protocol, reference.protocol)


def _rows_of(run: Run, protocol: str) -> list[MetricsRow]:
    return [row for row in run.rows if row.protocol.name == protocol]


def _differences(row: MetricsRow, reference: MetricsRow) -> list[str]:
    """In anything but step and guidance scale, over which the paper draws curves."""
    scale = {"guidance_scale": reference.protocol.guidance_scale}
    rescaled = replace(row.protocol, sampling=row.protocol.sampling | scale)
    return differences(rescaled, reference.protocol)
