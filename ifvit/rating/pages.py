"""HTML pages of a study, and its results in sentences; also the verb `rate report`.

`server` renders its pages with `render`; the templates are in the folder `pages`.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from ifvit import storage
from ifvit.rating.config import RateReportConfig
from ifvit.rating.results import (
    CountingResults,
    PreferenceResults,
    Replies,
    StudyResults,
    WinRate,
    read_results,
)
from ifvit.rating.study import Kind, read_study


def report(config: RateReportConfig) -> None:
    """Write results.json and report.html, a single page that needs no network.

    Raises UserError when there is no study.
    """
    study, results = read_study(config.study), read_results(config.study)
    style = files("ifvit.rating").joinpath("static", "style.css").read_text()
    findings = describe(results)
    page = render("report.html", study=study, results=results, findings=findings, style=style)
    storage.write_json(str(study.folder / "results.json"), asdict(results))
    storage.write_bytes(str(study.folder / "report.html"), page.encode())
    sys.stdout.write(f"{study.folder / 'report.html'}\n")


def render(template: str, **values: Any) -> str:
    """Render a template of the folder `pages`; text in `values` is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ifvit.rating", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment


def describe(results: StudyResults) -> dict[Kind, list[str]]:
    """Return sentences about the results of each kind of question; empty lists without answers."""
    preference, counting = results.preference, results.counting
    return {
        "preference": list(_describe_preference(preference)) if preference else [],
        "counting": list(_describe_counting(counting)) if counting else [],
    }


def _describe_preference(results: PreferenceResults) -> Iterator[str]:
    for rate in results.win_rates:
        yield _describe_win_rate(rate)
    yield _describe_alpha(results.alpha)
    p = results.order_bias.p_value
    yield (
        "The place on the page changed the rank, so the ranks do not depend on the images alone"
        if p < 0.05
        else "No sign that the place on the page changed the rank"
    ) + (
        f" (p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}, Friedman's test on "
        f"{results.order_bias.num_answers} rankings)."
    )
    yield from _describe_replies(results.replies, "pairs of images", "were put in the same order")


def _describe_win_rate(rate: WinRate) -> str:
    winner, loser, share = rate.first, rate.second, rate.share
    value, low, high = share.value, share.low, share.high
    if high < 0.5:
        winner, loser, value, low, high = loser, winner, 1 - value, 1 - high, 1 - low
    numbers = (
        f"{_percent(value)} of {share.num_samples} rankings "
        f"(95 % interval {_percent(low)} to {_percent(high)})"
    )
    if low > 0.5:
        return f"{winner} is preferred to {loser}: ranked above it in {numbers}."
    return f"No clear preference between {winner} and {loser}: {winner} is above in {numbers}."


def _describe_counting(results: CountingResults) -> Iterator[str]:
    overall = results.groups[0]
    for name, error in overall.average_error.items():
        match = overall.match_ratio[name]
        yield (
            f"{name}: off by {error.value:.2f} objects on average (95 % interval {error.low:.2f} "
            f"to {error.high:.2f}), the asked number in {_percent(match.value)} of "
            f"{match.num_samples} answers ({_percent(match.low)} to {_percent(match.high)})."
        )
    yield _describe_alpha(results.alpha)
    yield from _describe_replies(results.replies, "counts", "were the same number")


def _describe_alpha(alpha: float | None) -> str:
    """Describe the agreement by the thresholds of Krippendorff 2004."""
    if alpha is None:
        return "Agreement between raters is not defined yet: too few answers, or all are equal."
    level = "reliable" if alpha >= 0.8 else "tentative" if alpha >= 0.667 else "low"
    return (
        f"Agreement between raters is {level}: Krippendorff's alpha is {alpha:.2f} (1 is perfect)."
    )


def _describe_replies(replies: Replies, things: str, alike: str) -> Iterator[str]:
    if replies.consistency is not None:
        share = _percent(replies.consistency)
        yield f"In {replies.num_repeats} repeated questions, {share} of the {things} {alike}."
    reasons = ", ".join(f"{reason} {number}" for reason, number in replies.skips.items())
    share = _percent(sum(replies.skips.values()) / replies.num_shown)
    yield f"{share} of {replies.num_shown} questions were skipped{reasons and ': '}{reasons}."


def _percent(share: float) -> str:
    """Format a fraction as a percentage with a no-break space."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
