"""What a rater sends, checked against what the rater was asked."""

from collections.abc import Mapping

from ifvit.rating.store import Answer
from ifvit.rating.study import Kind, Task

MAX_COUNT = 99
CANNOT_TELL = "cannot tell"
"""The reason behind its own button when counting."""

SKIP_REASONS: dict[Kind, tuple[str, ...]] = {
    "preference": ("too close to call", "text is unclear", "images do not load", "other"),
    "counting": ("object is unclear", "image does not load", "other"),
}


class FormError(ValueError):
    """A form that the page does not send; its message is for the sender."""


def read_form(form: Mapping[str, str], task: Task, rater: int) -> Answer:
    """The answer in a form: one of `skip_reason`, `count` and `ranking`.

    `ranking` holds places on the page from best to worst, counted from 0: "2,0,1".
    Raises FormError for anything else.
    """
    kind = task.item.kind
    field = "ranking" if kind == "preference" else "count"
    if set(form) == {"skip_reason"}:
        reason = form["skip_reason"]
        if reason not in SKIP_REASONS[kind] and (kind, reason) != ("counting", CANNOT_TELL):
            raise FormError("no such reason")
        return _answer(task, rater, None, reason)
    if set(form) != {field}:
        raise FormError(f"expected {field} or skip_reason")
    value = _read_ranking(form[field], task) if kind == "preference" else _read_count(form[field])
    return _answer(task, rater, value, None)


def _answer(
    task: Task, rater: int, value: int | tuple[str, ...] | None, skip_reason: str | None
) -> Answer:
    return Answer(
        rater=rater,
        item=task.item.number,
        repetition=task.repetition,
        shown=task.shown,
        value=value,
        skip_reason=skip_reason,
    )


def _read_count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT))):
        raise FormError(f"count must be a number from 0 to {MAX_COUNT}")
    return int(text)


def _read_ranking(text: str, task: Task) -> tuple[str, ...]:
    places = text.split(",")
    if sorted(places) != [str(place) for place in range(len(task.shown))]:
        raise FormError("ranking must name every image once")
    return tuple(task.shown[int(place)] for place in places)
