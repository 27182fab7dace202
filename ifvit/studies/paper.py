"""The verb `report paper`: run folders => the tables and figures of arXiv 2403.16530."""

import sys
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import read_runs
from ifvit.records import dump_csv
from ifvit.studies import paper_claims, paper_figures, paper_tables
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import read_counts
from ifvit.studies.report import inline_image, recipe_differences, render_page
from ifvit.studies.variants import PAPER_VARIANTS, VARIANTS, Sheet, Variant, make_sheet, series_of

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.conditioning", "backbone.num_")


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, each table as CSV, and each figure as PNG and CSV.

    The page names missing data, and the runs that are left out because they have no weights (their
    training failed). Raises UserError if no run is given, if a run is not one of the paper's
    variants, for an unknown baseline or series, and for a broken file.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    found = read_runs(config.runs)
    runs = [run for run in found if run.backbone] or found
    sheet = make_sheet(runs, config.series)
    curves = make_sheet(runs) if config.series else sheet
    baseline = _choose_baseline(sheet, config.baseline)
    best = _choose_best(sheet, baseline)
    counts, counts_excluded = read_counts(sheet.runs)
    counts_by_variant = sheet.group(counts)
    preference = _read_preference(config.study) if config.study else None
    claims = paper_claims.metric_claims(sheet) + paper_claims.count_claims(counts_by_variant)
    claims += paper_claims.preference_claims(preference) if preference else []
    tables = {
        "table1": paper_tables.table_1(sheet),
        "table1_further": paper_tables.table_further(sheet),
        "table2": paper_tables.table_2(sheet, {"baseline": baseline, "best": best}),
    }
    figures = {
        "figure3": paper_figures.figure_3(curves),
        "figure4": paper_figures.figure_4(sheet, baseline, best),
        "figure5": paper_figures.figure_5(counts_by_variant, counts_excluded),
        "figure6": paper_figures.figure_6(preference),
        "figure7": paper_figures.figure_7(sheet),
        "figure8": paper_figures.figure_8(sheet),
    }
    files = {f"{name}.csv": dump_csv(table.records) for name, table in tables.items() if table}
    files |= {f"{name}.png": figure.png for name, figure in figures.items() if figure.png}
    files |= {f"{name}.csv": figure.csv for name, figure in figures.items() if figure.csv}
    changed = [line.title for line in recipe_differences(runs)]
    files["paper.html"] = render_page(
        "paper.html",
        **_describe(sheet),
        tables=tables,
        claims=claims,
        figures=figures,
        inline_image=inline_image,
        no_weights=[run.name for run in found if run not in runs],
        excluded=list(dict.fromkeys(sheet.excluded + curves.excluded)),
        differences=[name for name in changed if not name.startswith(_MAY_DIFFER)],
    )
    for name, data in files.items():
        storage.write_bytes(storage.join(config.output, name), data)
    sys.stdout.write(f"{storage.join(config.output, 'paper.html')}\n")


def _read_preference(study: str) -> "PreferenceResults | None":
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"--study needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(study).preference


def _choose_baseline(sheet: Sheet, pattern: str | None) -> Variant:
    """Return the first variant whose slug matches the pattern; by default the first trained one."""
    found = [variant for variant in sheet.variants if fnmatch(variant.slug, pattern or "*")]
    if not found:
        known = ", ".join(variant.slug for variant in sheet.variants)
        raise UserError(f"--baseline {pattern}: no such variant; choose one of {known}")
    return found[0]


def _choose_best(sheet: Sheet, baseline: Variant) -> Variant:
    """Return the paper's variant of best quality except the baseline; the last if unmeasured."""
    others = [v for v in PAPER_VARIANTS if v in sheet.variants and v != baseline]
    metric = paper_claims.quality_metric(sheet)
    measured = {v: mean.value for v in others if (mean := sheet.mean(v, metric))}
    if measured:
        return min(measured, key=lambda variant: measured[variant])
    return others[-1] if others else baseline


def _describe(sheet: Sheet) -> dict[str, Any]:
    """Return what the page says about the variants and their evaluation."""
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    return {
        "title": "Intermediate fusion: the paper's tables and figures from our runs",
        "colours": paper_figures.VARIANT_COLOURS,
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
        "devices": paper_tables.devices(sheet),
        "reference": sheet.reference,
        "series": series_of(sheet.reference.protocol) if sheet.reference else None,
        "quality": paper_claims.quality_metric(sheet).title,
        "protocol": [(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
    }
