"""Which of two writers is told that it was first; how much is asked of a store; what stores say, in words."""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from nightseg.storage import Location, UserError, stores
from nightseg.storage.stores import fault_of_store
from tests.object_store import BUCKET, SECRET, ObjectStore, forget


@pytest.fixture
def place(s3: ObjectStore) -> Location:
    return s3.place(secrets.token_hex(4)) / "ein Ordner/größe+1 %20#.json"


# -- the first writer --------------------------------------------------------------------------------------------------


def test_of_many_that_create_an_object_at_once_one_is_told_that_it_did(place: Location) -> None:
    (place.parent / "known").create_bytes(b"")
    for _ in range(3):
        start, made = threading.Barrier(8), dict[int, bool]()

        def write(number: int, start: threading.Barrier = start, made: dict[int, bool] = made) -> None:
            start.wait()
            made[number] = place.create_bytes(b"%d" % number)

        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        (winner,) = [number for number, is_mine in made.items() if is_mine]
        assert place.read_bytes() == b"%d" % winner
        assert stores.decides_first(place.uri)
        place.delete()


def test_a_store_that_takes_no_notice_of_the_condition_is_found_out(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some servers of S3's kind do: the second first write would be one, too."""
    client = stores._s3_client("", "us-east-1")
    put_object = client.put_object
    monkeypatch.setattr(client, "put_object", lambda IfNoneMatch, **told: put_object(**told))
    monkeypatch.setattr(stores, "_decides", {})
    assert place.create_bytes(b"mine")
    assert not stores.decides_first(place.uri)
    assert not place.create_bytes(b"theirs")
    assert place.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("status", "code", "answers"),
    [(409, "ConditionalRequestConflict", [False]), (501, "NotImplemented", [True, False])],
)
def test_what_stores_answer_instead(
    place: Location, monkeypatch: pytest.MonkeyPatch, status: int, code: str, answers: list[bool]
) -> None:
    from botocore.exceptions import ClientError

    def refuse(**_: object) -> None:
        raise ClientError(
            {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},  # type: ignore[typeddict-item]
            "PutObject",
        )

    monkeypatch.setattr(stores, "_decides", {})
    monkeypatch.setattr(stores._s3_client("", "us-east-1"), "put_object", refuse)
    assert [place.create_bytes(b"mine") for _ in answers] == answers
    assert stores.decides_first(place.uri) == (status == 409)


class Uploads(BaseHTTPRequestHandler):
    """What the upload of Google's JSON API does with ifGenerationMatch=0."""

    held: dict[str, bytes]

    def do_POST(self) -> None:
        parts = urlsplit(self.path)
        told = {name: values[0] for name, values in parse_qs(parts.query).items()}
        data = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{parts.path.removeprefix('/upload/storage/v1/b/').removesuffix('/o')}/{told['name']}"
        is_new = (told["uploadType"], told["ifGenerationMatch"]) == ("media", "0") and name not in self.held
        if is_new:
            self.held[name] = data
        body = json.dumps({"name": told["name"]}).encode()
        self.send_response(200 if is_new else 412)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    from google.auth.credentials import AnonymousCredentials

    Uploads.held = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Uploads)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("google.auth.default", lambda scopes: (AnonymousCredentials(), None))  # type: ignore[no-untyped-call]
    yield Uploads.held
    server.shutdown()
    thread.join()
    server.server_close()


def test_on_googles_store_the_first_writer_is_told_so(uploads: dict[str, bytes]) -> None:
    made = [stores._create_on_gcs("bucket/a b/ü.json", data) for data in (b"mine", b"theirs")]
    assert made == [True, False]
    assert uploads == {"bucket/a b/ü.json": b"mine"}


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_a_file_that_grows_is_read_as_it_was_or_as_it_is(place: Location) -> None:
    """Not the first bytes of the new one: a lease, or notes that a run writes again and again, would be damaged."""
    short, long, is_done = b"1" * 10, b"2" * 20_000, threading.Event()
    place.write_bytes(short)

    def write() -> None:
        while not is_done.is_set():
            place.write_bytes(long)
            place.write_bytes(short)

    writer = threading.Thread(target=write)
    writer.start()
    seen = {place.read_bytes() for _ in range(100)}
    is_done.set()
    writer.join()
    assert seen <= {short, long}


def test_a_file_is_few_requests(place: Location, s3: ObjectStore) -> None:
    place.parent.make_folder()
    (place.parent / "known").create_bytes(b"")

    def asked(before: int) -> list[str]:
        return [method for method, _ in s3.requests[before:]]

    before = len(s3.requests)
    place.write_bytes(b"x" * 3_000_000)
    assert asked(before) == ["PUT"]
    before = len(s3.requests)
    assert place.read_bytes() == b"x" * 3_000_000
    assert asked(before) == ["GET"]
    before = len(s3.requests)
    place.create_bytes(b"")
    assert asked(before) == ["PUT"]


# -- what stores say ---------------------------------------------------------------------------------------------------


def test_an_option_that_a_store_does_not_know_is_named() -> None:
    with pytest.raises(UserError, match=r"s3://bucket: .*regoin"):
        Location.of("s3://bucket/a?regoin=eu-west-1").exists()


def test_no_access_to_bytes_by_an_address_with_credentials() -> None:
    for uri in (f"s3://AKIA:geheim/1@{BUCKET}/a", f"s3://{BUCKET}/a?access_key=AKIA&secret_key=geheim"):
        with pytest.raises(UserError, match="holds credentials") as caught:
            Location.of(uri).read_bytes()
        assert "geheim" not in str(caught.value) and "AKIA" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bucket": "no-such-bucket"}, "there is no such bucket .*region=NAME"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "refuses access .*environment gives"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "does not answer .*AWS_ENDPOINT_URL"),
    ],
)
def test_what_a_store_says_is_told_with_its_cure(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], words: str, tmp_path: Path
) -> None:
    place = Location.of(f"s3://{change.get('bucket') or BUCKET}/{secrets.token_hex(4)}")
    monkeypatch.setenv("HOME", str(tmp_path))  # no profile of whoever runs the tests
    for name, value in change.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    forget()
    try:
        # Without credentials pyarrow asks as nobody, and this server lets it in.
        asks = [lambda: place.create_bytes(b""), place.read_bytes, place.list][
            : 2 if "AWS_ACCESS_KEY_ID" in change else 3
        ]
        for ask in asks:
            with pytest.raises(OSError) as caught:
                ask()
            told = fault_of_store(caught.value)
            assert re.search(words, str(told)) and SECRET not in str(told)
    finally:
        monkeypatch.undo()
        forget()


def test_other_errors_are_not_those_of_a_store(tmp_path: Path) -> None:
    assert fault_of_store(FileNotFoundError(2, "no such file", "/a/credentials")) is None
    assert fault_of_store(PermissionError(13, "Permission denied", "/a")) is None
