"""Groups runs by the paper's variants and selects the evaluations that can be compared.

A variant is a setting of `models/config.py`, such as `cross_attention_early`. `report paper` builds
its tables and figures from the `Sheet` that `make_sheet` returns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ifvit.errors import UserError
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.rows import MetricsRow, differences, main_series
from ifvit.evaluation.runs import Run
from ifvit.models.config import FusionTransformerConfig
from ifvit.models.presets import SETTINGS, setting_of
from ifvit.studies.comparisons import compares
from ifvit.studies.quantities import (
    COUNT,
    FID,
    FRECHET,
    PAPER_CLIP_SCORE,
    RELATION,
    RETRIEVAL,
    Metric,
    SeedMean,
    mean_over_seeds,
)

PAPER_VARIANTS = SETTINGS[:4]
"""The rows of Table 1 from top to bottom; the first is the paper's baseline."""
VARIANT_COLOURS = dict(zip(SETTINGS, (8, 9, 10, 11, 5, 3, 2, 4), strict=True))
"""Indices of `figures.COLOURS`: concat is blue, cross-attention orange; early fusion is light."""


def title_of(variant: str) -> str:
    """Return the name on the page, such as `Cross-attention, image blocks only`."""
    mechanism = "concat" if variant.startswith("concat") else "cross_attention"
    fusion = variant.removeprefix(f"{mechanism}_").replace("_", " ")
    return f"{mechanism.replace('_', '-').capitalize()}, {fusion}"


def group_runs(runs: Sequence[Run]) -> tuple[dict[str, list[Run]], list[str]]:
    """Return the runs of each variant in the paper's order, and sentences about all other runs.

    Raises UserError if no run is one of the variants, and for two backbones of different shape or
    prediction that are the same variant.
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
        names = ", ".join(run.url for run in members)
        # The initial standard deviation does not change the shape.
        shapes = {replace(backbone_of(run), init_std=1.0) for run in members}
        for what, found in (("shapes", shapes), ("predictions", {run.target for run in members})):
            if len(found) > 1:
                raise UserError(
                    f"{names}: {title_of(variant)} has two {what}; report them one by one"
                )
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
        return series_of(self.reference) if self.reference else ""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the figures: first FID, or the distance on CLIP features without FID."""
        quality = FRECHET if self.has(FRECHET) and not self.has(FID) else FID
        return quality, PAPER_CLIP_SCORE, RETRIEVAL, COUNT, RELATION

    @property
    def place(self) -> tuple[int, float]:
        """Step and guidance scale of `reference`."""
        shown = self.reference
        return (shown.step, shown.protocol.guidance_scale) if shown else (0, 0.0)

    def is_compared(self, run: Run) -> bool:
        """Return whether the run was evaluated as `reference` was."""
        places = [(row.step, row.protocol.guidance_scale) for row in self.rows[run.name]]
        return self.place in places

    def means(self, variant: str, metric: Metric) -> dict[tuple[int, float], SeedMean]:
        """Return the means over the variant's runs by step and guidance scale, sorted."""
        found: dict[tuple[int, float], list[Estimate]] = {}
        for run in self.variants.get(variant, ()):
            for row in self.rows[run.name]:
                if compares(metric, self.reference, row) and (estimate := metric.of(row)):
                    place = row.step, row.protocol.guidance_scale
                    found.setdefault(place, []).append(estimate)
        return {place: mean_over_seeds(found[place]) for place in sorted(found)}

    def mean(self, variant: str, metric: Metric) -> SeedMean | None:
        """Return the mean at step and scale of `reference`; None if it was not measured."""
        return self.means(variant, metric).get(self.place)

    def has(self, metric: Metric) -> bool:
        """Return whether the metric was measured for any variant."""
        return any(self.mean(variant, metric) for variant in self.variants)


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
    series = series or series_of(main_series(rows)[0])
    reference = _choose_reference(members, series)
    # Figure 3 varies step and guidance scale; every other field must be equal.
    free = {"guidance_scale": reference.protocol.guidance_scale}
    for run in members:
        for row in run.rows:
            rescaled = replace(row.protocol, sampling=row.protocol.sampling | free)
            if row.protocol.name != reference.protocol.name:
                continue
            if reasons := "; ".join(differences(rescaled, reference.protocol)):
                excluded.append(f"{run.name} is left out at step {row.step:,}: {reasons}")
            else:
                kept[run.name].append(row)
    sheet = Sheet(variants=variants, reference=reference, rows=kept, excluded=excluded)
    where = f"{series} at step {reference.step:,}"
    excluded += [f"{r.name} has no comparable {where}" for r in members if not sheet.is_compared(r)]
    return sheet


def _choose_reference(runs: Sequence[Run], series: str) -> MetricsRow:
    last = [[row for row in run.rows if series_of(row) == series][-1:] for run in runs]
    candidates = [row for rows in last for row in rows]
    if not candidates:
        known = ", ".join(sorted({series_of(row) for run in runs for row in run.rows}))
        raise UserError(f"--series {series}: no run has this series; choose one of {known}")

    def num_comparable(row: MetricsRow) -> int:
        same_step = [other.protocol for other in candidates if other.step == row.step]
        return sum(not differences(row.protocol, protocol) for protocol in same_step)

    return max(candidates, key=num_comparable)


def series_of(row: MetricsRow) -> str:
    """Return NAME/wSCALE, for example `scenes/w1.5`."""
    return f"{row.protocol.name}/w{row.protocol.guidance_scale:g}"
