"""The verb `rate report`: a study's answers => a page and its numbers."""

import sys
from dataclasses import asdict

from ifvit import storage
from ifvit.rating.config import RateReportConfig
from ifvit.rating.pages import render, style_sheet
from ifvit.rating.results import read_results
from ifvit.rating.sentences import describe
from ifvit.rating.study import read_study


def report(config: RateReportConfig) -> None:
    """Write report.html, which needs no network, and results.json. Raises UserError as read."""
    study, results = read_study(config.study), read_results(config.study)
    page = render(
        "report.html",
        study=study,
        results=results,
        said=describe(results),
        style=style_sheet(),
    )
    storage.write_json(str(study.folder / "results.json"), asdict(results))
    storage.write_bytes(str(study.folder / "report.html"), page.encode())
    sys.stdout.write(f"{study.folder / 'report.html'}\n")
