"""An HTTP server on loopback that serves a folder in ranges and fails where it is told to.

    with FaultyHttpServer(folder) as server:
        server.faults += ["drop", "500"]      # the next two GETs; then all is well
        ... server.url("a.tar") ...
        server.gets                           # (path, Range header) of every GET

HTTP/1.0: one connection for each request, so that every request is a GET that is counted. As the endpoint of an S3
client it is an object store that knows nothing but GET and HEAD.
"""

import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

_HANG_S = 30.0


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        owner = self.server.owner
        with owner.lock:
            owner.gets.append((self.path, self.headers.get("Range", "")))
            fault = owner.faults.popleft() if owner.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault == "hang":
            owner.released.wait(_HANG_S)
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self._answer(body=True, fault=fault)

    def _answer(self, *, body: bool, fault: str = "") -> None:
        owner = self.server.owner
        path = owner.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        start, end = self._range(len(data), fault)
        if start >= len(data):
            self.send_error(416)
            return
        payload = data[start:end]
        if fault == "short":
            payload = payload[: len(payload) // 2]
        self.send_response(200 if (start, end) == (0, len(data)) else 206)
        if not owner.hides_length:
            self.send_header("Content-Length", str(len(payload)))
        self.send_header("ETag", f'"{owner.etag}"')
        self.end_headers()
        if body:
            self.wfile.write(owner.damage(payload[: len(payload) // 2] if fault == "drop" else payload))

    def _range(self, length: int, fault: str) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or fault == "whole":
            return 0, length
        return int(match[1]), min(int(match[2]) + 1, length)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, owner: "FaultyHttpServer") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the tests."""


class FaultyHttpServer:
    """See the text of this file. Faults: a status such as "500", "drop", "short", "whole", "hang", "reset", ""."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: deque[str] = deque()
        self.gets: list[tuple[str, str]] = []
        self.hides_length = False
        self.etag = "1"
        self.damage: Callable[[bytes], bytes] = lambda data: data
        self.lock = threading.Lock()
        self.released = threading.Event()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "FaultyHttpServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    def url(self, name: str) -> str:
        return f"http://{self.address}/{name}"
