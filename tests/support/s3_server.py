"""An S3-compatible server on 127.0.0.1, in a separate process.

    python -m tests.support.s3_server

The server is moto's. It handles one request at a time, so that its conditional put is atomic as in
S3. It prints its port, and ends when its standard input ends, at the latest with its parent.
"""

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


class S3Server:
    """A running server with a bucket called `bucket`."""

    def __init__(self, port: int) -> None:
        self.place = f"127.0.0.1:{port}"
        self.make_bucket("bucket")

    def uri(self, folder: str, bucket: str = "bucket") -> str:
        """Return the URI of a folder, as a user writes it."""
        options = f"endpoint_override={self.place}&scheme=http&region=us-east-1"
        return f"s3://{bucket}/{folder}?{options}"

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(f"http://{self.place}/{name}", method="PUT")
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.status == 200


@contextmanager
def s3_server(environment: dict[str, str] | None = None) -> Iterator[S3Server]:
    """Start a server; put its keys into the environment of this process and its children."""
    before = {name: os.environ.get(name) for name in KEYS}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.s3_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **(environment or {})},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        os.environ.update(KEYS)
        yield S3Server(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(30)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _serve() -> None:
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    application: Callable[..., Any] = DomainDispatcherApplication(create_backend_app)
    one_at_a_time = threading.Lock()
    # A server without conditional puts ignores the header.
    forgets = os.environ.get("TEST_S3_WITHOUT_CONDITIONS")

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if forgets and environ["REQUEST_METHOD"] == "PUT":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with one_at_a_time:
            return application(environ, start_response)

    server = make_server("127.0.0.1", 0, answer, threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
