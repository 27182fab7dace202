"""Groups runs by the paper's variants and selects the evaluations that can be compared.

A variant is a setting of `models/config.py`, such as `cross_attention_early`. `report paper` builds
its tables, figures and claims from the `Sheet` that `make_sheet` returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow, Protocol, differences, main_series
from ifvit.evaluation.runs import Run
from ifvit.models.config import SETTINGS, FusionTransformerConfig, setting_of
from ifvit.studies.comparisons import FID, FRECHET, Metric, SeedMean, mean_over_seeds

_Found = TypeVar("_Found")

PAPER_VARIANTS = SETTINGS[:4]
"""The rows of Table 1 from top to bottom; the first is the paper's baseline."""
VARIANT_COLOURS = dict(zip(SETTINGS, (8, 9, 10, 11, 5, 3, 2, 4), strict=True))
"""Indices of `figures.COLOURS`: concat is blue, cross-attention orange; early fusion is light."""


def describe(variant: str) -> tuple[str, str]:
    """Return mechanism and fusion in words, such as `cross-attention` and `image blocks only`."""
    mechanism = "concat" if variant.startswith("concat") else "cross_attention"
    fusion = variant.removeprefix(f"{mechanism}_")
    return mechanism.replace("_", "-"), fusion.replace("_", " ")


def title_of(variant: str) -> str:
    """Return the name on the page, such as `Concat, early`."""
    return ", ".join(describe(variant)).capitalize()


