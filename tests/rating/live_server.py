"""Runs `ifvit rate serve` in its own process and sends requests without a browser."""

import contextlib
import http.client
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator, Mapping

from ifvit.rating.study import Study


class LiveServer:
    """A running `ifvit rate serve`."""

    def __init__(self, study: Study, max_files: int) -> None:
        limited = ["sh", "-c", 'ulimit -n "$0"; exec "$@"', str(max_files)]
        command = [sys.executable, "-m", "ifvit", "rate", "serve", str(study.folder), "--port", "0"]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*limited, *command], stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        self.admin_url = self.process.stdout.readline().split()[-1]
        address = urllib.parse.urlsplit(self.url)
        self.address = (str(address.hostname), int(address.port or 0))

    def connect(self) -> socket.socket:
        """Open a connection without sending anything."""
        return socket.create_connection(self.address, timeout=30)

    def send(self, data: bytes, is_all: bool = False) -> bytes:
        """Send bytes that need not be HTTP, and return all that comes back.

        With `is_all`, the server learns that no further bytes follow; it then sends no page.
        """
        with self.connect() as connection:
            connection.sendall(data)
            if is_all:
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                return b"".join(iter(lambda: connection.recv(65536), b""))
        return b""

    def read_log(self) -> str:
        """Return what the server has written to its standard error."""
        self.log.seek(0)
        return self.log.read()

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


@contextlib.contextmanager
def serving(study: Study, max_files: int = 4096) -> Iterator[LiveServer]:
    """Run a server that may open so many files, and terminate it at the end."""
    server = LiveServer(study, max_files)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(30)
        server.log.close()
