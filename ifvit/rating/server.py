"""The verb `rate serve`: the raters' pages and the admin's, over HTTP."""

import secrets
import socket
import sys
import urllib.parse
from dataclasses import dataclass
from importlib.resources import files

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ifvit.errors import UserError
from ifvit.rating.config import ServeConfig
from ifvit.rating.forms import CANNOT_TELL, MAX_COUNT, SKIP_REASONS, FormError, read_form
from ifvit.rating.pages import describe, render
from ifvit.rating.results import StudyResults, summarise
from ifvit.rating.store import Answer, Store
from ifvit.rating.study import Study, Task, read_study

_MAX_FORM_BYTES = 4096
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    # The raters' codes stand in the address: no other site and no search engine learns them.
    "Referrer-Policy": "same-origin",
    "X-Robots-Tag": "noindex",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class SecurityHeaders:
    """Adds _HEADERS to every response that does not say otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def is_foreign(request: Request) -> bool:
    """Whether a browser says that the form stands on another site's page."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
        return True
    return request.headers.get("sec-fetch-site", "same-origin") != "same-origin"


async def read_fields(request: Request) -> dict[str, str]:
    """The fields of a small form; repeated ones are no form of ours.

    Raises HTTPException with 400 or 413.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            raise HTTPException(413, "This form is too large.")
    try:
        fields = urllib.parse.parse_qsl(body.decode(), strict_parsing=True)
    except ValueError:
        raise HTTPException(400, "This is no form.") from None
    if len(dict(fields)) < len(fields):
        raise HTTPException(400, "This form says something twice.")
    return dict(fields)


def serve(config: ServeConfig) -> None:
    """Answer requests until interrupted; prints the admin's link.

    Raises UserError when there is no study, or when the port is not free.
    """
    study = read_study(config.study)
    store = Store(study.folder)
    listener = _listen(config)
    url = f"http://{config.host}:{listener.getsockname()[1]}"
    sys.stdout.write(f"{config.study} at {url}\nadmin: {url}/admin/{store.admin_token()}\n")
    sys.stdout.write(f"raters: ifvit rate links {config.study} --url {url}\n")
    sys.stdout.flush()
    # The access log would hold the secret codes.
    settings = uvicorn.Config(
        _make_app(study, store), log_level="warning", access_log=False, server_header=False
    )
    uvicorn.Server(settings).run(sockets=[listener])
    store.close()


def _make_app(study: Study, store: Store) -> ASGIApp:
    """The pages of one study."""
    site = _Site(study, store)
    static = StaticFiles(directory=str(files("ifvit.rating").joinpath("static")))
    return Starlette(
        routes=[
            Route("/", site.front),
            Route("/r/{code}", site.start),
            Route("/r/{code}/{number:int}", site.question),
            Route("/r/{code}/{number:int}", site.answer, methods=["POST"]),
            Route("/r/{code}/images/{name}", site.image),
            Route("/admin/{token}", site.admin),
            Mount("/static", static),
        ],
        middleware=[Middleware(SecurityHeaders)],
        exception_handlers={HTTPException: _error_page},
    )


@dataclass(frozen=True)
class _Visit:
    """A known rater: all tasks, and the answers by place in that list."""

    code: str
    rater: int
    tasks: list[Task]
    answers: dict[int, Answer]

    @property
    def next(self) -> int | None:
        """Place of the first task without an answer; None when all are answered."""
        return next((n for n in range(len(self.tasks)) if n not in self.answers), None)


class _Site:
    """The pages; synchronous ones run in threads."""

    def __init__(self, study: Study, store: Store) -> None:
        self._study = study
        self._store = store
        self._images = study.image_files
        self._results: tuple[int, StudyResults] | None = None

    def front(self, request: Request) -> Response:
        """The address without a code."""
        return HTMLResponse(render("message.html", title="Image ratings", text=_NO_CODE))

    def start(self, request: Request) -> Response:
        """Welcome, thanks, or on to the first question without an answer."""
        visit = self._visit(request)
        if visit.next is None or not visit.answers:
            name = "done.html" if visit.next is None else "welcome.html"
            kinds = {task.item.kind for task in visit.tasks}
            return HTMLResponse(render(name, code=visit.code, num=len(visit.tasks), kinds=kinds))
        return RedirectResponse(f"/r/{visit.code}/{visit.next + 1}", status_code=303)

    def question(self, request: Request) -> Response:
        """One question, counted from 1, with the earlier answer if there is one."""
        visit = self._visit(request)
        place = self._place(request, visit)
        if visit.next is not None and place > visit.next:
            return RedirectResponse(f"/r/{visit.code}", status_code=303)
        task, earlier = visit.tasks[place], visit.answers.get(place)
        page = render(
            f"{task.item.kind}.html",
            code=visit.code,
            number=place + 1,
            num=len(visit.tasks),
            num_done=len(visit.answers),
            item=task.item,
            images=[task.item.images[name] for name in task.shown],
            earlier=_as_form(task, earlier),
            skip_reason=earlier.skip_reason if earlier else None,
            skip_reasons=SKIP_REASONS[task.item.kind],
            cannot_tell=CANNOT_TELL,
            max_count=MAX_COUNT,
        )
        return HTMLResponse(page)

    async def answer(self, request: Request) -> Response:
        """Record the answer to one question; the reply follows the commit."""
        if is_foreign(request):
            raise HTTPException(403, "This form comes from another site.")
        form = await read_fields(request)
        return await run_in_threadpool(self._record, request, form)

    def _record(self, request: Request, form: dict[str, str]) -> Response:
        visit = self._visit(request)
        place = self._place(request, visit)
        if visit.next is not None and place > visit.next:
            raise HTTPException(409, "An earlier question has no answer yet.")
        try:
            self._store.add(read_form(form, visit.tasks[place], visit.rater))
        except FormError as error:
            raise HTTPException(400, f"This is no answer: {error}.") from None
        return RedirectResponse(f"/r/{visit.code}", status_code=303)

    def image(self, request: Request) -> Response:
        """An image of the study, for its raters."""
        self._rater(request)
        name = request.path_params["name"]
        if name not in self._images:
            raise HTTPException(404, "There is no such image.")
        # The name is a hash of the content.
        keep = {"Cache-Control": "private, max-age=86400, immutable"}
        return FileResponse(self._study.folder / "images" / name, headers=keep)

    def admin(self, request: Request) -> Response:
        """Progress and results as they are now."""
        token = request.path_params["token"].encode()
        if not secrets.compare_digest(token, self._store.admin_token().encode()):
            raise HTTPException(404, _UNKNOWN)
        written = self._store.num_written()
        if self._results is None or self._results[0] != written:
            self._results = written, summarise(self._study, self._store)
        results = self._results[1]
        return HTMLResponse(
            render("admin.html", study=self._study, results=results, said=describe(results))
        )

    def _rater(self, request: Request) -> int:
        rater = self._store.rater_of(request.path_params["code"])
        if rater is None:
            raise HTTPException(404, _UNKNOWN)
        return rater

    def _visit(self, request: Request) -> _Visit:
        rater = self._rater(request)
        tasks = self._study.tasks(rater)
        answers = {(a.item, a.repetition): a for a in self._store.answers(rater)}
        found = {
            place: answers[task.item.number, task.repetition]
            for place, task in enumerate(tasks)
            if (task.item.number, task.repetition) in answers
        }
        code = request.path_params["code"]
        return _Visit(code=code, rater=rater, tasks=tasks, answers=found)

    def _place(self, request: Request, visit: _Visit) -> int:
        number: int = request.path_params["number"]
        if not 1 <= number <= len(visit.tasks):
            raise HTTPException(404, "There is no such question.")
        return number - 1


_NO_CODE = "Please open the link that you were given: it holds your personal code."
_UNKNOWN = "This link is not known here. Please check it, or ask for another one."


def _error_page(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    page = render("message.html", title="This did not work", text=error.detail)
    return HTMLResponse(page, status_code=error.status_code)


def _as_form(task: Task, answer: Answer | None) -> str:
    """What the form's field held when the answer was given."""
    if answer is None or answer.value is None:
        return ""
    if isinstance(answer.value, int):
        return str(answer.value)
    return ",".join(str(task.shown.index(name)) for name in answer.value)


def _listen(config: ServeConfig) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        raise UserError(
            f"{config.host}:{config.port}: cannot listen there ({error.strerror}); "
            "give another --host or --port"
        ) from None
    listener.listen()  # from here on early visitors wait rather than fail
    return listener