def group_runs(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """Return the runs of each variant in the paper's order, and sentences about all other runs.

    Raises UserError if no run is one of the variants, and for two backbones of different shape
    that are the same variant.
    """
    groups: dict[str, list[Run]] = {variant: [] for variant in SETTINGS}
    excluded = []
    for run in runs:
        config = run.backbone
        name = str(config.architecture) if config else ""
        if isinstance(config, FusionTransformerConfig):
            name = config.fusion
            if variant := setting_of(config):
                groups[variant].append(run)
                continue
        reason = f"{name} is none of the paper's settings" if name else "it has no weights"
        excluded.append(f"{run.name} is left out: {reason}")
    if len(excluded) == len(runs):
        raise UserError(f"report paper: {'; '.join(excluded)}; give runs of the paper's settings")
    for variant, members in groups.items():
        # The initial standard deviation does not change the shape.
        if len({replace(backbone_of(run), init_std=1.0) for run in members}) > 1:
            names = ", ".join(run.url for run in members)
            raise UserError(f"{names}: {title_of(variant)} has two shapes; report them one by one")
    return {variant: members for variant, members in groups.items() if members}, excluded


def backbone_of(run: Run) -> FusionTransformerConfig:
    """Return the backbone of a run that `group_runs` has put into a group."""
    assert isinstance(run.backbone, FusionTransformerConfig)
    return run.backbone


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The runs of each variant, and their evaluations that can be compared with `reference`."""

    variants: dict[str, list[Run]]
    reference: MetricsRow | None
    """The evaluation whose step and protocol the tables show; None if no run was evaluated."""
    rows: dict[str, list[MetricsRow]]
    """Run name => the rows that differ from `reference` only in step and guidance scale; empty for
    a run that is not compared."""
    excluded: list[str]
    """Sentences that name each run or step that is not compared, with the reason."""

    @property
    def runs(self) -> list[Run]:
        """The runs of all variants."""
        return [run for members in self.variants.values() for run in members]

    @property
    def series(self) -> str:
        """The series of `reference`, NAME/wSCALE."""
        return series_of(self.reference.protocol) if self.reference else ""

    @property
    def quality(self) -> Metric:
        """FID, or the distance on CLIP features if only that one was measured."""
        return FRECHET if self.has(FRECHET) and not self.has(FID) else FID

    def group(self, found: Mapping[str, _Found]) -> dict[str, list[_Found]]:
        """Convert run name => value to variant => values; variants without a value are left out."""
        grouped = {
            variant: [found[run.name] for run in members if run.name in found]
            for variant, members in self.variants.items()
        }
        return {variant: members for variant, members in grouped.items() if members}

    def has(self, metric: Metric) -> bool:
        """Return whether the metric was measured for any variant."""
        return any(self.mean(variant, metric) for variant in self.variants)

    def mean(
        self, variant: str, metric: Metric, *, step: int | None = None, scale: float | None = None
    ) -> SeedMean | None:
        """Return the mean over the variant's runs; None if the metric was not measured.

        Step and guidance scale are those of `reference` unless given.
        """
        if self.reference is None:
            return None
        step = self.reference.step if step is None else step
        scale = self.reference.protocol.guidance_scale if scale is None else scale
        found = [
            estimate
            for row in self._rows_of(variant)
            if (row.step, row.protocol.guidance_scale) == (step, scale)
            and (estimate := metric.of(row))
        ]
        return mean_over_seeds(found) if found else None

    def over_steps(self, variant: str, metric: Metric) -> dict[int, SeedMean]:
        """Return means by training step, at the guidance scale of `reference`."""
        steps = sorted({row.step for row in self._rows_of(variant)})
        return {s: mean for s in steps if (mean := self.mean(variant, metric, step=s))}

    def over_guidance(self, variant: str, metric: Metric) -> dict[float, SeedMean]:
        """Return means by guidance scale, at the step of `reference`."""
        scales = sorted({row.protocol.guidance_scale for row in self._rows_of(variant)})
        return {s: mean for s in scales if (mean := self.mean(variant, metric, scale=s))}

    def _rows_of(self, variant: str) -> list[MetricsRow]:
        return [row for run in self.variants.get(variant, []) for row in self.rows[run.name]]


def make_sheet(runs: Sequence[Run], series: str | None = None) -> Sheet:
    """Group the runs by variant and select the evaluations that can be compared.

    `series` is NAME/wSCALE, a folder in RUN/evaluation; by default the one with most rows (see
    `main_series`). `reference` is the last row of some run in this series: the one that can be
    compared with the last rows of most runs. Raises UserError for runs that `group_runs` refuses
    and for a series that no run has.
    """
    variants, excluded = group_runs(runs)
    members = [run for group in variants.values() for run in group]
    kept: dict[str, list[MetricsRow]] = {run.name: [] for run in members}
    rows = [row for run in members for row in run.rows]
    if not rows:
        return Sheet(variants=variants, reference=None, rows=kept, excluded=excluded)
    series = series or series_of(main_series(rows)[0].protocol)
    last = [row for run in members for row in _rows_of_series(run, series)[-1:]]
    if not last:
        known = ", ".join(sorted({series_of(row.protocol) for row in rows}))
        raise UserError(f"--series {series}: no run has this series; choose one of {known}")
    reference = max(last, key=lambda row: sum(not _mismatches(row, other) for other in last))
    for run in members:
        if reasons := _why_excluded(run, series, reference):
            excluded.append(f"{run.name} is not compared: {reasons}")
            continue
        for row in run.rows:
            if row.protocol.name != reference.protocol.name:
                continue
            # Figure 3 varies step and guidance scale; every other field must be equal.
            scale = {"guidance_scale": reference.protocol.guidance_scale}
            rescaled = replace(row.protocol, sampling=row.protocol.sampling | scale)
            if others := "; ".join(differences(rescaled, reference.protocol)):
                excluded.append(f"{run.name} is left out at step {row.step:,}: {others}")
            else:
                kept[run.name].append(row)
    return Sheet(variants=variants, reference=reference, rows=kept, excluded=excluded)


def series_of(protocol: Protocol) -> str:
    """Return NAME/wSCALE, for example `scenes/w1.5`."""
    return f"{protocol.name}/w{protocol.guidance_scale:g}"


def _rows_of_series(run: Run, series: str) -> list[MetricsRow]:
    return [row for row in run.rows if series_of(row.protocol) == series]


def _why_excluded(run: Run, series: str, reference: MetricsRow) -> str:
    """Return why the run cannot be compared with the reference; empty if it can."""
    rows = _rows_of_series(run, series)
    if not rows:
        others = ", ".join(sorted({series_of(row.protocol) for row in run.rows}))
        return f"evaluated as {others}, not as {series}" if others else "it was not evaluated"
    same_step = [row for row in rows if row.step == reference.step]
    return "; ".join(_mismatches((same_step or rows)[-1], reference))


def _mismatches(row: MetricsRow, reference: MetricsRow) -> list[str]:
    step = f"step {row.step:,} against {reference.step:,}"
    found = [step] if row.step != reference.step else []
    return found + differences(row.protocol, reference.protocol)
