"""A file server on loopback, which notes what it is asked for."""

import http.server
import threading
from collections.abc import Iterator

import pytest


class NotingServer(http.server.ThreadingHTTPServer):
    """Answers every request with 404.

    Attributes:
        requests: The paths that were asked for.
        url: Where it is.
    """

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), _NotFound)
        self.requests: list[str] = []
        self.url = f'http://127.0.0.1:{self.server_port}'


class _NotFound(http.server.BaseHTTPRequestHandler):
    server: NotingServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.send_error(404)


@pytest.fixture
def noting_server() -> Iterator[NotingServer]:
    with NotingServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.02}, daemon=True).start()
        yield server
        server.shutdown()
