"""The verb `report paper`: run folders => the tables and figures of arXiv 2403.16530."""

import sys
from typing import TYPE_CHECKING

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import read_runs
from ifvit.records import dump_csv
from ifvit.studies import paper_claims, paper_figures, paper_tables
from ifvit.studies.config import PaperConfig
from ifvit.studies.object_counts import read_counts
from ifvit.studies.page import inline_image, legend_of, render_page
from ifvit.studies.report import recipe_differences
from ifvit.studies.variants import PAPER_VARIANTS, VARIANT_COLOURS, Sheet, make_sheet, title_of

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.fusion", "backbone.num_text_blocks")


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, each table as CSV, and each figure as PNG and CSV.

    The page names missing data, and the runs that are left out. Raises UserError if no run is one
    of the paper's variants, for an unknown series, and for a broken file.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    sheet = make_sheet(read_runs(config.runs), config.series)
    baseline = next(iter(sheet.variants))
    best = _choose_best(sheet, baseline)
    counts, counts_excluded = read_counts(sheet.runs)
    counts_by_variant = sheet.group(counts)
    preference = _read_preference(config.study) if config.study else None
    tables = {
        "table1": paper_tables.table_1(sheet),
        "table1_further": paper_tables.table_further(sheet),
        "table2": paper_tables.table_2(sheet, {"baseline": baseline, "best": best}),
    }
    figures = {
        "figure3": paper_figures.figure_3(sheet),
        "figure4": paper_figures.figure_4(sheet, baseline, best),
        "figure5": paper_figures.figure_5(counts_by_variant, counts_excluded),
        "figure6": paper_figures.figure_6(preference),
        "figure7": paper_figures.figure_7(sheet),
        "figure8": paper_figures.figure_8(sheet),
    }
    files = {f"{name}.csv": dump_csv(table.records) for name, table in tables.items() if table}
    files |= {f"{name}.png": figure.png for name, figure in figures.items() if figure.png}
    files |= {f"{name}.csv": figure.csv for name, figure in figures.items() if figure.csv}
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    changed = [line.title for line in recipe_differences(sheet.runs)]
    files["paper.html"] = render_page(
        "paper.html",
        title="Intermediate fusion: the paper's tables and figures from our runs",
        sheet=sheet,
        variants=[
            {"name": title_of(v), "colour": VARIANT_COLOURS[v], "runs": [r.name for r in runs]}
            for v, runs in sheet.variants.items()
        ],
        missing_variants=[title_of(v) for v in PAPER_VARIANTS if v not in sheet.variants],
        devices=paper_tables.devices(sheet),
        protocol=[(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
        tables=tables,
        claims=paper_claims.make_claims(sheet, counts_by_variant, preference),
        figures=figures,
        inline_image=inline_image,
        legend_of=legend_of,
        differences=[name for name in changed if name not in _MAY_DIFFER],
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


def _choose_best(sheet: Sheet, baseline: str) -> str:
    """Return the paper's variant of best quality except the baseline; the last if unmeasured."""
    others = [v for v in PAPER_VARIANTS if v in sheet.variants and v != baseline]
    measured = {v: mean.value for v in others if (mean := sheet.mean(v, sheet.quality))}
    return min(measured, key=lambda v: measured[v]) if measured else [baseline, *others][-1]
