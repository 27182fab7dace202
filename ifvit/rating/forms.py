"""What a browser sends: the form of a question <=> an answer, refused when it is anything else."""

import urllib.parse
from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request

from ifvit.rating.answers import Answer
from ifvit.rating.study import MAX_COUNT, SKIP_REASONS, Task

_MAX_FORM_BYTES = 4096


def is_foreign(request: Request) -> bool:
    """Return whether the browser reports that the form is on a page of another site."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        return True
    return request.headers.get("sec-fetch-site", "same-origin") != "same-origin"


async def read_fields(request: Request) -> dict[str, str]:
    """Read the fields of a small form. Raises HTTPException with 400 or 413."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, "This form is too large.")
    try:
        fields = urllib.parse.parse_qsl(body.decode(), strict_parsing=True)
    except ValueError:
        raise HTTPException(400, "This is not a form.") from None
    if len(dict(fields)) < len(fields):
        raise HTTPException(400, "A field of this form occurs twice.")
    return dict(fields)


def read_answer(form: Mapping[str, str], task: Task, rater: int) -> Answer:
    """Convert a form with one field, `skip_reason`, `count` or `ranking`, into an answer.

    `ranking` lists places on the page from best to worst, counted from 0: "2,0,1".
    Raises HTTPException with 400 for any other form.
    """
    kind = task.item.kind
    value: int | tuple[str, ...] | None = None
    if set(form) == {"skip_reason"}:
        if form["skip_reason"] not in SKIP_REASONS[kind]:
            raise HTTPException(400, "This is not an answer: unknown reason.")
    elif kind == "preference" and set(form) == {"ranking"}:
        places = form["ranking"].split(",")
        if sorted(places) != [str(place) for place in range(len(task.shown))]:
            raise HTTPException(400, "This is not an answer: rank every image once.")
        value = tuple(task.shown[int(place)] for place in places)
    elif kind == "counting" and set(form) == {"count"}:
        text = form["count"]
        if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_COUNT))):
            raise HTTPException(400, f"This is not an answer: count from 0 to {MAX_COUNT}.")
        value = int(text)
    else:
        raise HTTPException(400, "This is not an answer: unknown fields.")
    return Answer(
        rater=rater,
        item=task.item.number,
        repetition=task.repetition,
        shown=task.shown,
        value=value,
        skip_reason=form.get("skip_reason"),
    )


def form_value(task: Task, answer: Answer | None) -> str:
    """Return the value of the form field that produces this answer."""
    if answer is None or answer.value is None:
        return ""
    if isinstance(answer.value, int):
        return str(answer.value)
    return ",".join(str(task.shown.index(name)) for name in answer.value)
