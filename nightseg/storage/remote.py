"""File systems behind URIs: which one serves a URI, and patience with stores that fail for a moment."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from nightseg.errors import UserError

Result = TypeVar("Result")
_LOG = logging.getLogger("nightseg.remote")
_PAUSES = (0.2, 0.8, 3.2)  # seconds before the second, third and fourth try
_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI with a scheme, and the path on it.

    Only `scheme://authority?options` is parsed; the path is taken as it is written, so that names with spaces,
    percent signs and letters of any language mean themselves.
    """
    before, _, options = uri.partition("?")
    scheme, _, rest = before.partition("://")
    authority, _, path = rest.partition("/")
    system, root = _system(scheme, authority, options)
    return system, f"{root}/{path}".rstrip("/") if path else root


@functools.cache
def _system(scheme: str, authority: str, options: str) -> tuple[pafs.FileSystem, str]:
    address = f"{scheme}://{authority}" + (f"?{options}" if options else "")
    try:
        system, root = pafs.FileSystem.from_uri(f"{scheme}://{authority}/" + (f"?{options}" if options else ""))
    except OSError as error:
        raise UserError(
            f"cannot reach {scheme}:// storage ({error}); check the bucket's name, the network, the credentials, and "
            "the region (add ?region=NAME to the address)"
        ) from error
    except pa.ArrowInvalid:
        import fsspec  # for the schemes that pyarrow does not know

        try:
            inner, root = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"no file system for {scheme}:// addresses ({error}); install the fsspec package of this scheme, "
                "or use a local path, s3:// or gs://"
            ) from error
        system = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return system, root.rstrip("/")


def retried(uri: str, action: Callable[[], Result]) -> Result:
    """`action()`, tried again after pauses while the store is busy; the last error names the URI."""
    for pause in _PAUSES:
        try:
            return action()
        except _PERMANENT:
            raise
        except OSError as error:
            _LOG.warning("%s: %s; next try in %.1f s", uri, error, pause)
            time.sleep(pause)
    try:
        return action()
    except _PERMANENT:
        raise
    except OSError as error:
        raise OSError(error.errno, f"gave up after {len(_PAUSES) + 1} tries: {error}", uri) from error
