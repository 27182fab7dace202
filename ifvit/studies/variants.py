"""Groups runs by the paper's variants and selects the evaluations that can be compared.

`report paper` builds its tables, figures and claims from the `Sheet` that `make_sheet` returns.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ifvit.errors import UserError
from ifvit.evaluation.rows import MetricsRow, Protocol, differences
from ifvit.evaluation.runs import FUSIONS, Run
from ifvit.models.config import Fusion, FusionTransformerConfig, setting_of
from ifvit.studies.comparisons import Metric, SeedMean, mean_over_seeds

_Found = TypeVar("_Found")

_PAPER_SCALE = 2.0
"""Guidance scale w of the paper's table: "a CFG scale of 1", for the paper prints w - 1."""


@dataclass(frozen=True, order=True)
class Variant:
    """A row of the paper's tables.

    Early fusion has neither image-only blocks nor a text branch, intermediate fusion has both.
    """

    conditioning: Fusion
    image_blocks: bool
    text_blocks: bool

    @property
    def fusion(self) -> str:
        """The paper's name; half an intermediate fusion is named by the blocks that it has."""
        return FUSIONS[self.image_blocks, self.text_blocks]

    @property
    def is_early(self) -> bool:
        """Whether text is fused from the first block, without a text branch."""
        return not (self.image_blocks or self.text_blocks)

    @property
    def path(self) -> str:
        """Mechanism by which the fused blocks attend to text: `concat` or `cross-attention`."""
        return self.conditioning.replace("_", "-")

    @property
    def title(self) -> str:
        """Name on the page."""
        return f"{self.path}, {self.fusion}".capitalize()

    @property
    def slug(self) -> str:
        """Name in files and flags."""
        return f"{self.conditioning}_{self.fusion}".replace(" ", "_")


PAPER_VARIANTS = (
    Variant("concat", False, False),
    Variant("concat", True, True),
    Variant("cross_attention", False, False),
    Variant("cross_attention", True, True),
)
"""The rows of Table 1 from top to bottom; the first is the paper's baseline."""
VARIANTS = (
    *PAPER_VARIANTS,
    Variant("cross_attention", True, False),
    Variant("cross_attention", False, True),
    Variant("concat", True, False),
    Variant("concat", False, True),
)


def group_runs(runs: Iterable[Run]) -> dict[Variant, list[Run]]:
    """Return the variants in the paper's order, each with its runs in the given order.

    Raises UserError for a run without weights, for a backbone that is not one of the paper's
    kinds, and for two backbones of different shape that are the same variant.
    """
    groups: dict[Variant, list[Run]] = {variant: [] for variant in VARIANTS}
    for run in runs:
        backbone = backbone_of(run)
        slug = setting_of(backbone)
        groups[next(variant for variant in VARIANTS if variant.slug == slug)].append(run)
    for variant, members in groups.items():
        # The initial standard deviation does not change the shape.
        if len({replace(backbone_of(run), init_std=1.0) for run in members}) > 1:
            names = ", ".join(run.url for run in members)
            raise UserError(f"{names}: {variant.title} has two shapes; report them one by one")
    return {variant: members for variant, members in groups.items() if members}


def backbone_of(run: Run) -> FusionTransformerConfig:
    """Return the run's backbone. Raises UserError if it is not one of the paper's kinds."""
    backbone = run.backbone
    if not isinstance(backbone, FusionTransformerConfig) or setting_of(backbone) is None:
        raise UserError(
            f"{run.url}/weights: no backbone that fuses text by concat or cross_attention alone, "
            "so the run is not one of the paper's variants; leave this run out"
        )
    return backbone


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The runs of each variant, and their evaluations that can be compared with `reference`."""

    variants: dict[Variant, list[Run]]
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

    def group(self, found: Mapping[str, _Found]) -> dict[Variant, list[_Found]]:
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
        self,
        variant: Variant,
        metric: Metric,
        *,
        step: int | None = None,
        scale: float | None = None,
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

    def over_steps(self, variant: Variant, metric: Metric) -> dict[int, SeedMean]:
        """Return means by training step, at the guidance scale of `reference`."""
        steps = sorted({row.step for row in self._rows_of(variant)})
        return {s: mean for s in steps if (mean := self.mean(variant, metric, step=s))}

    def over_guidance(self, variant: Variant, metric: Metric) -> dict[float, SeedMean]:
        """Return means by guidance scale, at the step of `reference`."""
        scales = sorted({row.protocol.guidance_scale for row in self._rows_of(variant)})
        return {s: mean for s in scales if (mean := self.mean(variant, metric, scale=s))}

    def _rows_of(self, variant: Variant) -> list[MetricsRow]:
        return [row for run in self.variants.get(variant, []) for row in self.rows[run.name]]


def make_sheet(runs: Sequence[Run], series: str | None = None) -> Sheet:
    """Group the runs by variant and select the evaluations that can be compared.

    `series` is NAME/wSCALE, a folder in RUN/evaluation. The default is the series with most rows;
    among equals, the one whose guidance scale is nearest to the paper's. `reference` is the last
    row of some run in this series: the one that can be compared with the last rows of most runs.
    Raises UserError for runs that `group_runs` refuses and for a series that no run has.
    """
    variants = group_runs(runs)
    kept: dict[str, list[MetricsRow]] = {run.name: [] for run in runs}
    rows = [row for run in runs for row in run.rows]
    if not rows:
        return Sheet(variants=variants, reference=None, rows=kept, excluded=[])
    series = series or _main_series(rows)
    last = [row for run in runs for row in _rows_of_series(run, series)[-1:]]
    if not last:
        known = ", ".join(sorted({series_of(row.protocol) for row in rows}))
        raise UserError(f"--series {series}: no run has this series; choose one of {known}")
    reference = max(last, key=lambda row: sum(not _mismatches(row, other) for other in last))
    excluded = []
    for run in runs:
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


def _main_series(rows: Sequence[MetricsRow]) -> str:
    counts = Counter(series_of(row.protocol) for row in rows)
    scales = {series_of(row.protocol): row.protocol.guidance_scale for row in rows}
    return min(counts, key=lambda name: (-counts[name], abs(scales[name] - _PAPER_SCALE), name))


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
