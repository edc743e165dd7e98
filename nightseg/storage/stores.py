"""The file systems behind URIs: which one, whole objects, and who of two writers was the first."""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs

import pyarrow as pa
import pyarrow.fs as pafs

from nightseg.errors import UserError
from nightseg.storage.credentials import refuse_credentials

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = pafs.LocalFileSystem()
_OBJECT_STORES = ("s3", "gcs", "gs", "abfs")  # where folders are but names
_TRIES = 5
_FAULTS = (  # in the words of pyarrow, and of botocore
    ("NO_SUCH_BUCKET|no such bucket", "there is no such bucket", "check its name, and the region (add ?region=NAME)"),
    (
        "ACCESS_DENIED|ACCESS_KEY|SIGNATURE|EXPIRED|Permission denied|says (403|AccessDenied)|credentials",
        "the store refuses access",
        "check the credentials that the environment gives (variables, profile, role) and what they may do there",
    ),
    (
        "NETWORK_CONNECTION|REQUEST_TIMEOUT|SLOW_DOWN|SERVICE_UNAVAILABLE|[Cc]ould not connect|[Tt]imed? ?out",
        "the store does not answer",
        "check the network, the region and the endpoint (AWS_ENDPOINT_URL), then run the same command again",
    ),
)
_LOG = logging.getLogger("nightseg.storage")
_decides: dict[str, bool] = {}  # scheme://authority?options -> whether it was seen to refuse a second first writer


