"""Where rows of metrics lie: RUN/evaluation/PROTOCOL/wSCALE/step_XXXXXXXX.json.

The samples of a row lie beside it, in the folder of the same name without `.json`.
"""

import re
from collections import Counter
from collections.abc import Sequence

from ifvit import storage
from ifvit.evaluation.metrics import MetricsRow, read_row

FOLDER = "evaluation"
"""Of a run, where its rows are."""


def row_url(folder: str, protocol: str, guidance_scale: float, step: int) -> str:
    """`RUN/evaluation`, `scenes`, 1.5, 500 => `RUN/evaluation/scenes/w1.5/step_00000500.json`."""
    return storage.join(folder, protocol, f"w{guidance_scale:g}", f"step_{step:08d}.json")


def samples_url(row: str) -> str:
    """The folder of the samples that the row at URL `row` measures."""
    return row.removesuffix(".json")


def read_rows(folder: str) -> dict[str, MetricsRow]:
    """All rows below `folder` by URL, sorted by protocol name, guidance scale and step.

    Raises UserError for a file that should be a row and is none.
    """
    urls = [
        storage.join(folder, protocol, scale, name)
        for protocol in storage.list_names(folder)
        for scale in storage.list_names(storage.join(folder, protocol))
        if re.fullmatch(r"w[\d.e+-]+", scale)
        for name in storage.list_names(storage.join(folder, protocol, scale))
        if re.fullmatch(r"step_\d+\.json", name)
    ]
    rows = {url: read_row(url) for url in urls}
    return dict(sorted(rows.items(), key=lambda item: (*_series(item[1]), item[1].step)))


def main_series(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    """The rows of the protocol name and guidance scale that most rows have, in their order.

    Of several, the first by name, then the smallest scale.
    """
    counts = Counter(map(_series, rows))
    main = min(counts, key=lambda series: (-counts[series], series), default=None)
    return [row for row in rows if _series(row) == main]


def _series(row: MetricsRow) -> tuple[str, float]:
    return row.protocol.name, row.protocol.guidance_scale
