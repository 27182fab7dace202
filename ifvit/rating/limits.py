"""Limits of what one client can take from the others: connections, time and requests.

uvicorn alone waits without end for the first request of a connection and for the rest of any.
"""

import asyncio
import math
import resource
import time

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 16_384
"""Largest request line and headers together."""
_MAX_CONNECTIONS = 2000


def raise_file_limit() -> None:
    """Raise the number of files and sockets that this process may open as far as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connection_limit() -> int:
    """Largest number of connections, and of those that asyncio accepts at once.

    asyncio accepts a second batch before the first is counted, and images need files, too.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(_MAX_CONNECTIONS, soft // 4)


class LimitedConnection(H11Protocol):
    """An HTTP connection that is closed when its client is too slow.

    A new connection beyond the limit closes the one that has waited longest for a whole request.
    Clients that send their requests at once are thus served however many others are silent.
    """

    receive_seconds = 10.0
    """Time to send a whole request, from the opening of a connection or the previous response."""
    respond_seconds = 60.0
    """Time to take a whole response."""

    @property
    def max_connections(self) -> int:
        """Number of connections beyond which a new one closes a silent one."""
        return connection_limit()

    _timer: asyncio.TimerHandle | None = None
    _receiving_since: float | None = None
    """Time since which the client owes a whole request; None while it is answered."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Register the connection and start its timer."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            ours = [other for other in self.connections if isinstance(other, LimitedConnection)]
            slowest = min(ours, key=lambda other: other._receiving_since or math.inf)
            slowest.transport.abort()
            self.connections.discard(slowest)
        self._start_timer(is_receiving=True)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def handle_events(self) -> None:
        """Handle what has arrived; a complete request starts the time of its response."""
        super().handle_events()
        cycle = self.cycle
        is_receiving = cycle is None or cycle.response_complete or bool(cycle.more_body)
        if is_receiving != (self._receiving_since is not None):
            self._start_timer(is_receiving)

    def on_response_complete(self) -> None:
        """Give the client time for its next request, which may have arrived already."""
        self._start_timer(is_receiving=True)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, unless a response has begun: then only close the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # what the application still sends is dropped
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _start_timer(self, is_receiving: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._receiving_since = time.monotonic() if is_receiving else None
        seconds = self.receive_seconds if is_receiving else self.respond_seconds
        self._timer = self.loop.call_later(seconds, self.transport.abort)


class Allowance:
    """Requests of each rater: `burst` at once, then `per_second`."""

    def __init__(self, per_second: float, burst: float) -> None:
        self._per_second = per_second
        self._burst = burst
        self._left: dict[int, tuple[float, float]] = {}
        """Rater => requests left and when that was so; raters of the study only."""

    def take(self, rater: int) -> bool:
        """Count a request; False when the rater has none left."""
        now = time.monotonic()
        left, since = self._left.get(rater, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_second)
        self._left[rater] = (left - (left >= 1), now)
        return left >= 1
