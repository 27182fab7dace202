"""`ifvit rate serve` as a process of its own, and a rater who talks to it without a browser."""

import http.client
import subprocess
import sys
import urllib.parse
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ifvit.rating.study import Study


class LiveServer:
    """A running server; `kill` is what a power cut does to it."""

    def __init__(self, study: Study) -> None:
        command = [sys.executable, "-m", "ifvit", "rate", "serve", str(study.folder), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().split()[-1]
        self.admin_url = self._process.stdout.readline().split()[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(30)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(30)

    def request(
        self, path: str, form: str | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers in lower case and body; POST where there is a form."""
        connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=60)
        try:
            method = "GET" if form is None else "POST"
            connection.request(method, path, form, dict(headers or {}))
            reply = connection.getresponse()
            named = {name.lower(): value for name, value in reply.getheaders()}
            return reply.status, named, reply.read()
        finally:
            connection.close()
