"""What the analyses of trained networks share: a file per run, a figure and a table of all runs."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from matplotlib.figure import Figure, SubFigure

from ifvit import storage
from ifvit.analysis.config import AttentionConfig, KnockoutConfig
from ifvit.errors import UserError
from ifvit.evaluation.runs import short_names
from ifvit.figures import house_style, literal, to_png
from ifvit.models.config import name_map
from ifvit.models.weights import find_weights, run_of
from ifvit.records import NonNegativeInt, Sha256, dump_csv, record


@record
class RunAnalysis:
    """The network that was analysed."""

    weights: str
    weights_sha256: Sha256
    step: NonNegativeInt
    fusion: str
    num_text_blocks: NonNegativeInt


Analysis = TypeVar("Analysis", bound=RunAnalysis)


def analyze_runs(
    config: AttentionConfig | KnockoutConfig,
    name: str,
    analyze: Callable[[str, str], Analysis],
    plot: Callable[[Mapping[str, Analysis]], Figure],
    tabulate: Callable[[Mapping[str, Analysis]], list[dict[str, Any]]],
) -> dict[str, Analysis]:
    """Call `analyze` with each run and the folder of its files; return run name => analysis.

    Each folder, or that of config.output, gets NAME.png and NAME.csv of all its runs.
    """
    found: dict[str, Analysis] = {}
    folders: dict[str, dict[str, Analysis]] = {}
    for run_name, run in zip(short_names(config.runs), config.runs, strict=True):
        home = config.output or run_of(find_weights(run)) or run
        storage.require_no_links_out(home)
        folder = storage.join(home, run_name if config.output else f"analysis/{name}")
        found[run_name] = one = analyze(run, folder)
        folders.setdefault(config.output or folder, {})[run_name] = one
    for folder, shown in folders.items():
        storage.write_bytes(storage.join(folder, f"{name}.png"), to_png(plot(shown)))
        storage.write_bytes(storage.join(folder, f"{name}.csv"), dump_csv(tabulate(shown)))
    return found


def find_equal(
    url: str, read: Callable[[str], Analysis], weights_sha256: str, fusion: str, protocol: object
) -> Analysis | None:
    """Read an analysis if it is of these weights and this protocol; None for a damaged file."""
    try:
        found: Any = read(url) if storage.exists(url) else None
    except UserError:  # the analysis was killed between two files
        return None
    same = (weights_sha256, fusion, protocol)  # some maps have equal tensors
    if not found or (found.weights_sha256, found.fusion, found.protocol) != same:
        return None
    sys.stdout.write(f"{url} exists\n")
    equal: Analysis = found
    return equal


def mean_columns(means: Mapping[str, Any]) -> dict[str, Any]:
    """Return two columns per mean: its value and its standard error; None where there is none."""
    columns = {}
    for name, mean in means.items():
        columns[name] = mean.value if mean else None
        columns[f"{name}_error"] = mean.standard_error if mean else None
    return columns


def plot_runs(
    found: Mapping[str, Analysis],
    size: tuple[float, float],
    plot_run: Callable[[SubFigure, Analysis], None],
    fontsize: float | str = "large",
) -> Figure:
    """Return a figure with a part of this size, in inches, per run; its title names the map."""
    with house_style():
        figure = Figure(figsize=(size[0], size[1] * len(found)), layout="constrained")
        parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
        for part, (name, one) in zip(parts, found.items(), strict=True):
            text_map = literal(name_map(one.fusion, one.num_text_blocks))
            title = f"{literal(name)}: {text_map}, step {one.step:,}"
            part.suptitle(title, fontsize=fontsize, fontweight="bold")
            plot_run(part, one)
    return figure
