"""The verb `report paper`: run folders => the tables and figures of arXiv 2403.16530."""

import sys
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import read_runs
from ifvit.figures import to_csv
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import read_counts
from ifvit.studies.paper_claims import (
    count_claims,
    metric_claims,
    preference_claims,
    quality_metric,
)
from ifvit.studies.paper_figures import (
    VARIANT_COLOURS,
    figure_3,
    figure_4,
    figure_5,
    figure_6,
    figure_7,
    figure_8,
)
from ifvit.studies.paper_tables import devices, table_1, table_2, table_further
from ifvit.studies.report import inline_image, recipe_differences, render_page
from ifvit.studies.variants import (
    PAPER_VARIANTS,
    VARIANTS,
    Sheet,
    Variant,
    make_sheet,
    series_of,
)

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.conditioning", "backbone.num_")


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, and beside it each table as CSV, each figure as PNG and CSV.

    What is missing is named on the page. A run without weights, for its training failed, is left
    out and named. Raises UserError if no run is given, for runs that are not the paper's variants,
    an unknown baseline or series, and broken files.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    found = read_runs(config.runs)
    runs = [run for run in found if run.backbone] or found
    sheet = make_sheet(runs, config.series)
    curves = make_sheet(runs) if config.series else sheet
    baseline = _choose_baseline(sheet, config.baseline)
    best = _choose_best(sheet, baseline)
    count_rows, counts_excluded = read_counts(sheet.runs)
    counts = {
        variant: [count_rows[run.name] for run in members if run.name in count_rows]
        for variant, members in sheet.variants.items()
    }
    counts = {variant: rows for variant, rows in counts.items() if rows}
    preference = _read_preference(config.study) if config.study else None
    tables = [
        table_1(sheet),
        table_further(sheet),
        table_2(sheet, {"baseline": baseline, "best": best}),
    ]
    figures = {
        "figure3": figure_3(curves),
        "figure4": figure_4(sheet, baseline, best),
        "figure5": figure_5(counts, counts_excluded),
        "figure6": figure_6(preference),
        "figure7": figure_7(sheet),
        "figure8": figure_8(sheet),
    }
    for table in tables:
        if table:
            _write(config, f"{table.name}.csv", to_csv(table.records))
    for name, figure in figures.items():
        if figure.png and figure.csv:
            _write(config, f"{name}.png", figure.png)
            _write(config, f"{name}.csv", figure.csv)
    excluded = [f"{run.name} is left out: it has no weights" for run in found if run not in runs]
    changed = [line.title for line in recipe_differences(runs)]
    page = render_page(
        "paper.html",
        **_describe(sheet),
        tables={table.name: table for table in tables if table},
        claims=metric_claims(sheet)
        + count_claims(counts)
        + (preference_claims(preference) if preference else []),
        figures=figures,
        inline_image=inline_image,
        excluded=excluded + list(dict.fromkeys(sheet.excluded + curves.excluded)),
        differences=[name for name in changed if not name.startswith(_MAY_DIFFER)],
    )
    _write(config, "paper.html", page)
    sys.stdout.write(f"{storage.join(config.output, 'paper.html')}\n")


def _read_preference(study: str) -> "PreferenceResults | None":
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"--study needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(study).preference


def _choose_baseline(sheet: Sheet, pattern: str | None) -> Variant:
    """Return the first variant whose slug matches; without a pattern the first one trained."""
    found = [variant for variant in sheet.variants if fnmatch(variant.slug, pattern or "*")]
    if not found:
        known = ", ".join(variant.slug for variant in sheet.variants)
        raise UserError(f"--baseline {pattern}: no such variant; choose one of {known}")
    return found[0]


def _choose_best(sheet: Sheet, baseline: Variant) -> Variant:
    """Return the paper's variant of best quality, the baseline aside; the last if unmeasured."""
    others = [v for v in PAPER_VARIANTS if v in sheet.variants and v != baseline]
    metric = quality_metric(sheet)
    measured = {v: mean.value for v in others if (mean := sheet.mean(v, metric))}
    if measured:
        return min(measured, key=lambda variant: measured[variant])
    return others[-1] if others else baseline


def _describe(sheet: Sheet) -> dict[str, Any]:
    """Return what the page says about the variants and their evaluation."""
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    return {
        "title": "Intermediate fusion: the paper's tables and figures from our runs",
        "colours": VARIANT_COLOURS,
        "variants": [
            {
                "name": variant.title,
                "colour": VARIANTS.index(variant),
                "runs": [run.name for run in members],
            }
            for variant, members in sheet.variants.items()
        ],
        "num_runs": len(sheet.runs),
        "missing_variants": [v.title for v in PAPER_VARIANTS if v not in sheet.variants],
        "devices": devices(sheet),
        "reference": sheet.reference,
        "series": series_of(sheet.reference.protocol) if sheet.reference else None,
        "quality": quality_metric(sheet).title,
        "protocol": [(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
    }


def _write(config: PaperConfig, name: str, data: bytes) -> None:
    storage.write_bytes(storage.join(config.output, name), data)
