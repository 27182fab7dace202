"""The server over HTTP: permissions, forms, many raters at once, and SIGKILL."""

import http.client
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live_server import LiveServer, serving
from made_study import add, make_study
from starlette.exceptions import HTTPException

from ifvit.errors import UserError
from ifvit.rating.answers import Rater, Store
from ifvit.rating.config import ServeConfig
from ifvit.rating.results import read_results
from ifvit.rating.server import read_answer, serve
from ifvit.rating.study import Item, Kind, Study, Task

NUM_RATERS = 50


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("served"), raters=NUM_RATERS + 3)


@pytest.fixture(scope="module")
def store(study: Study) -> Iterator[Store]:
    store = Store(study.folder)
    yield store
    store.close()


@pytest.fixture(scope="module")
def raters(store: Store) -> list[Rater]:
    return store.raters()


@pytest.fixture(scope="module")
def server(study: Study) -> Iterator[LiveServer]:
    with serving(study) as server:
        yield server


def build_task(kind: Kind) -> Task:
    names = ("M2", "M1", "M3") if kind == "preference" else ("M1",)
    images = {name: f"{number:032x}.png" for number, name in enumerate(names)}
    asked = {} if kind == "preference" else {"object": "bus", "count": 1}
    item = Item(number=7, kind=kind, prompt="p", position=0, images=images, **asked)
    return Task(item=item, repetition=1, shown=names)


@pytest.mark.parametrize(
    ("kind", "form", "value", "skip_reason"),
    [
        ("preference", {"ranking": "2,0,1"}, ("M3", "M2", "M1"), None),
        ("preference", {"skip_reason": "too close to call"}, None, "too close to call"),
        ("counting", {"count": "12"}, 12, None),
        ("counting", {"skip_reason": "cannot tell"}, None, "cannot tell"),
    ],
)
def test_a_form_of_the_page_becomes_an_answer(
    kind: Kind, form: dict[str, str], value: object, skip_reason: str | None
) -> None:
    task = build_task(kind)
    answer = read_answer(form, task, rater=4)
    assert (answer.value, answer.skip_reason) == (value, skip_reason)
    assert (answer.rater, answer.item, answer.repetition) == (4, 7, 1)
    assert answer.shown == task.shown


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("preference", {}),
        ("preference", {"ranking": ""}),
        ("preference", {"ranking": "0,1"}),
        ("preference", {"ranking": "0,1,1"}),
        ("preference", {"ranking": "0,1,2,2"}),
        ("preference", {"ranking": "0,1,3"}),
        ("preference", {"ranking": "0, 1,2"}),
        ("preference", {"ranking": "-1,0,1"}),
        ("preference", {"count": "1"}),
        ("preference", {"ranking": "0,1,2", "skip_reason": "other"}),
        ("preference", {"ranking": "0,1,2", "rater": "1"}),
        ("preference", {"skip_reason": "cannot tell"}),
        ("preference", {"skip_reason": ""}),
        ("counting", {"count": ""}),
        ("counting", {"count": "-1"}),
        ("counting", {"count": "100"}),
        ("counting", {"count": "1.5"}),
        ("counting", {"count": "1e1"}),
        ("counting", {"count": "\N{ARABIC-INDIC DIGIT THREE}"}),
        ("counting", {"ranking": "0"}),
        ("counting", {"skip_reason": "too close to call"}),
    ],
)
def test_any_other_form_is_refused(kind: Kind, form: dict[str, str]) -> None:
    with pytest.raises(HTTPException):
        read_answer(form, build_task(kind), rater=4)


def build_form(task: Task, rater: int) -> str:
    """Return a form that ranks images in page order, or whose count is the rater's id."""
    if task.item.kind == "counting":
        return f"count={rater}"
    return "ranking=" + ",".join(str(place) for place in range(len(task.shown)))


