"""Locations: one behaviour on local disk, on pyarrow's own file systems and on fsspec's."""

import errno
import os
import pickle
import secrets
import subprocess
import sys
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from nightseg.storage import Entry, Location, UserError, hash_of, paths, sha256_of
from tests.object_store import ObjectStore

STORES = ("local", "memory", "subtree", "s3")


@pytest.fixture(params=STORES)
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """An empty folder with a blank and a letter beyond ASCII in its name, on each kind of store."""
    name = f"läuft {secrets.token_hex(4)}"
    if request.param == "local":
        return Location.of(tmp_path / name)
    if request.param == "subtree":
        system = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
        monkeypatch.setattr(paths, "file_system", lambda uri: (system, uri.removeprefix("subtree://")))
    if request.param == "s3":
        return cast(ObjectStore, request.getfixturevalue("s3")).place(name)
    return Location.of(f"{request.param}://{name}")


# -- addresses -------------------------------------------------------------------------------------------------------


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert Location.of("a/b") == Location(f"{tmp_path}/a/b")
    assert Location.of(Path("a/../b/")) == Location(f"{tmp_path}/b")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert Location.of("..") == Location(f"{tmp_path}")
    assert Location.of("../x") == Location.of("../run/../x") == Location(f"{tmp_path}/x")
    assert Location.of("../../x") == Location(f"{tmp_path.parent}/x")
    assert Location.of("~/data").uri == "/home/someone/data"
    assert Location.of("file:///data/a%20b").uri == "/data/a b"
    assert Location.of(Location("/x")) == Location("/x")
    assert Location.of("/data/käse 1").local == Path("/data/käse 1")


def test_other_schemes_are_kept() -> None:
    place = Location.of("s3://bucket/runs/?region=eu-west-1")
    assert place.uri == "s3://bucket/runs?region=eu-west-1"
    assert (place / "a b/c.json").uri == "s3://bucket/runs/a b/c.json?region=eu-west-1"
    assert (place / "a b").parent == place
    assert place.name == "runs"
    assert not place.is_local
    with pytest.raises(UserError, match="remote"):
        _ = place.local
    assert (Location.of("memory://") / "a").uri == "memory://a"
    assert Location.of("/a").parent.uri == "/"
    with pytest.raises(UserError, match="question mark"):
        _ = place / "what?.png"


