"""The server over real HTTP: who may do what, many raters at once, and a sudden death."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import pytest
from live_server import LiveServer
from made_study import add, make_study

from ifvit.rating.results import read_results
from ifvit.rating.store import Rater, Store
from ifvit.rating.study import Study, Task

NUM_RATERS = 50


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("served"), raters=NUM_RATERS + 3)


@pytest.fixture(scope="module")
def raters(study: Study) -> list[Rater]:
    store = Store(study.folder)
    raters = store.raters()
    store.close()
    return raters


@pytest.fixture(scope="module")
def server(study: Study) -> Iterator[LiveServer]:
    with LiveServer(study) as server:
        yield server


def a_form(task: Task, rater: int) -> str:
    """Some answer: of ranks the order on the page, of counts the rater's number."""
    if task.item.kind == "counting":
        return f"count={rater}"
    return "ranking=" + ",".join(str(place) for place in range(len(task.shown)))


def test_the_way_through_a_study(server: LiveServer, study: Study, raters: list[Rater]) -> None:
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
        status, headers, _ = server.request(f"{home}/{number}", a_form(task, rater.id))
        assert (status, headers["location"]) == (303, home)
        status, headers, page = server.request(home)
        if number < len(study.tasks(rater.id)):
            assert headers["location"] == f"{home}/{number + 1}"
    assert b"All done" in page


def test_an_earlier_answer_can_be_seen_and_changed(
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
    server: LiveServer, study: Study, raters: list[Rater]
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
    store = Store(study.folder)
    assert store.answers(rater.id) == []
    store.close()


def test_no_question_is_jumped_over(server: LiveServer, raters: list[Rater]) -> None:
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
def test_forms_of_other_sites_are_refused(
    server: LiveServer, raters: list[Rater], headers: dict[str, str]
) -> None:
    path = f"/r/{raters[-3].code}/1"
    assert server.request(path, "ranking=0,1,2", headers)[0] == 403


def test_every_response_is_closed_to_others(
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


def test_fifty_raters_at_once_lose_nothing(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    together = threading.Barrier(NUM_RATERS)

    def rate(rater: Rater) -> None:
        together.wait()
        for number, task in enumerate(study.tasks(rater.id), 1):
            path = f"/r/{rater.code}/{number}"
            assert server.request(path)[0] == 200
            assert server.request(path, a_form(task, rater.id))[0] == 303

    with ThreadPoolExecutor(NUM_RATERS) as pool:
        list(pool.map(rate, raters[:NUM_RATERS]))
    store = Store(study.folder)
    for rater in raters[:NUM_RATERS]:
        answers = store.answers(rater.id)
        tasks = study.tasks(rater.id)
        assert [(a.item, a.repetition) for a in answers] == [
            (task.item.number, task.repetition) for task in tasks
        ]
        assert [a.shown for a in answers] == [task.shown for task in tasks]
        assert {a.value for a in answers if isinstance(a.value, int)} == {rater.id}
    store.close()
    page = server.request(server.admin_url.removeprefix(server.url))[2].decode()
    assert f"{len(tasks)} of {len(tasks)}" in page
    found = read_results(str(study.folder)).preference
    assert found is not None
    # These raters look at places only, and the test of places says so.
    assert found.order_bias.p_value < 1e-9
    assert "Raters preferred places on the page" in page


def test_an_answer_that_was_thanked_for_outlives_kill_9(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    study = make_study(tmp_path_factory.mktemp("killed"), num_preference=25, raters=4)
    store = Store(study.folder)
    raters = store.raters()
    thanked: list[tuple[int, int]] = []
    many = threading.Event()

    def rate(rater: Rater, server: LiveServer) -> bool:
        """From where the server says that the rater is; False when it died."""
        done = len(store.answers(rater.id))
        for number, task in enumerate(study.tasks(rater.id)[done:], done + 1):
            try:
                status, _, _ = server.request(f"/r/{rater.code}/{number}", a_form(task, rater.id))
            except (OSError, HTTPException):
                return False
            assert status == 303
            thanked.append((rater.id, number))
            if len(thanked) > 40:
                many.set()
        return True

    with ThreadPoolExecutor(len(raters)) as pool, LiveServer(study) as server:
        finished = [pool.submit(rate, rater, server) for rater in raters]
        assert many.wait(60)
        server.kill()
        assert not any(each.result() for each in finished)
    for rater in raters:
        numbers = [number for who, number in thanked if who == rater.id]
        # The last answer may be on disk without its thanks having arrived.
        assert len(store.answers(rater.id)) in (len(numbers), len(numbers) + 1)
    with LiveServer(study) as server:
        assert all(rate(rater, server) for rater in raters)
    total = len(study.tasks(1))
    assert [progress.done for progress in read_results(str(study.folder)).progress] == 4 * [total]
    store.close()


def test_progress_and_results_are_live(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    store = Store(study.folder)
    path = server.admin_url.removeprefix(server.url)
    before = server.request(path)[2]
    add(store, study.tasks(raters[-3].id)[0], raters[-3].id, None, "other")
    store.close()
    after = server.request(path)[2]
    assert before != after
    assert b"other 1" in after
