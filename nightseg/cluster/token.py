"""The token by which a cluster of Ray knows its own: where it comes from, and whether others may read it."""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import stat
from pathlib import Path
from typing import Any, Final, NamedTuple

from nightseg.errors import UserError

VARIABLE: Final = "RAY_AUTH_TOKEN"
FILE_VARIABLE: Final = "RAY_AUTH_TOKEN_PATH"
_MOST_BYTES: Final = 4096  # that are looked at: a token has 64 characters


class Problem(NamedTuple):
    """What is wrong with a token file, and what to do."""

    what: str
    cure: str


def prepare_token(may_create: bool) -> None:
    """Settle token authentication before Ray looks: Ray's own way writes a world-readable file and prints a warning.

    A mode that the user set is kept. Otherwise a token that exists is used; a local Ray without one gets a fresh token
    in the environment of this process, which its children inherit: nothing to protect on disk, and a read-only home
    directory does not matter. Raises UserError: RAY_AUTH_TOKEN_PATH names no file with a token, or one open to others.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode not in ("", "token"):
        return
    has_token = bool(os.environ.get(VARIABLE))
    if not has_token and (given := os.environ.get(FILE_VARIABLE)):
        if problem := problem_of_file(Path(given)):
            raise UserError(f"{FILE_VARIABLE}: {given}: {problem.what}", cure=f"{problem.cure}, or unset the variable")
        has_token = True
    if not has_token:
        has_token = _protect_default_file()
    if not has_token and may_create:
        os.environ[VARIABLE] = secrets.token_hex(32)
        has_token = True
    if has_token and not mode:
        os.environ["RAY_AUTH_MODE"] = "token"
    _reload_ray_config()


def default_file() -> Path:
    """Where Ray looks without a variable. Raises RuntimeError: there is no home directory."""
    return Path.home() / ".ray" / "auth_token"


def problem_of_file(file: Path) -> Problem | None:
    """Why Ray cannot use a token file, or should not; None if it can."""
    cure = "write there what `ray get-auth-token` prints on the head of the cluster (chmod 600)"
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return Problem("it is a folder" if stat.S_ISDIR(status.st_mode) else "it is no regular file", cure)
        if _is_empty(file):
            return Problem("it is empty", cure)
        # Of a secret that is mounted read-only into a container, who mounts it decides on the mode.
        is_fixed = os.statvfs(file).f_flag & os.ST_RDONLY
    except FileNotFoundError:
        return Problem("there is no such file", cure)
    except OSError as error:
        return Problem(f"it cannot be read ({error.strerror})", cure)
    if status.st_mode & 0o077 and status.st_uid == os.getuid() and not is_fixed:
        return Problem("others may read it", f"chmod 600 {shlex.quote(str(file))}")
    return None


def _is_empty(file: Path) -> bool:
    with file.open("rb") as stream:
        return not stream.read(_MOST_BYTES).strip()


def _protect_default_file() -> bool:
    """Whether Ray's default file holds a token; where others may read it or change its folder, both are closed."""
    try:
        file = default_file()
        if not file.is_file() or _is_empty(file):
            return False
        for place, mode in ((file.parent, 0o700), (file, 0o600)):
            status = place.stat()
            if status.st_mode & 0o077 and status.st_uid == os.getuid():
                try:
                    place.chmod(mode)
                except OSError as error:  # a read-only home directory: usable, but say so
                    logging.getLogger(__name__).warning("%s is open to others: %s", place, error)
    except (OSError, RuntimeError):  # no home, or not ours to look at
        return False
    return True


def _reload_ray_config() -> None:
    """Ray caches the authentication mode and token when it is imported, which may be long before `connect`."""
    from ray import _raylet

    core: Any = _raylet
    core.Config.initialize("")
    core.AuthenticationTokenLoader.instance().reset_cache()
