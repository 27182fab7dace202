"""An HTTP proxy in front of an S3 endpoint that causes the faults that a test plans.

    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:  # or the fixture `faulty_s3`
        proxy.plan(Fault("status", method="PUT", key="*/manifest.json", status=503, times=2))
        ...  # clients talk to proxy.endpoint
        assert proxy.hits == ["PUT /bucket/run/manifest.json"] * 2
        proxy.plan()  # healthy again

Clients must sign for the address of the proxy, so AWS_ENDPOINT_URL must be `proxy.endpoint`. The
fixture sets it for this process and its children.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Literal

from aiohttp import ClientSession, web
from yarl import URL

Kind = Literal[
    "status", "delay", "hang", "drop", "lose_answer", "reset", "truncate", "shorten", "flip"
]


@dataclass(frozen=True)
class Fault:
    """A fault of the matching requests number `first` to `first + times - 1`.

    status: the proxy answers with `status` and forwards nothing. delay: the answer is late. hang:
    there is no answer until client or proxy gives up. drop: the connection closes, nothing is
    forwarded. lose_answer: the request is forwarded, but the connection closes instead of an
    answer. reset, truncate: half of the body arrives under the full Content-Length, then a reset or
    an orderly close. shorten: half of the body arrives under a matching Content-Length. flip: the
    middle byte of the body is inverted.
    """

    kind: Kind
    method: str = "*"
    key: str = "*"
    """Shell pattern of `/bucket/key` without the query."""
    first: int = 1
    times: int | None = 1
    """None: all requests from `first` on."""
    status: int = 503
    delay: float = 0.0
    """Seconds before the fault."""


@dataclass
class _Planned:
    fault: Fault
    seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Count a matching request => whether the fault is due."""
        if not (fnmatchcase(method, self.fault.method) and fnmatchcase(path, self.fault.key)):
            return False
        self.seen += 1
        turn = self.seen - self.fault.first
        return turn >= 0 and (self.fault.times is None or turn < self.fault.times)


@dataclass
class FaultyProxy:
    """Context manager that runs the proxy in a thread; the module docstring shows its use."""

    target: str
    requests: list[str] = field(default_factory=list)
    """All requests so far, as `PUT /bucket/key`."""
    hits: list[str] = field(default_factory=list)
    """The requests that met a fault."""
    before: Callable[[str], None] | None = None
    """Called in the thread of the proxy with `PUT /bucket/key` before a request is forwarded."""
    endpoint: str = ""

    def plan(self, *faults: Fault) -> None:
        """Replace the plan and count matches from zero."""
        self._plan = [_Planned(fault) for fault in faults]

    def __enter__(self) -> "FaultyProxy":
        self.plan()
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)))
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _run(self, started: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = web.Server(self._handle, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with ClientSession(auto_decompress=False) as self._session:
            started.set()
            await self._stop.wait()
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        words = f"{request.method} {request.path}"
        self.requests.append(words)
        if self.before is not None:
            self.before(words)
        struck = [p.fault for p in self._plan if p.strikes(request.method, request.path)]
        if not struck:
            return await self._forward(request, "delay")
        fault = struck[0]
        self.hits.append(words)
        await asyncio.sleep(fault.delay)
        match fault.kind:
            case "status":
                return web.Response(status=fault.status)
            case "hang":
                await self._stop.wait()
                return _hang_up(request)
            case "drop":
                return _hang_up(request)
            case kind:
                return await self._forward(request, kind)

    async def _forward(self, request: web.BaseRequest, kind: Kind) -> web.StreamResponse:
        """Forward the request, with Host because it is signed, and return the answer."""
        url = URL(self.target + request.raw_path, encoded=True)
        headers = {k: v for k, v in request.headers.items() if k not in _HOP_BY_HOP}
        skip = ["User-Agent", "Content-Type", "Accept", "Accept-Encoding"]
        if "Expect" in request.headers:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        async with self._session.request(
            request.method,
            url,
            headers=headers,
            data=await request.content.read(),
            skip_auto_headers=skip,
            allow_redirects=False,
        ) as answer:
            body = await answer.read()
        if kind == "lose_answer":
            return _hang_up(request)
        if kind == "flip" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 0xFF]) + body[middle + 1 :]
        sent = body[: len(body) // 2] if kind in ("reset", "truncate", "shorten") else body
        headers = {k: v for k, v in answer.headers.items() if k not in _HOP_BY_HOP}
        if kind == "shorten":
            headers["Content-Length"] = str(len(sent))
        response = web.StreamResponse(status=answer.status, headers=headers)
        await response.prepare(request)
        await response.write(sent)
        if kind in ("reset", "truncate"):
            _hang_up(request, reset=kind == "reset")
        return response


_HOP_BY_HOP = {"Connection", "Keep-Alive", "Transfer-Encoding", "Expect"}


def _hang_up(request: web.BaseRequest, *, reset: bool = False) -> web.Response:
    """Close the connection of the request; the returned answer is never sent."""
    transport = request.transport
    if transport is not None:
        if reset:
            now = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        transport.close()
    return web.Response()