@pytest.mark.parametrize("path", ["", "a\0b", "a\udcff", "file://host/data"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(UserError):
        Location.of(path)


@pytest.mark.parametrize(
    "relative",
    [
        "/etc/passwd",
        "..",
        "../a",
        "a/../../b",
        "a/..",
        "a\\b",
        "a\0b",
        "",
        ".",
        "./",
        "s3://b/a",
        "C:/a",
        "a\udcff.png",
    ],
)
def test_paths_that_could_lead_out_are_refused(relative: str) -> None:
    with pytest.raises(UserError, match="refused"):
        _ = Location("/data") / relative


@pytest.mark.parametrize(
    ("relative", "expected"),
    [("a//b/./c", "/d/a/b/c"), ("...", "/d/..."), ("a..b", "/d/a..b"), ("ä b/%20", "/d/ä b/%20")],
)
def test_odd_names_are_kept(relative: str, expected: str) -> None:
    assert (Location("/d") / relative).uri == expected


def test_credentials_are_not_shown() -> None:
    place = Location.of("s3://AKIA123:geheim@bucket/a")
    assert str(place) == "s3://***@bucket/a"
    assert pickle.loads(pickle.dumps(place)) == place
    assert str(Location.of("abfs://container@account/a")) == "abfs://container@account/a"


# -- one behaviour everywhere ----------------------------------------------------------------------------------------


def test_bytes_come_back(root: Location) -> None:
    file = root / "ein Ordner/größe 1.bin"
    assert not file.exists()
    with pytest.raises(FileNotFoundError):
        file.read_bytes()
    with pytest.raises(FileNotFoundError):
        file.size()
    file.write_bytes(b"first")
    file.write_bytes(b"second")
    assert (file.read_bytes(), file.size(), file.exists(), file.is_folder()) == (b"second", 6, True, False)
    with file.open_input() as stream:
        stream.seek(2)
        assert stream.read() == b"cond"
    assert (root / "ein Ordner").is_folder()
    assert pickle.loads(pickle.dumps(file)).read_bytes() == b"second"


@pytest.mark.parametrize("name", ["draft.zst", "table.gz", "a.bz2", "a.lz4"])
def test_the_suffix_of_a_name_compresses_nothing(root: Location, name: str) -> None:
    (root / name).write_bytes(b"as it is" * 100)
    assert (root / name).size() == 800
    assert (root / name).read_bytes() == b"as it is" * 100


def test_create_writes_once(root: Location) -> None:
    file = root / "x.json"
    assert file.create_bytes(b"mine")
    assert not file.create_bytes(b"theirs")
    assert file.read_bytes() == b"mine"


def test_listing_is_sorted_and_relative(root: Location) -> None:
    for path in ("b.png", "a/d/e.png", "a/c ü.png"):
        (root / path).write_bytes(b"12345")
    assert [(entry.name, entry.is_folder) for entry in root.list()] == [("a", True), ("b.png", False)]
    deep = root.list(recursive=True)
    assert [entry.name for entry in deep] == ["a", "a/c ü.png", "a/d", "a/d/e.png", "b.png"]
    assert [entry.size for entry in deep] == [0, 5, 0, 5, 5]
    with pytest.raises(FileNotFoundError):
        (root / "nothing").list()


def test_delete_takes_files_and_folders(root: Location) -> None:
    (root / "a/b/c").write_bytes(b"1")
    (root / "d").write_bytes(b"1")
    (root / "d").delete()
    (root / "a").delete()
    (root / "a").delete()
    assert not (root / "a").exists()
    assert root.list() == []


def test_folders_are_made(root: Location) -> None:
    (root / "a/b").make_folder()
    (root / "a/b").make_folder()
    assert (root / "a/b").is_folder() == (not root.uri.startswith("s3:"))  # folders of stores are names


def test_json_is_canonical(root: Location) -> None:
    file = root / "x.json"
    file.write_json({"b": [1, 2.5, None], "a": "ü"})
    assert file.read_bytes().decode() == '{\n  "a": "ü",\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    assert file.read_json() == {"a": "ü", "b": [1, 2.5, None]}


def test_tables_come_back_and_have_one_spelling(root: Location) -> None:
    table = pa.table({"frame_id": ["a", "ü"], "features": pa.array([[1.0], [2.0, 3.0]], pa.list_(pa.float32()))})
    (root / "1.parquet").write_table(table)
    (root / "2.parquet").write_table(table)
    assert (root / "1.parquet").read_table().equals(table)
    assert (root / "1.parquet").read_bytes() == (root / "2.parquet").read_bytes()


# -- local disk ------------------------------------------------------------------------------------------------------


def test_links_are_listed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").write_bytes(b"1")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.png").symlink_to(tmp_path / "real/a.png")
    names = [(entry.name, entry.is_folder) for entry in Location.of(tmp_path).list(recursive=True)]
    assert names == [("b.png", False), ("loop", True), ("real", True), ("real/a.png", False)]
    assert Location.of(tmp_path).list()[0] == Entry("b.png", 1, (tmp_path / "real/a.png").stat().st_mtime_ns, False)


def test_deleting_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    Location.of(tmp_path / "link").delete()
    assert (tmp_path / "real").is_dir()


def test_a_name_that_is_not_utf8_is_named_in_the_error(tmp_path: Path) -> None:
    folder = Location.of(tmp_path)
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    with pytest.raises(UserError, match=r"udcff.*UTF-8.*rename"):
        _ = [folder / entry.name for entry in folder.list()]


def test_the_longest_names_can_be_written(tmp_path: Path) -> None:
    file = Location.of(tmp_path) / ("n" * 255)
    file.write_bytes(b"1")
    assert file.read_bytes() == b"1"


@pytest.mark.parametrize(
    ("code", "cure"), [(errno.ENOSPC, "free space"), (errno.EROFS, "read-only"), (errno.EACCES, "permissions")]
)
def test_a_failed_write_says_the_cure_and_keeps_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cure: str
) -> None:
    file = Location.of(tmp_path) / "a.json"
    file.write_bytes(b"old")

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.fsync", fail)
    for write in (file.write_bytes, file.create_bytes, (file.parent / "new").create_bytes):
        with pytest.raises(UserError, match=rf"cannot write {tmp_path}.*{cure}"):
            write(b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    """A real limit instead of a patched call: the kernel refuses to let the file grow."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "import sys; from nightseg.storage import Location\n"
        "Location.of(sys.argv[1]).write_bytes(b'x' * 5000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "big")], capture_output=True, text=True)
    assert "UserError: cannot write" in done.stderr
    assert "limit" in done.stderr
    assert os.listdir(tmp_path) == []


def test_create_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr("os.link", no_links)
    file = Location.of(tmp_path) / "a"
    assert file.create_bytes(b"1")
    assert not file.create_bytes(b"2")
    assert file.read_bytes() == b"1"


def test_unfinished_writes_are_not_listed(tmp_path: Path) -> None:
    environment = os.environ | {"NIGHTSEG_FAULT": "after:temporary-b.json"}
    code = "import sys; from nightseg.storage import Location; Location.of(sys.argv[1]).write_json({})"
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sub/b.json")], env=environment)
    assert killed.returncode == -9
    assert len(os.listdir(tmp_path / "sub")) == 1
    assert Location.of(tmp_path).list(recursive=True)[0].name == "sub"
    assert Location.of(tmp_path / "sub").list() == []


# -- remote stores ---------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match=r"nonsense:// addresses: there is no file system"):
        Location.of("nonsense://a/b").exists()


# -- hashes ----------------------------------------------------------------------------------------------------------


def test_hashes() -> None:
    assert sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_of({"b": (1, 2), "a": 1.0}) == hash_of({"a": 1.0, "b": [1, 2]})
    assert hash_of({"a": 1}) != hash_of({"a": 1.0})
    assert hash_of([]) == sha256_of(b"[]")
    with pytest.raises(ValueError, match="JSON"):
        hash_of(float("nan"))
