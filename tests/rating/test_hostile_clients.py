"""The server against clients that send garbage or go away."""

import socket
import struct
from collections.abc import Iterator

import pytest
from live_server import LiveServer, serving
from made_study import make_study

from ifvit.rating.answers import Rater, Store
from ifvit.rating.study import Study

ROUTES = (
    "/{}",
    "/r/{}",
    "/r/CODE/{}",
    "/r/{}/1",
    "/r/CODE/images/{}",
    "/r/CODE/1/{}",
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
def _alive(server: LiveServer) -> Iterator[None]:
    """After each test, check that the server answers."""
    yield
    assert server.request("/")[0] == 200


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
