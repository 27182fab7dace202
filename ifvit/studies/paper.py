"""The verb `report paper`: run folders => the tables and figures of arXiv 2403.16530."""

import sys
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from ifvit import storage
from ifvit.errors import UserError
from ifvit.evaluation.rows import describe_field, describe_value
from ifvit.evaluation.runs import read_runs
from ifvit.studies.config import PaperConfig
from ifvit.studies.paper_claims import (
    compare_with_claims,
    count_claims,
    preference_claims,
    read_counts,
)
from ifvit.studies.paper_figures import SETTING_COLOURS, make_exhibits
from ifvit.studies.paper_panels import quality_metric
from ifvit.studies.paper_tables import devices, table_1, table_2, table_further
from ifvit.studies.report import inline_bytes, render
from ifvit.studies.sheet import Sheet, make_sheet, series_of
from ifvit.studies.tables import recipe_differences, to_csv
from ifvit.studies.variants import PAPER_SETTINGS, SETTINGS, Setting

if TYPE_CHECKING:
    from ifvit.rating.results import PreferenceResults

_MAY_DIFFER = ("run", "seed", "backbone.conditioning", "backbone.num_")


def report_paper(config: PaperConfig) -> None:
    """Write OUTPUT/paper.html, and each table as CSV, each figure as PNG and CSV, beside it.

    What the runs lack is a named hole; a run without weights, whose training failed, is left out
    by name. Raises UserError for no runs, runs that make no setting, a baseline or series that
    there is not, and files that are broken.
    """
    if not config.runs:
        raise UserError("report paper: no runs given; name at least one run folder")
    found = read_runs(config.runs)
    runs = [run for run in found if run.backbone] or found
    sheet = make_sheet(runs, config.series)
    baseline = _choose_baseline(sheet, config.baseline)
    best = _choose_best(sheet, baseline)
    made = (
        table_1(sheet),
        table_further(sheet),
        table_2(sheet, {"baseline": baseline, "best": best}),
    )
    tables = {table.name: table for table in made if table}
    counts = read_counts(sheet)
    preference = _read_preference(config.study) if config.study else None
    claims = compare_with_claims(sheet) + count_claims(counts)
    claims += preference_claims(preference) if preference else []
    curves = make_sheet(runs) if config.series else sheet
    exhibits = make_exhibits(sheet, curves, baseline, best, counts, preference)
    for table in tables.values():
        _write(config, f"{table.name}.csv", to_csv(table.records))
    for exhibit in exhibits:
        if exhibit.png and exhibit.csv:
            _write(config, f"{exhibit.name}.png", exhibit.png)
            _write(config, f"{exhibit.name}.csv", exhibit.csv)
    page = render(
        "paper.html",
        **_describe(sheet),
        tables=tables,
        claims=claims,
        exhibits=[(e, inline_bytes(e.png) if e.png and not e.panels else None) for e in exhibits],
        excluded=[
            *(f"{run.name} is left out: it has no weights" for run in found if run not in runs),
            *dict.fromkeys(sheet.excluded + curves.excluded),
        ],
        differences=[
            line.title
            for line in recipe_differences(runs)
            if not line.title.startswith(_MAY_DIFFER)
        ],
    )
    _write(config, "paper.html", page)
    sys.stdout.write(f"{storage.join(config.output, 'paper.html')}\n")


def _read_preference(study: str) -> "PreferenceResults | None":
    try:
        from ifvit.rating.results import read_results
    except ModuleNotFoundError as error:
        raise UserError(f"--study needs {error.name}: pip install 'ifvit[rate]'") from None
    return read_results(study).preference


def _choose_baseline(sheet: Sheet, pattern: str | None) -> Setting:
    """The first setting whose slug matches; without a pattern the paper's, if it was trained."""
    found = [s for s in sheet.settings if fnmatch(s.slug, pattern or "*")]
    if not found:
        known = ", ".join(setting.slug for setting in sheet.settings)
        raise UserError(f"--baseline {pattern}: no such setting; choose one of {known}")
    return found[0]


def _choose_best(sheet: Sheet, baseline: Setting) -> Setting:
    """Of the paper's other settings the one of best quality; the last one if none was measured."""
    others = [s for s in PAPER_SETTINGS if s in sheet.settings and s != baseline]
    metric = quality_metric(sheet)
    measured = {s: mean.value for s in others if (mean := sheet.mean(s, metric))}
    if measured:
        return min(measured, key=lambda setting: measured[setting])
    return others[-1] if others else baseline


def _describe(sheet: Sheet) -> dict[str, Any]:
    """What the page says of its settings and of how they were evaluated."""
    protocol = sheet.reference.protocol.facts if sheet.reference else {}
    return {
        "title": "Intermediate fusion: the paper's tables and figures from our runs",
        "colours": SETTING_COLOURS,
        "settings": [
            {
                "name": setting.title,
                "colour": SETTINGS.index(setting),
                "runs": [run.name for run in members],
                "num_runs": len(members),
            }
            for setting, members in sheet.settings.items()
        ],
        "missing": [s.title for s in PAPER_SETTINGS if s not in sheet.settings],
        "devices": devices(sheet),
        "reference": sheet.reference,
        "series": series_of(sheet.reference.protocol) if sheet.reference else None,
        "quality": quality_metric(sheet).title,
        "protocol": [(describe_field(k), describe_value(k, v)) for k, v in protocol.items()],
    }


def _write(config: PaperConfig, name: str, data: bytes) -> None:
    storage.write_bytes(storage.join(config.output, name), data)
