"""Plain pickles of numpy arrays, such as detectron2's model zoo, read without letting them call anything.

A pickle is a program: it may ask for any function by name and call it. Here a whitelist of plain data is answered, and
numpy's array reconstruction by stand-ins of our own, so that not even numpy's unpickling code runs. (What torch.load
does for weights_only is for its own files.) A pickle may set attributes of whatever it gets hold of, so nothing that
is answered outlives the file.
"""

from __future__ import annotations

import builtins
import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nightseg.networks.weights import refusal
from nightseg.storage import UserError

_PLAIN: Final = ("bool", "int", "float", "complex", "str", "list", "tuple", "dict", "set", "frozenset")
_NUMPY: Final = ("numpy", *(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")))
_NUMBERS: Final = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def unpickle_arrays(data: bytes, where: str) -> Any:
    """Dictionaries, lists, numbers, strings and numpy arrays of numbers, also from Python 2.

    Raises UserError, naming the file by `where`: it asks for anything else, or is damaged.
    """
    try:
        return _with_arrays(_Reader(io.BytesIO(data), encoding="latin1").load())
    except _Refused as refused:
        raise refusal(where, str(refused)) from None
    except Exception as error:  # of the pickle machine, or of a stand-in that was given nonsense: a dozen types
        raise UserError(
            f"{where}: not a pickle of numpy arrays, or damaged: {error}", cure="copy or download the file again"
        ) from error


class _Refused(Exception):  # noqa: N818 (on its way through the pickle machine to its caller)
    """What was asked for."""


class _Dtype:
    """What stands for numpy.dtype: a code such as f4 and a byte order."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """What stands for numpy.ndarray until the whole file is read: pickles fill arrays after making them."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, raw = state
        self.values = _numbers(raw, dtype, shape, "F" if columns_first else "C")


def _numbers(raw: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: str) -> npt.NDArray[Any]:
    if dtype.code not in _NUMBERS or dtype.order not in ("<", ">", "=", "|"):
        raise ValueError(f"an array of type {dtype.order}{dtype.code}, which are not numbers")
    data = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)  # Python 2 has bytes as text
    flat = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
    if flat.size != math.prod(shape):
        raise ValueError(f"an array of shape {shape} with {flat.size} numbers")
    values = flat.reshape(shape, order="F" if order == "F" else "C")
    return values.astype(values.dtype.newbyteorder("="), order="C")


def _bytes(content: bytes | str | list[int] = b"", encoding: str = "latin1") -> bytes:
    """What a pickle may make bytes of. A number would make as many zeros: a small file could fill the memory."""
    if isinstance(content, str) and encoding == "latin1":  # how Python 3 writes bytes for Python 2
        return content.encode(encoding)
    if not isinstance(content, bytes | list | tuple):
        raise _Refused(f"bytes from a {type(content).__name__}")
    return bytes(content)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__") and name in _PLAIN:
            return getattr(builtins, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        answers: dict[str, Callable[..., Any]] = {}  # new functions each time
        if module in _NUMPY:
            answers = {
                "dtype": lambda code, *_: _Dtype(code),
                "ndarray": lambda *_: _Array(),
                "_reconstruct": lambda *_: _Array(),
                "scalar": lambda dtype, raw: _numbers(raw, dtype, (), "C")[()],
                "_frombuffer": lambda raw, dtype, shape, order: _numbers(raw, dtype, shape, order),
            }
        elif module in ("builtins", "__builtin__"):
            answers = {"bytes": lambda *content: _bytes(*content), "bytearray": lambda *content: _bytes(*content)}
        elif module == "_codecs":
            answers = {"encode": lambda *content: _bytes(*content)}
        if name not in answers:
            raise _Refused(f"{module}.{name}")
        return answers[name]

    def persistent_load(self, key: Any) -> Any:
        raise _Refused(f"an object outside of the file ({key!r})")


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
                holder[key] = value.values
            elif isinstance(value, dict | list) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
    return whole[0]
