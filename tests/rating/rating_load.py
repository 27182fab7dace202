"""Load test of `ifvit rate serve`: many raters at once while others flood it and hold it open.

    python tests/rating/rating_load.py STUDY --raters 200 --floods 20 --idle 1100 --strangers 10

STUDY is a folder of `ifvit rate create` with more raters than --raters; the last one sends the same
answer over and over. Strangers know no code. Prints the seconds that pages and answers took, and
how many requests failed, as JSON.
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ifvit.rating.answers import Store
from ifvit.rating.limits import raise_file_limit

FLOOD_SIZE = 500_000
"""Number of equal requests that the floods try to send."""


class Load:
    """Clients of one server until a deadline, and what they measured."""

    def __init__(self, url: str, seconds: float) -> None:
        self.host, self.port = url.removeprefix("http://").split(":")
        self.deadline = time.monotonic() + seconds
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.counts: Counter[str] = Counter()

    async def request(self, kind: str, path: str, form: str = "") -> str:
        """Send a request on a connection of its own => the response, "" when it failed."""
        start = time.monotonic()
        try:
            async with asyncio.timeout(30):
                reader, writer = await asyncio.open_connection(self.host, self.port)
                writer.write(build_request(path, form, "close"))
                reply = (await reader.read(-1)).decode()
                writer.close()
        except (OSError, TimeoutError) as error:
            reply = repr(error)
        self.seconds[kind].append(time.monotonic() - start)
        self.counts["failed"] += not reply.startswith(("HTTP/1.1 200", "HTTP/1.1 303"))
        return reply

    async def rate(self, home: str) -> None:
        """Answer question after question without a pause; begin again at the end."""
        number = 1
        while time.monotonic() < self.deadline:
            page = await self.request("page", f"{home}/{number}")
            await self.request("answer", f"{home}/{number}", answer_to(page))
            total = re.search(r"Question \d+ of (\d+)", page)
            number = number % int(total[1]) + 1 if total else 1

    async def flood(self, kind: str, path: str, form: str) -> None:
        """Send equal requests without waiting for responses, and connect again when refused."""
        while time.monotonic() < self.deadline and self.counts[f"{kind} sent"] < FLOOD_SIZE:
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                reading = asyncio.create_task(self.count_replies(kind, reader))
                while time.monotonic() < self.deadline and not reading.done():
                    writer.write(build_request(path, form, "keep-alive"))
                    self.counts[f"{kind} sent"] += 1
                    await asyncio.wait_for(writer.drain(), 1)
                writer.close()
            except (OSError, TimeoutError):
                await asyncio.sleep(0.01)

    async def count_replies(self, kind: str, reader: asyncio.StreamReader) -> None:
        """Count the responses by status; a status line may follow the body before it."""
        while line := await reader.readline():
            for status in re.findall(r"HTTP/1.1 (\d+)", line.decode()):
                self.counts[f"{kind} answered {status}"] += 1

    async def hold(self) -> None:
        """Keep half a request open, and open another when the server closes it."""
        while (left := self.deadline - time.monotonic()) > 0:
            try:
                reader, writer = await asyncio.open_connection(self.host, self.port)
                self.counts["idle opened"] += 1
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
                await asyncio.wait_for(reader.read(-1), left)
                writer.close()
            except (OSError, TimeoutError):
                await asyncio.sleep(0.1)


def build_request(path: str, form: str, connection: str) -> bytes:
    """A GET, or a POST when there is a form."""
    head = f"{'POST' if form else 'GET'} {path} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\n"
    return f"{head}Content-Length: {len(form)}\r\n\r\n{form}".encode()


def answer_to(page: str) -> str:
    """A form that the page of a question admits."""
    places = range(page.count('class="choice"'))
    return "ranking=" + ",".join(map(str, places)) if places else "count=3"


async def run(load: Load, options: argparse.Namespace, homes: list[str]) -> None:
    """Run all clients until the deadline."""
    same = answer_to(await load.request("page", f"{homes[-1]}/1"))
    clients = [load.hold() for _ in range(options.idle)]
    clients += [load.flood("flood", f"{homes[-1]}/1", same) for _ in range(options.floods)]
    clients += [load.flood("strangers", "/r/x/1", "") for _ in range(options.strangers)]
    await asyncio.gather(*clients, *map(load.rate, homes[: options.raters]))


def main() -> None:
    """Start a server, run the clients and print what they measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("study", type=Path)
    sizes = {"raters": 200, "floods": 20, "idle": 1100, "strangers": 0, "seconds": 30}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    raise_file_limit()
    homes = [f"/r/{rater.code}" for rater in Store(options.study).raters()]
    assert len(homes) > options.raters, "add raters with ifvit rate create"
    command = [sys.executable, "-m", "ifvit", "rate", "serve", str(options.study), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        load = Load(server.stdout.readline().split()[-1], options.seconds)
        try:
            asyncio.run(run(load, options, homes))
        finally:
            server.terminate()
    figures = {}
    for kind, seconds in load.seconds.items():
        median, p95, longest = np.percentile(seconds, [50, 95, 100]).round(3)
        figures[kind] = {"number": len(seconds), "median_s": median, "p95_s": p95, "max_s": longest}
    sys.stdout.write(json.dumps({**figures, **load.counts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
