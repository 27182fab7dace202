"""The verb `rate serve`: serves the raters' pages and the admin's page over HTTP.

There are no cookies: the secret in a link is all that identifies a rater or the admin.
"""

import asyncio
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifvit.errors import UserError
from ifvit.rating.answers import Answer, Store
from ifvit.rating.config import ServeConfig
from ifvit.rating.limits import (
    MAX_HEAD_BYTES,
    Allowance,
    LimitedConnection,
    connection_limit,
    raise_file_limit,
)
from ifvit.rating.results import StudyResults, render, summarise
from ifvit.rating.study import (
    CANNOT_TELL,
    MAX_COUNT,
    SKIP_REASONS,
    Study,
    Task,
    check_images,
    read_study,
)
from ifvit.records import path_inside

_REQUESTS_PER_SECOND = 20.0
_REQUEST_BURST = 200.0
"""A page with six images takes nine requests."""
_REFUSAL_SECONDS = 1.0
"""Pause before a refusal, so that a flood costs little."""
_MAX_FORM_BYTES = 4096
_STATIC = {path.name: path for path in Path(__file__).parent.joinpath("static").iterdir()}
_ADMIN_SHARE = 0.1
"""Largest share of the time that the computation of results may take."""
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # A rater's address contains a secret code; other sites and search engines must not see it.
    "Referrer-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_UNKNOWN = "This link is not known here. Please check it, or ask for another one."


