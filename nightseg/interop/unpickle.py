"""Plain pickles of numpy arrays, such as detectron2's model zoo, read without letting them call anything.

A pickle is a program: it may ask for any function by name and call it. Here only names of plain data and of numpy's
array reconstruction are answered, the latter by stand-ins of our own, so not even numpy's unpickling code runs. What
else a file asks for is refused by name.
"""

from __future__ import annotations

import builtins
import io
import math
import pickle
from collections import OrderedDict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nightseg.networks.weights import refusal
from nightseg.storage import UserError

# Of builtins: what holds data and does nothing.
_PLAIN: Final = (
    *("bool", "int", "float", "complex", "str"),
    *("list", "tuple", "dict", "set", "frozenset"),
)
_NUMPY: Final = (
    "numpy",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "numpy.core.numeric",
    "numpy._core.numeric",
)
_NUMBERS: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def unpickle_arrays(data: bytes, where: str) -> Any:
    """Dictionaries, lists, numbers, strings and numpy arrays of numbers, also from Python 2.

    Raises UserError, naming the file by `where`: it asks for anything else, or is damaged.
    """
    reader = _Reader(data)
    try:
        return _with_arrays(reader.load())
    except _Refused as refused:
        raise refusal(where, str(refused)) from None
    except Exception as error:  # of the pickle machine, or of a stand-in that was given nonsense: a dozen types
        raise UserError(f"{where} is not a pickle of numpy arrays, or is damaged: {error}") from error


class _Refused(Exception):  # noqa: N818 (on its way through the pickle machine to its caller)
    """What was asked for."""


class _Dtype:
    """What stands for numpy.dtype: a code such as f4 and a byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if self.code not in _NUMBERS or self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"an array of type {self.order}{self.code}, which are not numbers")
        return np.dtype(self.order + self.code)


class _Array:
    """What stands for numpy.ndarray until the whole file is read: pickles fill arrays after making them."""

    shape: tuple[int, ...] = ()
    raw: bytes | str = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, self.columns_first, self.raw = state

    def numpy(self) -> npt.NDArray[Any]:
        return _numbers(self.raw, self.dtype, self.shape, "F" if self.columns_first else "C")


def _numbers(raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> npt.NDArray[Any]:
    kind = dtype.numpy()
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # Python 2 has bytes as text
    flat = np.frombuffer(data, kind)
    if flat.size != math.prod(shape):
        raise ValueError(f"an array of shape {shape} with {flat.size} numbers")
    values = flat.reshape(shape, order="F" if order == "F" else "C")
    return values.astype(values.dtype.newbyteorder("="), order="C")


class _Reader(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._stand_ins = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in ("bytes", "bytearray"):
            return _bytes
        if module in ("builtins", "__builtin__") and name in _PLAIN:
            return getattr(builtins, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module in _NUMPY or (module, name) == ("_codecs", "encode")) and name in self._stand_ins:
            return self._stand_ins[name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, key: Any) -> Any:
        raise _Refused(f"an object outside of the file ({key!r})")


def _bytes(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytes:
    """What a pickle may make bytes of. A number would make as many zeros: a small file could fill the memory."""
    if isinstance(content, str):
        return content.encode(encoding)
    if not isinstance(content, bytes | list | tuple):
        raise _Refused(f"bytes from a {type(content).__name__}")
    return bytes(content)


def _stand_ins() -> dict[str, Any]:
    """New ones for each file: a pickle may set attributes of whatever it gets hold of."""

    class Dtype(_Dtype): ...

    class Array(_Array): ...

    def reconstruct(*_: Any) -> Array:
        return Array()

    def scalar(dtype: _Dtype, raw: bytes | str) -> Any:
        return _numbers(raw, dtype, (), "C")[()]

    def from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> npt.NDArray[Any]:
        return _numbers(raw, dtype, shape, order)

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":  # how Python 3 writes bytes for Python 2
            raise ValueError(f"text encoded as {encoding}")
        return text.encode("latin1")

    return {
        "dtype": Dtype,
        "ndarray": Array,
        "_reconstruct": reconstruct,
        "scalar": scalar,
        "_frombuffer": from_buffer,
        "encode": encode,
    }


def _with_arrays(content: Any) -> Any:
    """The content with arrays for their stand-ins, wherever they are values of dictionaries and lists."""
    seen: set[int] = set()
    whole = [content]
    waiting: list[Any] = [whole]
    while waiting:
        holder = waiting.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            value = holder[key]
            if isinstance(value, _Array):
                holder[key] = value.numpy()
            elif isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return whole[0]
