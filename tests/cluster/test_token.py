"""A token file that Ray cannot use, or that others may read, is told before Ray starts; a good one is used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nightseg.cluster import ray as cluster
from nightseg.cluster import submit, token
from nightseg.errors import UserError


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(token, "_reload_ray_config", lambda: None)
    return tmp_path


def written(file: Path, text: str, mode: int = 0o600) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(mode)
    return file


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda file: None, "there is no such file", "get-auth-token"),
    "empty": (lambda file: written(file, ""), "it is empty", "get-auth-token"),
    "blank": (lambda file: written(file, " \n"), "it is empty", "get-auth-token"),
    "folder": (lambda file: file.mkdir(), "it is a folder", "get-auth-token"),
    "pipe": (lambda file: os.mkfifo(file), "it is no regular file", "get-auth-token"),
    "open": (lambda file: written(file, "geheim", 0o644), "others may read it", "chmod 600 "),
    "of a group": (lambda file: written(file, "geheim", 0o640), "others may read it", "chmod 600 "),
}


@pytest.mark.parametrize(("make", "what", "cure"), BAD.values(), ids=list(BAD))
@pytest.mark.parametrize("mode", ["", "token"])
def test_a_bad_file_of_the_variable_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, mode: str, make: Callable[[Path], object], what: str, cure: str
) -> None:
    make(file := home / "tok")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    for may_create in (False, True):
        with pytest.raises(UserError) as caught:
            token.prepare_token(may_create)
        assert str(caught.value).startswith(f"RAY_AUTH_TOKEN_PATH: {file}: {what}. Cure: ")
        assert cure in caught.value.cure and "unset" in caught.value.cure and "geheim" not in str(caught.value)


def test_whoever_starts_joins_or_submits_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .*/none: there is no such file"):
        cluster.connect(1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .*/none: there is no such file"):
        cluster.connect()
    request = submit.Request("demo", home, ["true"], "work")
    with pytest.raises(UserError, match=r"RAY_AUTH_TOKEN_PATH: .*/none: there is no such file"):
        submit.run_job(request, "http://127.0.0.1:1", wait=False, max_tries=1, say=print, write=print)


def test_a_good_file_is_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(written(home / "tok", "geheim\n")))
    token.prepare_token(may_create=True)
    assert os.environ["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in os.environ


def test_the_token_itself_wins_and_no_authentication_needs_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "geheim")
    token.prepare_token(may_create=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    token.prepare_token(may_create=False)


def test_a_mounted_secret_keeps_the_mode_that_it_has(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(home / "tok", "geheim", 0o644)
    real = os.statvfs(file)
    read_only = os.statvfs_result([*real[:8], real.f_flag | os.ST_RDONLY, real.f_namemax])
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    assert token.problem_of_file(file) is None


@pytest.mark.parametrize("make", [lambda file: file.mkdir(parents=True), lambda file: written(file, " \n")])
def test_a_default_file_without_a_token_is_none(home: Path, make: Callable[[Path], object]) -> None:
    make(home / ".ray/auth_token")
    token.prepare_token(may_create=False)
    assert "RAY_AUTH_MODE" not in os.environ
    token.prepare_token(may_create=True)
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
