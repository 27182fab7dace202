"""The server against clients that send garbage, send nothing, send too much, or go away."""

import asyncio
import json
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import uvicorn
from live_server import LiveServer, serving
from made_study import make_study
from starlette.types import Receive, Scope, Send

from ifvit.rating.answers import Rater, Store
from ifvit.rating.limits import Allowance, LimitedConnection, raise_file_limit
from ifvit.rating.study import Study

ROUTES = (
    "/{}",
    "/r/{}",
    "/r/CODE/{}",
    "/r/{}/1",
    "/r/CODE/images/{}",
    "/r/CODE/1/{}",
    "/admin/{}",
    "/static/{}",
    "/static/style.css/{}",
    "/{}/r/CODE/1",
)
SEGMENTS = (
    5000 * "9",
    "-1",
    "0",
    "1e9",
    "1.0",
    "%D9%A3",
    "%00",
    "%FF%FE",
    "%ED%A0%80",
    "%0d%0aSet-Cookie:%20a=b",
    "..%2F..%2Fetc%2Fpasswd",
    "%2e%2e/study.sqlite",
    "..%5Cx",
    "[",
    "{{7*7}}",
    "'%20OR%201=1--",
    "<script>alert(1)</script>",
    "%F0%9F%92%A9",
    3000 * "a",
    "%",
    "a?x=%00&x[]=1",
    "/",
    "//x",
    "../../../etc/passwd",
)
HEADERS = (
    "Origin: http://[",
    "Origin: http://",
    "Origin: \xff\xfe",
    "Origin: null",
    "Sec-Fetch-Site: [",
    "Host: [",
    "Host: x:99999999999",
    "Host:",
    "Range: bytes=9-1",
    "Range: bytes=" + "0-0," * 500,
    "Range: bytes=-" + 400 * "9",
    "If-Range: x\r\nRange: bytes=0-1",
    "If-Modified-Since: yesterday",
    "Cookie: a=\x80; ;=;",
    "Content-Type: multipart/form-data; boundary=\x80",
    "X-Forwarded-For: [, x\r\nX-Forwarded-Proto: \xff",
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13",
    "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    "Accept-Encoding: " + 8000 * "x",
)
NOT_HTTP = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/X\r\n\r\n",
    b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: " + 5000 * b"9" + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: " + 70_000 * b"x",
    b"GET /" + 70_000 * b"x" + b" HTTP/1.1\r\n\r\n",
    b"POST /r/CODE/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /r/CODE/1 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + 50 * (b"400\r\n" + 1024 * b"x" + b"\r\n")
    + b"zz\r\n",
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\nzz\r\n",
    b"POST /r/CODE/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nrank",
    b"POST /r/CODE/1 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n" + 99_999 * b"x",
    b"\r\n\r\n\x00\x00",
    b"",
)
HALF = b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "
SAME = "ranking=0,1,2"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("attacked"), raters=25)


@pytest.fixture(scope="module")
def raters(study: Study) -> list[Rater]:
    store = Store(study.folder)
    try:
        return store.raters()
    finally:
        store.close()


@pytest.fixture(scope="module")
def server(study: Study) -> Iterator[LiveServer]:
    with serving(study) as server:
        yield server


@pytest.fixture(autouse=True)
def _quiet(server: LiveServer) -> Iterator[None]:
    """After each test, check that the server answers and has not logged anything."""
    yield
    assert server.request("/")[0] == 200
    assert server.read_log() == ""


def build(method: str, path: str, *headers: str, form: str = "") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", *headers]
    if not any(line.startswith("Host:") for line in headers):
        lines.append("Host: x")
    return "\r\n".join([*lines, f"Content-Length: {len(form)}", "", form]).encode("latin-1")


def status_of(reply: bytes) -> int:
    assert reply.startswith(b"HTTP/1.1 ")
    return int(reply[9:12])


@pytest.mark.parametrize("route", ROUTES)
def test_garbage_in_an_address_is_refused(
    route: str, server: LiveServer, raters: list[Rater]
) -> None:
    for number, segment in enumerate(SEGMENTS):
        path = route.replace("CODE", raters[number % len(raters)].code).format(segment)
        for method in ("GET", "POST"):
            reply = server.send(build(method, path, form=SAME if method == "POST" else ""))
            assert 400 <= status_of(reply) < 500, (method, path)


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "FOO"])
def test_other_methods_are_refused_or_answered(
    method: str, server: LiveServer, raters: list[Rater]
) -> None:
    for path in ("/", f"/r/{raters[0].code}", f"/r/{raters[0].code}/1", "/static/rate.js", "/x"):
        status = status_of(server.send(build(method, path)))
        assert status < 500
        assert method == "HEAD" or status >= 400


