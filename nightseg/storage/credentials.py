"""Credentials do not stand in addresses: they are refused where bytes are read, and hidden wherever text is shown.

They come from the environment's own chain (variables, profiles, roles of machines), as each store documents it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from nightseg.errors import UserError

_WITH_PORT = "https?|webdavs?|ftps?|sftp|ssh|hdfs|webhdfs|smb|tcp|ray"  # elsewhere what follows a ":" is no number
_STORES = "s3[an]?|gs|gcs|abfss?|wasbs?|az|adl"
_NAMED_USER = "abfss?|wasbs?|az|adl|sftp|ssh|hdfs|smb|ftp"  # no secret
_COLON, _AT = "(?::|%3A)", "(?:@|%40)"
_OPTION = r"[?&;#][\w.%-]*"
# Options of file systems, and parameters of signed links: of AWS, Google, Azure, and those that people make up.
_SENSITIVE = (
    r"(?:key|secret|token|signature|pass|phrase|(?<![a-z])pw|pwd|cred|auth|session|jwt|bearer|\bsig|\bsas)[\w.%-]*="
)
_ADDRESS = re.compile(rf"(?i)[a-z][a-z0-9+.-]*://|(?<![\w.+-])(?:{_STORES}|{_WITH_PORT}):/")
_START = re.compile(r"(?i)[a-z][a-z0-9+.-]*:/")


class _Patterns(NamedTuple):
    password: re.Pattern[str]
    user: re.Pattern[str]
    option: re.Pattern[str]
    login_in_option: re.Pattern[str]


def _patterns(end: str, rest: str) -> _Patterns:
    """`end`: characters that end an address, as a class; `rest`: what leads from a ":" to the "@" behind a secret.

    A slash that is missing or too many makes no other address of what has the name of a store.
    """
    ported = rf"(?<![\w.+-])(?:{_WITH_PORT}):/+"
    other = rf"(?:(?<![\w.+-])(?:{_STORES}):/+|(?<![\w+.-])(?!(?:{_WITH_PORT}):)[a-z][a-z0-9+.-]*://)"
    name = rf"(?:(?!%3A)[^{end}/@:?#])*+"  # to the first ":", without going back: a long text takes linear time
    not_port = r"(?!\d+(?:[/?#\s]|$))"
    return _Patterns(
        re.compile(rf"(?i)({ported}(?={name}{_COLON}{not_port})|{other}){name}{_COLON}{rest}"),
        re.compile(rf"(?i)(?<![\w.+-])(?!(?:{_NAMED_USER}):)([a-z][a-z0-9+.-]*://|(?:{_STORES}):/+)[^{end}/@:?#]+@"),
        re.compile(rf"(?i)({_OPTION}{_SENSITIVE})[^&;{end}]+"),
        re.compile(rf"(?i)({_OPTION}=)(?![a-z][a-z0-9+.-]*://)[^&;{end}/@:]*?{_COLON}{not_port}[^&;{end}]*{_AT}"),
    )


# To the last @: secrets may hold "/", "?", "#" and "@". In a text also over spaces, as far as one address may reach.
_IN_TEXT = _patterns(r"\s'\"", rf"(?:[^\s'\"]*{_AT}|(?!\s|\d+[^\w\s]*\s)(?:(?!://)[^'\"\n@])*@)")
_WHOLE = _patterns(r"\0", rf"[^\0]*{_AT}")


def hide_credentials(text: str) -> str:
    """`s3://key:secret@bucket?token=x` in the text becomes `s3://***@bucket?token=***`."""
    return _hidden(text, _IN_TEXT)


def hide_in_address(uri: str) -> str:
    """The same of one path or address, in which secrets may also hold spaces and quotes."""
    return _hidden(uri, _WHOLE if _START.match(uri) else _IN_TEXT)


def refuse_credentials(uri: str, where: str = "") -> None:
    """Raises UserError, which does not repeat them, if the address holds credentials. `where` begins the message."""
    shown = hide_in_address(uri)
    if shown != uri and _ADDRESS.search(uri):
        raise UserError(
            f"{where or shown}: {shown!r} holds credentials, which would be written down with it",
            cure="leave them out of the address; set them in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), a profile, or the role of the machines",
        )


def _hidden(text: str, patterns: _Patterns) -> str:
    text = patterns.password.sub(r"\1***@", text)
    text = patterns.user.sub(r"\1***@", text)
    text = patterns.option.sub(r"\1***", text)
    return patterns.login_in_option.sub(r"\1***@", text)
