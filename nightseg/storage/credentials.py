"""Credentials do not stand in addresses: they are refused where bytes are read, and hidden wherever text is shown.

They come from the environment's own chain (variables, profiles, roles of machines), as each store documents it.
"""

from __future__ import annotations

import re

from nightseg.errors import UserError

_PASSWORD = re.compile(r"(?<=://)[^\s/@:?#'\"]*:(?!\d+[/?#])[^\s'\"]*@")  # to the last @: secrets may hold "/" and "@"
_USER = re.compile(r"(?<=://)[^\s/@:?#'\"]+@")
_NAMED_USER = ("abfs", "abfss", "wasb", "wasbs", "sftp", "ssh", "hdfs", "smb", "ftp")  # no secret
# Options of file systems, and parameters of signed links: of AWS, Google, Azure, and those that people make up.
_OPTION = re.compile(
    r"(?i)([?&;#][\w.%-]*(?:key|secret|token|signature|passw(?:or)?d|pwd|credential|auth|\bsig)[\w.%-]*=)[^&;\s'\"]+"
)


def hide_credentials(text: str) -> str:
    """`s3://key:secret@bucket?token=x` in the text becomes `s3://***@bucket?token=***`."""
    text = _PASSWORD.sub("***@", text)
    text = _USER.sub(lambda found: found[0] if _scheme(found) in _NAMED_USER else "***@", text)
    return _OPTION.sub(r"\1***", text)


def refuse_credentials(uri: str, where: str = "") -> None:
    """Raises UserError, which does not repeat them, if the address holds credentials. `where` begins the message."""
    shown = hide_credentials(uri)
    if "://" in uri and shown != uri:
        raise UserError(
            f"{where or shown}: {shown!r} holds credentials, which would be written down with it",
            cure="leave them out of the address; set them in the environment (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), a profile, or the role of the machines",
        )


def _scheme(found: re.Match[str]) -> str:
    return re.split(r"[^A-Za-z0-9+.-]", found.string[: found.start() - 3])[-1].lower()
