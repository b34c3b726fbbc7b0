"""A real MLflow server behind a door that can be slammed: it dies, answers 500, or takes calls and never answers."""

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

from chaos_launch import FailedError, free_port

Mood = Literal["good", "500", "hangs", "dies"]

_UP_WITHIN_S = 180.0
_HOP_BY_HOP = frozenset(("connection", "keep-alive", "transfer-encoding", "content-length"))


class Door(ThreadingHTTPServer):
    """Passes requests on to the server behind it, as its mood is.

    Args:
        behind: port of that server.
    """

    daemon_threads = True

    def __init__(self, *, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind = behind
        self.mood: Mood = "good"
        self.num_refused = 0
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def turn(self, mood: Mood) -> None:
        """From now on."""
        self.mood = mood
        if mood == "dies":
            self.close()

    def close(self) -> None:
        """Refuse connections, and cut those there are."""
        if not self.closed.is_set():
            self.closed.set()
            self.shutdown()
            self.server_close()


class _Passing(BaseHTTPRequestHandler):
    server: Door
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.mood == "dies":
            self.close_connection = True
            return
        if self.server.mood != "good":
            self.server.num_refused += 1
        if self.server.mood == "hangs":
            self.server.closed.wait()
            self.close_connection = True
            return
        status, headers, content = self._ask(body) if self.server.mood == "good" else (500, [], b"out of order")
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_POST  # noqa: N815 - the names that http.server calls

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            connection.request(self.command, self.path, body=body, headers=headers)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
            return answer.status, kept, answer.read()

    def log_message(self, *words: object) -> None:
        """Not on the terminal."""


@contextlib.contextmanager
def tracking_server(folder: Path) -> Iterator[tuple[Door, str]]:
    """An MLflow server with its own store in a folder: the door before it, and its own URI, which is always good."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)),
        *("--backend-store-uri", f"sqlite:///{folder.resolve() / 'server.db'}"),
        *("--artifacts-destination", str(folder.resolve() / "artifacts")),
    ]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    door = Door(behind=port)
    try:
        _wait_until_up(f"http://127.0.0.1:{port}", server)
        yield door, f"http://127.0.0.1:{port}"
    finally:
        door.close()
        server.terminate()
        server.wait()


def _wait_until_up(uri: str, server: "subprocess.Popen[bytes]") -> None:
    started = time.monotonic()
    while server.poll() is None and time.monotonic() - started < _UP_WITHIN_S:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise FailedError("the MLflow server did not start")
