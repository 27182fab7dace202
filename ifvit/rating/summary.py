"""The verbs `rate report` and `rate export`: a study's answers as a page or a table."""

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.errors import UserError
from ifvit.rating.config import RateExportConfig, RateReportConfig
from ifvit.rating.pages import describe, render, style_sheet
from ifvit.rating.results import read_results
from ifvit.rating.store import Answer, Store
from ifvit.rating.study import Study, read_study
from ifvit.sampling.samples import write_jsonl


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


def export(config: RateExportConfig) -> None:
    """Write the current answers, oldest first. Raises UserError when there are none."""
    study = read_study(config.study)
    store = Store(study.folder)
    rows = [row for answer in store.answers() for row in _rows(study, answer)]
    store.close()
    if not rows:
        raise UserError(f"{config.study}: no answers yet; serve it with ifvit rate serve")
    if Path(config.output).suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        storage.write_bytes(config.output, text.getvalue().encode())
    else:
        write_jsonl(config.output, rows)
    sys.stdout.write(f"{config.output}: {len(rows)} rows\n")


def _rows(study: Study, answer: Answer) -> Iterator[dict[str, Any]]:
    """One row per image shown; `place` on the page and `rank` count from 1."""
    item = study.items[answer.item]
    for place, blind in enumerate(answer.shown, 1):
        ranking = answer.value if isinstance(answer.value, tuple) else None
        yield {
            "rater": answer.rater,
            "kind": item.kind,
            "item": item.number,
            "prompt": item.prompt,
            "position": item.position,
            "object": item.object,
            "asked_count": item.count,
            "repetition": answer.repetition,
            "place": place,
            "model": study.names[blind],
            "count": answer.value if isinstance(answer.value, int) else None,
            "rank": ranking.index(blind) + 1 if ranking else None,
            "skip_reason": answer.skip_reason,
            "answered_at": answer.answered_at,
        }