def serve(config: ServeConfig) -> None:
    """Serve requests until interrupted. Raises UserError without a sound study or a free port."""
    study = read_study(config.study)
    check_images(study)
    store = Store(study.folder)
    app = _make_app(study, store)
    listener = _listen(config)
    url = f"http://{config.host}:{listener.getsockname()[1]}"
    sys.stdout.write(f"{config.study} at {url}\nadmin: {url}/admin/{store.admin_token()}\n")
    sys.stdout.write(f"raters: ifvit rate create {config.study} --url {url}\n")
    sys.stdout.flush()
    raise_file_limit()
    # There is no access log, because it would contain the secret codes. No X-Forwarded header is
    # trusted, because nothing depends on the client's address.
    settings = uvicorn.Config(
        app,
        http=LimitedConnection,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=connection_limit(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(settings).run(sockets=[listener])
    store.close()


def _listen(config: ServeConfig) -> socket.socket:
    """Open the socket; requests wait from now on until the server has started."""
    try:
        return socket.create_server((config.host, config.port))
    except (OSError, TypeError) as error:
        raise UserError(
            f"{config.host}:{config.port}: cannot listen ({error}); give another --host or --port"
        ) from None


def _make_app(study: Study, store: Store) -> Starlette:
    site = _Site(study, store)
    app = Starlette(
        routes=[
            Route("/", site.front),
            Route("/r/{code}", site.start),
            Route("/r/{code}/{number}", site.question),
            Route("/r/{code}/{number}", site.answer, methods=["POST"]),
            Route("/r/{code}/images/{name}", site.image),
            Route("/admin/{token}", site.admin),
            Route("/static/{name}", _static),
        ],
        middleware=[Middleware(_Gate, store=store)],
        exception_handlers={HTTPException: _error_page, UserError: _failure_page},
    )
    app.router.redirect_slashes = False
    return app


class _Gate:
    """Adds the security headers, and refuses the requests of a rater beyond the allowance."""

    def __init__(self, app: ASGIApp, store: Store) -> None:
        self._app = app
        self._store = store
        self._allowance = Allowance(_REQUESTS_PER_SECOND, _REQUEST_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                is_static = scope["path"].startswith("/static/")
                headers.setdefault("Cache-Control", "max-age=600" if is_static else "no-store")
            await send(message)

        answer = self._app
        try:
            if not self._is_allowed(scope["path"]):
                await asyncio.sleep(_REFUSAL_SECONDS)
                answer = Response("Too many requests.", 429, {"Retry-After": "1"})
        except UserError as error:
            answer = await _failure_page(Request(scope), error)
        await answer(scope, receive, send_with_headers)

    def _is_allowed(self, path: str) -> bool:
        """Count a request of a known rater against the allowance."""
        parts = path.split("/")
        rater = self._store.find_rater(parts[2]) if parts[1:2] == ["r"] and parts[2:] else None
        return rater is None or self._allowance.take(rater)


async def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _STATIC:
        raise HTTPException(404, "There is no such file.")
    return FileResponse(_STATIC[name])


async def _error_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    page = render("message.html", title="This did not work", text=error.detail)
    return HTMLResponse(page, status_code=error.status_code)


async def _failure_page(request: Request, error: Exception) -> Response:
    """Tell the admin on the terminal what is wrong, such as a full disk, and the rater to wait."""
    sys.stderr.write(f"{error}\n")
    text = "The server cannot save or read answers now. Please try again later."
    return HTMLResponse(render("message.html", title="Please wait", text=text), status_code=503)


@dataclass(frozen=True)
class _Visit:
    """A request of a known rater."""

    code: str
    rater: int
    tasks: list[Task]
    answered: set[int]
    """Indices in `tasks` of those with an answer."""

    @property
    def next(self) -> int | None:
        """Index of the first task without an answer; None when all are answered."""
        return next((n for n in range(len(self.tasks)) if n not in self.answered), None)

    def find_place(self, request: Request) -> int:
        """Index of the task that the address names, counted there from 1."""
        number = request.path_params["number"]
        places = {str(place + 1): place for place in range(len(self.tasks))}
        if number not in places:
            raise HTTPException(404, "There is no such question.")
        return places[number]


class _Site:
    """The pages of one study. Starlette calls the synchronous methods in threads."""

    def __init__(self, study: Study, store: Store) -> None:
        self._study = study
        self._store = store
        self._images = study.image_files
        self._tasks = cache(study.tasks)
        self._token = store.admin_token().encode()
        self._results: tuple[int, StudyResults] | None = None
        """Change count of the store, and the results at that time."""
        self._next_results = 0.0
        self._computing = threading.Lock()

    def front(self, request: Request) -> Response:
        text = "Please open the link that you were given: it contains your personal code."
        return HTMLResponse(render("message.html", title="Image ratings", text=text))

    def start(self, request: Request) -> Response:
        """Show the first or the last page, or redirect to the first question without an answer."""
        visit = self._visit(request)
        if visit.answered and visit.next is not None:
            return RedirectResponse(f"/r/{visit.code}/{visit.next + 1}", status_code=303)
        name = "done.html" if visit.next is None else "welcome.html"
        return HTMLResponse(render(name, visit=visit))

    def question(self, request: Request) -> Response:
        """Show a question with the earlier answer, if there is one."""
        visit = self._visit(request)
        place = visit.find_place(request)
        if visit.next is not None and place > visit.next:
            return RedirectResponse(f"/r/{visit.code}", status_code=303)
        task = visit.tasks[place]
        page = render(
            f"{task.item.kind}.html",
            visit=visit,
            number=place + 1,
            task=task,
            earlier=self._store.find(visit.rater, task.item.number, task.repetition),
            skip_reasons=SKIP_REASONS[task.item.kind],
            cannot_tell=CANNOT_TELL,
            max_count=MAX_COUNT,
        )
        return HTMLResponse(page)

    async def answer(self, request: Request) -> Response:
        """Store the answer to a question; the response is sent after the commit."""
        if _is_foreign(request):
            raise HTTPException(403, "This form comes from another site.")
        try:
            form = await _read_form(request)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        return await run_in_threadpool(self._record, request, form)

    def _record(self, request: Request, form: dict[str, str]) -> Response:
        visit = self._visit(request)
        place = visit.find_place(request)
        if visit.next is not None and place > visit.next:
            raise HTTPException(409, "An earlier question has no answer yet.")
        self._store.add(read_answer(form, visit.tasks[place], visit.rater))
        return RedirectResponse(f"/r/{visit.code}", status_code=303)

    def image(self, request: Request) -> Response:
        """Send an image of the study to a rater; no other file is sent."""
        self._rater(request)
        name = request.path_params["name"]
        if name not in self._images:
            raise HTTPException(404, "There is no such image.")
        path = path_inside(self._study.folder, f"images/{name}")
        if not path.is_file():
            raise HTTPException(404, "There is no such image.")
        # The name is a hash of the content, so the browser may keep the image.
        return FileResponse(path, headers={"Cache-Control": "private, max-age=86400, immutable"})

    def admin(self, request: Request) -> Response:
        token = request.path_params["token"].encode()
        if not secrets.compare_digest(token, self._token):
            raise HTTPException(404, _UNKNOWN)
        page = render("admin.html", study=self._study, results=self._current_results())
        return HTMLResponse(page)

    def _current_results(self) -> StudyResults:
        """Return the results, computed again when answers came and time allows."""
        with self._computing:
            started, changes = time.monotonic(), self._store.change_count()
            is_old = self._results is None or self._results[0] != changes
            if self._results is None or (is_old and started >= self._next_results):
                self._results = changes, summarise(self._study, self._store)
                now = time.monotonic()
                self._next_results = now + (now - started) / _ADMIN_SHARE
            return self._results[1]

    def _rater(self, request: Request) -> int:
        rater = self._store.find_rater(request.path_params["code"])
        if rater is None:
            raise HTTPException(404, _UNKNOWN)
        return rater

    def _visit(self, request: Request) -> _Visit:
        rater = self._rater(request)
        tasks = self._tasks(rater)
        answered = self._store.answered(rater)
        keys = [(task.item.number, task.repetition) for task in tasks]
        places = {place for place, key in enumerate(keys) if key in answered}
        return _Visit(request.path_params["code"], rater, tasks, places)


def _is_foreign(request: Request) -> bool:
    """Return whether the browser reports that the form is on a page of another site."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        return True
    return request.headers.get("sec-fetch-site", "same-origin") != "same-origin"


async def _read_form(request: Request) -> dict[str, str]:
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
    value: int | tuple[str, ...] | None = None
    try:
        [(name, text)] = form.items()
        if name == "ranking":
            at = {str(place): model for place, model in enumerate(task.shown)}
            value = tuple(at[place] for place in text.split(","))
        elif name == "count" and text.isascii() and text.isdigit():
            value = int(text)
        elif name != "skip_reason":
            raise ValueError(name)
        answer = Answer(
            rater=rater,
            item=task.item.number,
            repetition=task.repetition,
            shown=task.shown,
            value=value,
            skip_reason=form.get("skip_reason"),
        )
    except (KeyError, ValueError):
        answer = None
    if answer is None or not answer.fits(task):
        raise HTTPException(400, "This is not an answer to this question.")
    return answer
