"""The verb `count-objects`: runs and prompts => a row of counts per run, one figure, one table."""

import sys
from collections.abc import Mapping

from ifvit import storage
from ifvit.analysis.figure_style import to_png
from ifvit.analysis.object_count_figure import figure, table
from ifvit.analysis.runs import short_names
from ifvit.device import choose_device
from ifvit.evaluation.detector import open_counter
from ifvit.evaluation.metrics import Estimate
from ifvit.evaluation.object_count import (
    ObjectCountRow,
    count_objects,
    draw_objects,
    object_count_folder,
)
from ifvit.evaluation.object_count_config import ObjectCountConfig
from ifvit.evaluation.object_prompts import read_count_prompts


def count_objects_of_runs(config: ObjectCountConfig) -> dict[str, ObjectCountRow]:
    """Draw what is not drawn yet, count, write rows, object_count.png and .csv; rows by run.

    Of several processes (torchrun, srun) each draws a share, and the last to finish counts; the
    others return no rows. Raises UserError for prompts or objects that cannot be counted before
    anything is drawn.
    """
    prompts = read_count_prompts(config.prompts)
    counter = open_counter(config.detector, config.threshold, choose_device(config.device))
    counter.check(prompt.object for prompt in prompts)
    runs = dict(zip(short_names(config.runs), config.runs, strict=True))
    drawn = {
        name: draw_objects(
            config,
            run,
            prompts,
            storage.join(config.output, name) if config.output else object_count_folder(run),
        )
        for name, run in runs.items()
    }
    if not all(images.is_complete for images in drawn.values()):
        sys.stdout.write("the last process to finish drawing counts\n")
        return {}
    rows = {name: count_objects(config, images, prompts, counter) for name, images in drawn.items()}
    _write(config.output or "runs/object_count", rows)
    return rows


def _write(folder: str, rows: Mapping[str, ObjectCountRow]) -> None:
    url = storage.join(folder, "object_count.png")
    storage.write_bytes(url, to_png(figure(rows)))
    storage.write_bytes(storage.join(folder, "object_count.csv"), table(rows).encode())
    width = max(map(len, rows))
    for name, row in rows.items():
        overall = row.scores[0]
        numbers = _format(overall.average_error), _format(overall.match_ratio)
        sys.stdout.write(f"{name:{width}}  average error {numbers[0]}  match ratio {numbers[1]}\n")
    sys.stdout.write(f"{url}\n")


def _format(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