def test_a_rater_goes_through_the_whole_study(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    rater = raters[-1]
    home = f"/r/{rater.code}"
    status, _, page = server.request(home)
    assert status == 200
    assert b"Welcome" in page
    for number, task in enumerate(study.tasks(rater.id), 1):
        status, _, page = server.request(f"{home}/{number}")
        assert status == 200
        shown = page.decode()
        places = [shown.index(task.item.images[name]) for name in task.shown]
        assert places == sorted(places)
        assert not any(name in shown for name in study.names.values())
        hidden = task.item.prompt if task.item.kind == "counting" else "nothing to hide"
        assert hidden not in shown
        status, headers, _ = server.request(f"{home}/{number}", build_form(task, rater.id))
        assert (status, headers["location"]) == (303, home)
        status, headers, page = server.request(home)
        if number < len(study.tasks(rater.id)):
            assert headers["location"] == f"{home}/{number + 1}"
    assert b"All done" in page


def test_a_rater_can_see_and_change_an_earlier_answer(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    rater = raters[-2]
    path = f"/r/{rater.code}/1"
    server.request(path, "ranking=2,0,1")
    assert b'value="2,0,1"' in server.request(path)[2]
    server.request(path, "skip_reason=other")
    assert b"You skipped this question: other" in server.request(path)[2]
    assert server.request(path, "ranking=1,0,2")[0] == 303
    assert b'value="1,0,2"' in server.request(path)[2]


def test_wrong_requests_change_nothing(
    server: LiveServer, study: Study, store: Store, raters: list[Rater]
) -> None:
    rater = raters[-3]
    home = f"/r/{rater.code}"
    image = next(iter(study.image_files))
    wrong = {
        ("/r/guess", None): 404,
        ("/r/guess/1", "ranking=0,1,2"): 404,
        ("/admin/guess", None): 404,
        (f"/r/guess/images/{image}", None): 404,
        (f"{home}/images/study.sqlite", None): 404,
        (f"{home}/images/..%2Fstudy.sqlite", None): 404,
        (f"{home}/images/%2e%2e/study.json", None): 404,
        ("/static/../server.py", None): 404,
        ("/static/%2e%2e/server.py", None): 404,
        (f"{home}/0", None): 404,
        (f"{home}/1000", None): 404,
        (f"{home}/1", "ranking=0,0,1"): 400,
        (f"{home}/1", "ranking=0,1,2&ranking=0,1,2"): 400,
        (f"{home}/1", "\xff"): 400,
        (f"{home}/1", "ranking=" + 5000 * "0"): 413,
        (f"{home}/2", "ranking=0,1,2"): 409,
        (home, "ranking=0,1,2"): 405,
    }
    found = {request: server.request(*request)[0] for request in wrong}
    assert found == wrong
    assert store.answers(rater.id) == []


def test_a_later_question_leads_back_to_the_first_open_one(
    server: LiveServer, raters: list[Rater]
) -> None:
    home = f"/r/{raters[-3].code}"
    status, headers, _ = server.request(f"{home}/3")
    assert (status, headers["location"]) == (303, home)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_is_refused(
    server: LiveServer, raters: list[Rater], headers: dict[str, str]
) -> None:
    path = f"/r/{raters[-3].code}/1"
    assert server.request(path, "ranking=0,1,2", headers)[0] == 403


def test_every_response_has_the_security_headers(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    home = f"/r/{raters[0].code}"
    image = next(iter(study.image_files))
    for path in ("/", home, f"{home}/1", "/nowhere", "/static/style.css", f"{home}/images/{image}"):
        _, headers, _ = server.request(path)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert "server" not in headers
    assert "immutable" in headers["cache-control"]
    assert server.request(home)[1]["cache-control"] == "no-store"


def test_fifty_raters_at_once_lose_no_answer(
    server: LiveServer, study: Study, store: Store, raters: list[Rater]
) -> None:
    together = threading.Barrier(NUM_RATERS)

    def rate(rater: Rater) -> None:
        together.wait()
        for number, task in enumerate(study.tasks(rater.id), 1):
            path = f"/r/{rater.code}/{number}"
            assert server.request(path)[0] == 200
            assert server.request(path, build_form(task, rater.id))[0] == 303

    with ThreadPoolExecutor(NUM_RATERS) as pool:
        list(pool.map(rate, raters[:NUM_RATERS]))
    for rater in raters[:NUM_RATERS]:
        answers = store.answers(rater.id)
        tasks = study.tasks(rater.id)
        assert [(a.item, a.repetition) for a in answers] == [
            (task.item.number, task.repetition) for task in tasks
        ]
        assert [a.shown for a in answers] == [task.shown for task in tasks]
        assert {a.value for a in answers if isinstance(a.value, int)} == {rater.id}
    page = server.request(server.admin_url.removeprefix(server.url))[2].decode()
    assert f"{len(tasks)} of {len(tasks)}" in page
    found = read_results(str(study.folder)).preference
    assert found is not None
    # These raters rank by place only, and Friedman's test finds that.
    assert found.order_bias.p_value < 1e-9
    assert "The place on the page changed the rank" in page


def test_saved_answers_survive_kill_9(tmp_path_factory: pytest.TempPathFactory) -> None:
    study = make_study(tmp_path_factory.mktemp("killed"), num_preference=25, raters=4)
    store = Store(study.folder)
    raters = store.raters()
    saved: list[int] = []
    """Rater of every answer that the server confirmed."""
    many = threading.Event()

    def rate(rater: Rater, server: LiveServer) -> bool:
        """Answer all remaining questions; False when the server died."""
        done = len(store.answers(rater.id))
        for number, task in enumerate(study.tasks(rater.id)[done:], done + 1):
            path = f"/r/{rater.code}/{number}"
            try:
                status, _, _ = server.request(path, build_form(task, rater.id))
            except (OSError, http.client.HTTPException):
                return False
            assert status == 303
            saved.append(rater.id)
            if len(saved) > 40:
                many.set()
        return True

    with ThreadPoolExecutor(len(raters)) as pool, serving(study) as server:
        finished = [pool.submit(rate, rater, server) for rater in raters]
        assert many.wait(60)
        server.process.kill()
        assert not any(each.result() for each in finished)
    for rater in raters:
        confirmed = saved.count(rater.id)
        # The last answer may be on disk although its confirmation did not arrive.
        assert len(store.answers(rater.id)) in (confirmed, confirmed + 1)
    with serving(study) as server:
        assert all(rate(rater, server) for rater in raters)
    total = len(study.tasks(1))
    assert [progress.done for progress in read_results(str(study.folder)).progress] == 4 * [total]
    store.close()


@pytest.mark.parametrize(("host", "port"), [("no such host", 0), (70 * "é", 0), ("::1::", 1)])
def test_an_address_that_cannot_be_used_is_named(host: str, port: int, study: Study) -> None:
    with pytest.raises(UserError, match="give another --host or --port"):
        serve(ServeConfig(study=str(study.folder), host=host, port=port))
    with pytest.raises(UserError, match="from 0 to 65535"):
        ServeConfig(study=str(study.folder), port=65536)


def test_a_file_that_breaks_while_it_is_served_gives_a_page_and_a_line(
    tmp_path: Path,
) -> None:
    study = make_study(tmp_path)
    store = Store(study.folder)
    home = f"/r/{store.raters()[0].code}"
    store.close()
    with serving(study) as server:
        connection = sqlite3.connect(study.folder / "study.sqlite")
        connection.executescript("DROP TABLE answer; DROP TABLE rater")
        connection.close()
        for path in (f"{home}/1", "/r/unknown"):
            status, _, page = server.request(path)
            assert (status, b"try again later" in page) == (503, True)
        assert "Traceback" not in server.read_log()
        assert "study.sqlite: cannot be used" in server.read_log()


def test_the_admins_page_is_live(
    server: LiveServer, study: Study, store: Store, raters: list[Rater]
) -> None:
    path = server.admin_url.removeprefix(server.url)
    before = server.request(path)[2]
    add(store, study.tasks(raters[-3].id)[0], raters[-3].id, None, "other")
    assert b"other 1" not in before
    for _ in range(100):  # results take at most a tenth of the server's time
        time.sleep(0.1)
        if b"other 1" in server.request(path)[2]:
            return
    pytest.fail("the admin's page does not show the answer")