def file_system(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or URI, and the path on it. Raises UserError: it holds credentials, or is unknown.

    Only `scheme://authority?options` is parsed; the path is taken as it is written, so that names with spaces,
    percent signs and letters of any language mean themselves.
    """
    if not SCHEME.match(uri):
        return _LOCAL, uri
    refuse_credentials(uri)
    scheme, authority, path, options = _parts(uri)
    system, root = _system(scheme, authority, options)
    return system, f"{root}/{path}".rstrip("/") if path else root


def make_folder(system: pafs.FileSystem, path: str) -> None:
    """Nothing on object stores, which have no folders: it would leave marker objects, or try to make the bucket."""
    if not any(name in system.type_name for name in _OBJECT_STORES):
        system.create_dir(path, recursive=True)


def get(uri: str, system: pafs.FileSystem, path: str) -> bytes:
    """The whole object, as it was at one moment; raises FileNotFoundError when absent."""
    if system.type_name == "s3":  # one request; pyarrow asks for the size first, and cuts what has grown since
        return _get_from_s3(_s3_client(_parts(uri)[3], system.region), path)
    with system.open_input_file(path) as stream:
        return bytes(stream.read())


def put(system: pafs.FileSystem, path: str, data: bytes | memoryview) -> None:
    """Writes the whole object, as the bytes it has."""
    if parent := path.rpartition("/")[0]:
        make_folder(system, parent)
    with system.open_output_stream(path, compression=None) as stream:  # by default it goes by the suffix of the name
        stream.write(data)


def create(uri: str, system: pafs.FileSystem, path: str, data: bytes | memoryview) -> bool:
    """`put` unless something is there; False if so. See `decides_first` for who is told what in a race."""
    attempt = _conditional_put(uri, system)
    if attempt is not None and _decides.get(_store(uri), True):
        made = attempt(path, bytes(data))
        if made and _store(uri) not in _decides:  # some stores of S3's kind take no notice of the condition
            _decides[_store(uri)] = attempt(path, bytes(data)) is False
        if made is not None:
            return made
    _decides[_store(uri)] = False
    if system.get_file_info(path).type != pafs.FileType.NotFound:
        return False
    put(system, path, data)
    return True


def decides_first(uri: str) -> bool:
    """Whether the store lets one of two writers create an object, as far as its first `create` has shown."""
    return _decides.get(_store(uri), True)


def fault_of_store(error: OSError) -> UserError | None:
    """What a store said, with its cure; None if it was none, or said something else."""
    text = str(error).partition("\n")[0]
    found = next((told for words, *told in _FAULTS if re.search(words, text)), None)
    return None if found is None or ("s3://" not in text and "bucket" not in text) else UserError(
        f"storage: {found[0]} ({text})", cure=found[1]
    )  # fmt: skip


def _parts(uri: str) -> tuple[str, str, str, str]:
    """Scheme, authority, path, options."""
    before, _, options = uri.partition("?")
    scheme, _, rest = before.partition("://")
    authority, _, path = rest.partition("/")
    return scheme, authority, path, options


def _store(uri: str) -> str:
    scheme, authority, _, options = _parts(uri)
    return f"{scheme}://{authority}?{options}"


@functools.cache
def _system(scheme: str, authority: str, options: str) -> tuple[pafs.FileSystem, str]:
    # A small object is one request instead of three: nothing is asked for before all bytes are there.
    sent = "&".join(filter(None, [options, "allow_delayed_open=true" if scheme == "s3" else ""]))
    try:
        system, root = pafs.FileSystem.from_uri(f"{scheme}://{authority}/" + (f"?{sent}" if sent else ""))
    except OSError as error:
        raise UserError(
            f"{scheme}:// storage: it cannot be reached ({error})",
            cure="check the bucket's name, the network, the credentials, and the region (add ?region=NAME)",
        ) from error
    except pa.ArrowInvalid as unknown:
        if scheme in _OBJECT_STORES:  # an option that it does not know
            raise UserError(f"{scheme}://{authority}: {unknown}", cure="check what follows the ?") from unknown
        import fsspec  # for the schemes that pyarrow does not know

        try:
            inner, root = fsspec.core.url_to_fs(f"{scheme}://{authority}" + (f"?{options}" if options else ""))
        except (ValueError, ImportError) as error:
            raise UserError(
                f"{scheme}:// addresses: there is no file system for them ({error})",
                cure="install the fsspec package of this scheme, or use a local path, s3:// or gs://",
            ) from error
        system = pafs.PyFileSystem(pafs.FSSpecHandler(inner))
    return system, root.rstrip("/")


# -- the first writer --------------------------------------------------------------------------------------------------


def _conditional_put(uri: str, system: pafs.FileSystem) -> Callable[[str, bytes], bool | None] | None:
    """What writes an object only if there is none: True, False, or None if the store cannot; pyarrow itself cannot."""
    if system.type_name == "s3":
        return functools.partial(_create_on_s3, _s3_client(_parts(uri)[3], system.region))
    if system.type_name == "gcs":
        return _create_on_gcs
    if isinstance(system, pafs.PyFileSystem) and isinstance(system.handler, pafs.FSSpecHandler):
        return functools.partial(_create_by_fsspec, system.handler.fs)
    return None


@functools.cache
def _s3_client(options: str, region: str) -> Any:
    """Where pyarrow goes, too: the same chain of credentials, endpoint and style of addresses."""
    import botocore.config
    import botocore.session

    told = {name: values[-1] for name, values in parse_qs(options).items()}
    endpoint = told.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{told.get('scheme', 'https')}://{endpoint}"
    own = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    by_path = own and told.get("force_virtual_addressing", "").lower() not in ("true", "1")
    return botocore.session.get_session().create_client(
        "s3", region_name=region, endpoint_url=endpoint, verify=told.get("tls_ca_file_path"),
        config=botocore.config.Config(
            s3={"addressing_style": "path" if by_path else "auto"}, max_pool_connections=64,
            retries={"mode": "standard", "max_attempts": _TRIES},
            request_checksum_calculation="when_required",  # stores of S3's kind may not know the newer ones,
            response_checksum_validation="when_required",  # and what a run reads has a sha256 of its own
        ),
    )  # fmt: skip


def _get_from_s3(client: Any, path: str) -> bytes:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    for attempt in range(1, _TRIES + 1):
        try:
            return bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        except ClientError as error:
            raise _os_error(f"s3://{path}", error.response) from error
        except BotoCoreError as error:  # the request itself was tried again; not so when the answer breaks off
            if attempt == _TRIES:
                raise OSError(f"s3://{path}: {error}") from error
    raise AssertionError


def _os_error(place: str, answer: Mapping[str, Any]) -> OSError:
    status, code = answer.get("ResponseMetadata", {}).get("HTTPStatusCode"), answer.get("Error", {}).get("Code")
    if code == "NoSuchBucket":
        return OSError(f"{place}: there is no such bucket")
    number = {403: errno.EACCES, 404: errno.ENOENT}.get(status)
    return OSError(number, f"the store says {code}", place) if number else OSError(f"{place}: the store says {code}")


def _create_on_s3(client: Any, path: str, data: bytes) -> bool | None:
    """A retry after a lost answer may find its own object, and says False: callers compare what is there."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = path.partition("/")
    for _ in range(_TRIES):
        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code")
            if status == 412:
                return False
            if status == 501 or code == "NotImplemented":
                return None
            if status != 409:  # another one writes it at this moment: ask again
                raise _os_error(f"s3://{path}", error.response) from error
        except BotoCoreError as error:
            raise OSError(f"s3://{path}: {error}") from error
    return False


def _create_on_gcs(path: str, data: bytes) -> bool | None:
    """By the JSON API, as pyarrow cannot tell the store that an object must be new (ifGenerationMatch=0)."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession

    bucket, _, name = path.partition("/")
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    try:
        with AuthorizedSession(google.auth.default(["https://www.googleapis.com/auth/devstorage.read_write"])[0]) as to:
            answer = to.post(
                f"{host}/upload/storage/v1/b/{bucket}/o", data=data, timeout=60,
                params={"uploadType": "media", "name": name, "ifGenerationMatch": "0"},
            )  # fmt: skip
    except GoogleAuthError as error:
        raise OSError(f"gs://{path}: {error}") from error
    if answer.status_code == 412:
        return False
    answer.raise_for_status()  # an OSError
    return True


def _create_by_fsspec(system: Any, path: str, data: bytes) -> bool | None:
    try:
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except (NotImplementedError, ValueError, TypeError):
        return None
    return True
