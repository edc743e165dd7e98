"""An object store of S3's kind on loopback, which counts what it is asked for."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from nightseg.storage import Location, stores

BUCKET = "nightseg-tests"
ACCESS_KEY = "AKIATESTTESTTESTTEST"
SECRET = "not-for-any-eye/+="  # of the store's account: nothing that nightseg writes or says may hold it


class ObjectStore(NamedTuple):
    """`requests`: (method, path) of each, in order; `endpoint`: its address."""

    endpoint: str
    requests: list[tuple[str, str]]

    def place(self, path: str) -> Location:
        return Location.of(f"s3://{BUCKET}/{path}")

    def count(self, by: Callable[[str, str], Any] = lambda method, path: method) -> Counter[Any]:
        """Requests by method, or by what `by` makes of method and path; those that it gives None are left out."""
        counted = Counter(by(*request) for request in self.requests)
        counted.pop(None, None)
        return counted


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Runs in threads of this process; processes that are started meanwhile find it by their environment."""
    pytest.importorskip("moto", reason="needs moto: pip install -e '.[dev]'")
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    requests: list[tuple[str, str]] = []
    application = DomainDispatcherApplication(create_backend_app)

    def counting(environment: dict[str, Any], start_response: Any) -> Any:
        query = environment["QUERY_STRING"]
        path = environment["PATH_INFO"].encode("latin-1").decode()  # PEP 3333
        requests.append((environment["REQUEST_METHOD"], path + (f"?{query}" if query else "")))
        return application(environment, start_response)

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as with a real store

        def log(self, *_: Any) -> None:
            pass

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        forget()
        stores._s3_client("", "us-east-1").create_bucket(Bucket=BUCKET)
        requests.clear()
        try:
            yield ObjectStore(endpoint, requests)
        finally:
            forget()
            server.shutdown()
            server.server_close()


def forget() -> None:
    """Connections of this process."""
    stores._system.cache_clear()
    stores._s3_client.cache_clear()
    stores._decides.clear()
