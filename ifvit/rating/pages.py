"""HTML pages of a study, and its results in sentences."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader

from ifvit.rating.results import CountingResults, PreferenceResults, Replies, StudyResults, WinRate

_SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """What is said of each kind of question; empty where nothing has been answered."""

    preference: list[str]
    counting: list[str]


def describe(results: StudyResults) -> Sentences:
    """All sentences about a study."""
    preference, counting = results.preference, results.counting
    return Sentences(
        preference=list(_of_preference(preference)) if preference else [],
        counting=list(_of_counting(counting)) if counting else [],
    )


def _of_preference(results: PreferenceResults) -> Iterator[str]:
    for rate in results.win_rates:
        yield _of_win_rate(rate)
    yield _of_alpha(results.alpha)
    bias = results.order_bias
    found = (
        "Raters preferred places on the page: their ranks are not of the images alone"
        if bias.p_value < _SIGNIFICANT
        else "No sign that the place on the page decided the rank"
    )
    yield f"{found} ({_p(bias.p_value)}, Friedman's test on {bias.num_answers} rankings)."
    yield from _of_replies(results.replies, "pairs of images", "were put in the same order")


def _of_win_rate(rate: WinRate) -> str:
    share = rate.share
    numbers = (
        f"{percent(share.value)} of {share.num_samples} rankings "
        f"(95 % interval {percent(share.low)} to {percent(share.high)})"
    )
    if share.low > 0.5:
        return f"{rate.first} is preferred to {rate.second}: above it in {numbers}."
    if share.high < 0.5:
        mirrored = (
            f"{percent(1 - share.value)} of {share.num_samples} rankings "
            f"(95 % interval {percent(1 - share.high)} to {percent(1 - share.low)})"
        )
        return f"{rate.second} is preferred to {rate.first}: above it in {mirrored}."
    return f"{rate.first} and {rate.second} are not told apart: the first is above in {numbers}."


def _of_counting(results: CountingResults) -> Iterator[str]:
    everything = results.groups[0]
    for name, error in everything.average_error.items():
        match = everything.match_ratio[name]
        yield (
            f"{name}: off by {error.value:.2f} objects on average (95 % interval {error.low:.2f} "
            f"to {error.high:.2f}), the asked number in {percent(match.value)} of "
            f"{match.num_samples} answers ({percent(match.low)} to {percent(match.high)})."
        )
    yield _of_alpha(results.alpha)
    yield from _of_replies(results.replies, "counts", "were the same number")


def _of_alpha(alpha: float | None) -> str:
    """In the words of Krippendorff 2004, who relies on .800 and above."""
    if alpha is None:
        return "Agreement between raters is not defined yet: too few answers, or all alike."
    word = "reliable" if alpha >= 0.8 else "tentative" if alpha >= 0.667 else "low"
    return (
        f"Agreement between raters is {word}: Krippendorff's alpha is {alpha:.2f} (1 is perfect)."
    )


def _of_replies(replies: Replies, things: str, alike: str) -> Iterator[str]:
    if replies.consistency is not None:
        share = percent(replies.consistency)
        yield f"Asked again ({replies.num_repeats} questions), {share} of the {things} {alike}."
    reasons = ", ".join(f"{reason} {number}" for reason, number in replies.skips.items())
    share = percent(replies.num_skipped / replies.num_shown)
    yield f"{share} of {replies.num_shown} questions were skipped{reasons and ': '}{reasons}."


def percent(share: float) -> str:
    """A share in per cent that no line break tears apart."""
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def render(template: str, **values: Any) -> str:
    """The page; text in `values` is escaped."""
    return _environment().get_template(template).render(**values)


def style_sheet() -> str:
    """The pages' one style sheet, for files that carry it within."""
    return files("ifvit.rating").joinpath("static", "style.css").read_text()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("ifvit.rating", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment
