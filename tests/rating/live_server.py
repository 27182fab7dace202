"""Runs `ifvit rate serve` in its own process and sends requests without a browser."""

import http.client
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ifvit.rating.study import Study


class LiveServer:
    """A running `ifvit rate serve`."""

    def __init__(self, study: Study) -> None:
        command = [sys.executable, "-m", "ifvit", "rate", "serve", str(study.folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        self.admin_url = self.process.stdout.readline().split()[-1]

    def request(
        self, path: str, form: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Return status, headers in lower case and body; a request with a form is a POST."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=60)
        try:
            method = "GET" if form is None else "POST"
            connection.request(method, path, form, dict(headers or {}))
            reply = connection.getresponse()
            named = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, named, reply.read()
        finally:
            connection.close()


@contextmanager
def serving(study: Study) -> Iterator[LiveServer]:
    """Run a server and terminate it at the end."""
    server = LiveServer(study)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)
