"""The verb `rate export`: a study's answers => a table of all that was shown."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ifvit import storage
from ifvit.errors import UserError
from ifvit.rating.config import RateExportConfig
from ifvit.rating.store import Answer, Store
from ifvit.rating.study import Study, read_study
from ifvit.sampling.files import write_jsonl


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
