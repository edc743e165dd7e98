"""Arrays come out of pickles as they went in; whatever else a pickle asks for is refused by name and not run."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.interop.unpickle import unpickle_arrays
from nightseg.storage import UserError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_and_plain_data_come_back(protocol: int) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "rows": rng.normal(size=(2, 3)).astype(np.float32),
        "columns first": np.asfortranarray(rng.normal(size=(3, 4))),
        "big endian": np.arange(3, dtype=">f4"),
        "no axes": np.array(3.0),
        "empty": np.zeros((0, 3), np.float32),
        "view": np.arange(12, dtype=np.int64).reshape(3, 4)[:, ::2],
        "scalar": np.float64(2.5),
        "yes": np.bool_(True),
    }
    content = {
        "model": OrderedDict(arrays),
        "list": [np.ones(2)],
        "set": {1, 2},
        "bytes": b"\xff",
        "text": "ä",
        "n": None,
    }
    found = unpickle_arrays(pickle.dumps(content, protocol=protocol), "file")
    for name, value in arrays.items():
        back = found["model"][name]
        assert np.array_equal(back, value) and np.shape(back) == np.shape(value), name
        assert np.asarray(back).dtype == np.asarray(value).dtype.newbyteorder("=")
    assert isinstance(found["list"][0], np.ndarray)
    assert {key: found[key] for key in ("set", "bytes", "text", "n")} == {
        key: content[key] for key in ("set", "bytes", "text", "n")
    }


def test_python_2_wrote_arrays_as_text() -> None:
    """{'w': array([1, 2], float32)} as Python 2's cPickle writes it with protocol 2."""
    raw = struct.pack("<2f", 1.0, 2.0)
    data = b"".join(
        [
            b"\x80\x02}q\x00U\x01wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
            b"(K\x01K\x02\x85cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89U\x08" + raw + b"tbs.",
        ]
    )
    assert unpickle_arrays(data, "file")["w"].tolist() == [1.0, 2.0]


class Asks:
    """Pickles as a call of any function by name."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.program = f"c{module}\n{name}\n".encode()
        self.arguments = pickle.dumps(arguments, protocol=2)[2:-1]

    def __bytes__(self) -> bytes:
        return b"\x80\x02" + self.program + self.arguments + b"R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("numpy", "fromfile"),
        ("numpy", "load"),
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.testing._private.utils", "runstring"),
        ("torch", "load"),
        ("functools", "partial"),
        ("importlib", "import_module"),
        ("pickle", "loads"),
        ("_codecs", "lookup"),
        ("collections", "namedtuple"),
    ],
)
def test_other_names_are_refused_and_named(tmp_path: Path, module: str, name: str) -> None:
    evidence = tmp_path / "ran"
    data = bytes(Asks(module, name, f"touch {evidence}"))
    with pytest.raises(UserError) as caught:
        unpickle_arrays(data, "zoo.pkl")
    assert f"asks for {module}.{name}" in str(caught.value)
    assert "zoo.pkl: refused" in str(caught.value)
    assert not evidence.exists()


class Runs:
    """What a stranger would put into a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_not_run_however_deep_it_lies(tmp_path: Path, protocol: int) -> None:
    evil = Runs(tmp_path / "ran")
    for content in (evil, {"model": {"a": [evil]}}, np.array([evil], dtype=object), {"a": (np.zeros(2), {"b": evil})}):
        with pytest.raises(UserError, match="system"):
            unpickle_arrays(pickle.dumps(content, protocol=protocol), "file")
    assert not (tmp_path / "ran").exists()


def test_dotted_names_of_newer_protocols_lead_nowhere() -> None:
    data = b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93."
    with pytest.raises(UserError, match=r"numpy\.ndarray\.__init__"):
        unpickle_arrays(data, "file")


def test_objects_outside_of_the_file_are_refused() -> None:
    with pytest.raises(UserError, match="outside of the file"):
        unpickle_arrays(b"\x80\x02U\x03keyQ.", "file")


def test_one_file_cannot_change_how_the_next_is_read() -> None:
    """BUILD with a pair sets attributes of whatever was named: here of the function that makes arrays."""
    name = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"
    changed = unpickle_arrays(name + b"N}U\x06marker\x88s\x86b.", "file")
    assert changed.marker is True
    assert not hasattr(unpickle_arrays(name + b".", "file"), "marker")


@pytest.mark.parametrize(
    "content", [np.array(["a"]), np.array([None]), np.zeros(2, dtype=[("a", "f4")]), np.array(1, dtype="M8[s]")]
)
def test_arrays_of_other_things_than_numbers_are_refused(content: Any) -> None:
    with pytest.raises(UserError, match="not numbers"):
        unpickle_arrays(pickle.dumps({"a": content}), "file")


def test_damage_is_an_error_of_the_user_whatever_it_is() -> None:
    good = pickle.dumps({"model": {"a": np.arange(100, dtype=np.float32)}}, protocol=2)
    for cut in range(0, len(good), 7):
        with pytest.raises(UserError, match="damaged"):
            unpickle_arrays(good[:cut], "file")
    for place in range(2, len(good), 3):
        data = bytearray(good)
        data[place] ^= 0x41
        try:
            unpickle_arrays(bytes(data), "file")  # a number that has changed is a number
        except UserError as error:
            assert str(error).startswith("file")
    with pytest.raises(UserError, match="damaged"):
        unpickle_arrays(good.replace(b"Kd\x85", b"Ke\x85"), "file")


def test_a_dictionary_that_holds_itself_is_read() -> None:
    loop: dict[str, Any] = {"a": np.ones(1)}
    loop["self"] = loop
    found = unpickle_arrays(pickle.dumps(loop), "file")
    assert found["self"] is found
    assert found["a"].tolist() == [1.0]
