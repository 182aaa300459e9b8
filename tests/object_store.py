"""An S3-compatible server on this machine, which tells what it was asked and can be made to refuse."""

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self
from urllib.request import Request, urlopen

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class ObjectStore:
    """moto's server, in threads of this process, from `__enter__` to `__exit__`."""

    def __init__(self) -> None:
        """Bind a free port of the loopback interface."""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._serve, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._buckets = 0
        self.requests: list[str] = []
        """Method, path and query of each request, as in `GET /bucket/key?`, in the order of arrival."""
        self.answer: Callable[[str], str | None] | None = None
        """Called with a request; the HTTP status to refuse it with, or None."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which the server is reached."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        """Make a bucket, and give its name."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        with urlopen(Request(f"{self.environment['AWS_ENDPOINT_URL']}/{name}", method="PUT")):
            return name

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, environment: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        request = f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}?{environment['QUERY_STRING']}"
        self.requests.append(request)
        status = self.answer(request) if self.answer else None
        if status is None:
            answered: Iterable[bytes] = self._moto(environment, start)
            return answered
        environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        start(status, [("Content-Type", "application/xml")])
        return [b"<Error><Code>AccessDenied</Code></Error>"]


class _Quiet(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing: `requests` tells."""