def test_garbage_in_headers_is_refused_or_ignored(
    server: LiveServer, study: Study, raters: list[Rater]
) -> None:
    image = min(study.image_files)
    for number, header in enumerate(HEADERS):
        home = f"/r/{raters[number].code}"
        for method, path in (
            ("GET", "/"),
            ("GET", f"{home}/1"),
            ("GET", f"{home}/images/{image}"),
            ("GET", "/static/style.css"),
            ("POST", f"{home}/1"),
        ):
            reply = server.send(build(method, path, header, form=SAME if method == "POST" else ""))
            assert status_of(reply.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")) < 500, header


@pytest.mark.parametrize("data", NOT_HTTP, ids=range(len(NOT_HTTP)))
def test_what_is_not_http_is_refused(data: bytes, server: LiveServer, raters: list[Rater]) -> None:
    reply = server.send(data.replace(b"CODE", raters[0].code.encode()), is_all=True)
    assert reply == b"" or 400 <= status_of(reply) < 500


def test_a_client_may_go_away_at_any_byte(server: LiveServer, raters: list[Rater]) -> None:
    request = build("POST", f"/r/{raters[0].code}/1", form=SAME)
    for length in range(1, len(request), 5):
        connection = server.connect()
        connection.sendall(request[:length])
        if length % 2:  # reset the connection instead of closing it
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def test_idle_connections_lock_nobody_out(study: Study, raters: list[Rater]) -> None:
    raise_file_limit()
    with serving(study, max_files=1024) as server, ExitStack() as connections:
        for _ in range(1100):
            connections.enter_context(server.connect()).sendall(HALF)
        start = time.monotonic()
        for number in range(10):
            image = sorted(study.image_files)[number]
            assert server.request(f"/r/{raters[number].code}/images/{image}")[0] == 200
        assert time.monotonic() - start < 5
        assert server.read_log() == ""


def test_a_rater_who_sends_too_much_waits(server: LiveServer, raters: list[Rater]) -> None:
    flood, calm = (f"/r/{rater.code}/1" for rater in raters[-2:])
    request = build("POST", flood, form=SAME).replace(b"Connection: close\r\n", b"")
    with server.connect() as connection:
        connection.sendall(1000 * request)
        replies = b""
        while b"HTTP/1.1 429" not in replies:
            replies += connection.recv(1 << 20)
        assert b"retry-after: 1" in replies
        assert 200 <= replies.count(b"HTTP/1.1 303") < 600
        assert server.request(calm)[0] == 200


def test_an_allowance_is_refilled() -> None:
    allowance = Allowance(per_second=20, burst=3)
    assert [allowance.take(1) for _ in range(4)] == [True, True, True, False]
    assert allowance.take(2)
    time.sleep(0.06)
    assert allowance.take(1)


class Impatient(LimitedConnection):
    """Has short times and few connections."""

    receive_seconds = 0.3
    respond_seconds = 0.6
    max_connections = 3


async def answer_slowly(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the request; `/late` is answered after 0.4 s, `/never` not at all."""
    while (await receive()).get("more_body"):
        pass
    await asyncio.sleep({"/late": 0.4, "/never": 1}.get(scope["path"], 0))
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def try_connections() -> dict[str, float]:
    """Seconds after which the server has closed connections of several kinds."""
    config = uvicorn.Config(answer_slowly, http=Impatient, ws="none", lifespan="off")
    config.load()
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        await asyncio.sleep(0.01)

    async def time_until_closed(data: bytes, drip: bytes = b"") -> float:
        start = time.monotonic()
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(data)
        while not reader.at_eof() and time.monotonic() < start + 5:
            try:
                await asyncio.wait_for(reader.read(4096), 0.02)
            except TimeoutError:
                writer.write(drip)
            except ConnectionError:
                break
        writer.close()
        return time.monotonic() - start

    head = b"GET /%s HTTP/1.1\r\nHost: x\r\n"
    seconds = {
        "silent": await time_until_closed(b""),
        "half a head": await time_until_closed(head, b"x"),
        "half a body": await time_until_closed(head + b"Content-Length: 99\r\n\r\n", b"x"),
        "served, then silent": await time_until_closed(head % b"late" + b"\r\n"),
        "served, then half": await time_until_closed(2 * (head % b"late" + b"\r\n") + b"G", b"E"),
        "not served": await time_until_closed(head % b"never" + b"\r\n"),
    }
    crowd = [asyncio.create_task(time_until_closed(b"")) for _ in range(3)]
    await asyncio.sleep(0.1)
    await time_until_closed(head % b"now" + b"Connection: close\r\n\r\n")
    oldest, *others = await asyncio.gather(*crowd)
    seconds["a younger one of a crowd"] = min(others)
    seconds["the oldest of a crowd"] = oldest
    server.should_exit = True
    await running
    return seconds


def test_slow_connections_are_closed_in_time() -> None:
    found = asyncio.run(try_connections())
    assert all(0.25 < time_ < 4 for kind, time_ in found.items() if "oldest" not in kind), found
    assert found["served, then silent"] > 0.65
    assert found["served, then half"] > 1.05
    assert found["not served"] > 0.55
    assert found["the oldest of a crowd"] < 0.8 * found["a younger one of a crowd"]


def test_many_raters_are_served_during_an_attack(study: Study) -> None:
    tool = Path(__file__).with_name("rating_load.py")
    sizes = ["--raters=20", "--floods=5", "--idle=200", "--strangers=2", "--seconds=2"]
    output = subprocess.run(
        [sys.executable, str(tool), str(study.folder), *sizes], check=True, capture_output=True
    ).stdout
    found = json.loads(output)
    assert found["page"]["median_s"] < 1
    assert found["page"]["number"] > 20
    assert found["failed"] == 0
    assert found["flood sent"] > found["flood answered 303"]
