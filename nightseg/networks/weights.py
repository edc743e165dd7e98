"""Files of weights: downloaded once, read without running anything that is in them, compared with their network."""

from __future__ import annotations

import io
import pickle
import re
import socket
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nightseg.networks.downloads import HOW_TO_ALLOW, may_download
from nightseg.storage import Location, UserError, sha256_of

_DOWNLOAD_TIMEOUT_SECONDS: Final = 30.0
_WRAPPERS: Final = frozenset(
    ("module", "model", "net", "network", "ema", "ema_model", "model_ema", "teacher", "student", "averaged")
)
_INSIDE: Final = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # anywhere in a name
_COUNTERS: Final = frozenset({"n_averaged"})  # of torch.optim.swa_utils.AveragedModel
_ONE_NETWORK: Final = 'save the one that is meant alone: torch.save(checkpoint["NAME"], FILE)'


def cached_download(url: str, sha256_prefix: str, *, name: str, cure: str) -> Path:
    """The file of `url` in torch's cache ($TORCH_HOME/hub/checkpoints), downloaded there if it is not, and may be.

    Only a download whose sha256 begins with `sha256_prefix` is kept. `name`: of the network, for messages. Raises
    UserError with `cure` if there is no such file.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not file.is_file():
        if not may_download():
            raise UserError(
                f"{name}: the weights {file} are not there, and nothing is downloaded unasked",
                cure=f"put {file.name} there (it is {url}), allow downloads ({HOW_TO_ALLOW}), or {cure}",
            )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with download_timeout():
                torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256_prefix, progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{name}: the weights {file} are not there and {url} cannot be downloaded ({error})",
                cure=f"put {file.name} there, or {cure}",
            ) from error
    return file


@contextmanager
def download_timeout() -> Iterator[None]:
    """For libraries whose downloads have no timeout of their own: offline must not hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read_weights_file(
    file: str | Path | Location, name: str, *, key: str = "network.encoder_weights", sha256_prefix: str = ""
) -> bytes:
    """The content of a file, whose sha256 begins with `sha256_prefix`; `name` of the network and recipe `key` are for
    messages. Raises UserError."""
    try:
        data = Location.of(file).read_bytes()
    except OSError:
        raise UserError(f"{name}: there is no weights file {file} that can be read", cure=f"check {key}") from None
    if sha256_prefix and not (found := sha256_of(data)).startswith(sha256_prefix):
        raise UserError(
            f"{name}: {file} is another file, or is damaged: its sha256 {found} does not begin with {sha256_prefix}",
            cure=f"delete it and download it again, or check {key}",
        )
    return data


def read_state_dict(
    file: str | Path | Location, name: str, *, key: str = "network.encoder_weights", sha256_prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors of a PyTorch state dict or a .safetensors file, on the CPU; arguments as of `read_weights_file`.

    Raises UserError: no such file, another hash, damaged, asks for code to be run, or not a flat dictionary of tensors.
    """
    data = read_weights_file(file, name, key=key, sha256_prefix=sha256_prefix)
    cure = f"give the state dict that {name} was saved as (.pth or .safetensors); check {key}"
    try:
        if str(file).endswith(".safetensors"):
            return unwrapped(safetensors.torch.load(data), f"{name}: {file}")
        loaded = load_plain(data)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if asked := asked_of_torch(error):
            raise refusal(f"{name}: {file}", asked) from None
        raise UserError(
            f"{name}: {file} is not a file of PyTorch weights, or is damaged: {error}", cure=cure
        ) from error
    tensors = the_network(loaded, f"{name}: {file}")
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{name}: {file} is not a dictionary of tensors (a PyTorch state dict)", cure=cure)
    return unwrapped(tensors, f"{name}: {file}")


def the_network(content: Any, where: str) -> Any:
    """Of a checkpoint with several parts ("model", "optimizer", ...) the one that is a network; else all of it.

    Raises UserError if there are two, such as a network and its EMA: which one is meant is not ours to choose.
    """
    if not isinstance(content, dict) or all(isinstance(value, Tensor) for value in content.values()):
        return content
    networks = {
        str(key): part
        for key, part in content.items()
        if isinstance(part, dict) and part and all(isinstance(value, Tensor | np.ndarray) for value in part.values())
    }
    if len(networks) > 1:
        raise UserError(f"{where}: holds several networks: {', '.join(networks)}", cure=_ONE_NETWORK)
    return next(iter(networks.values()), content)


def unwrapped(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Names without what was put into them when the network was wrapped: by torch.compile, FSDP or checkpointing
    (`_INSIDE`), for several workers (`module.`), as a part of a larger one (`model.`), by an average of its weights
    (`ema.`, `teacher.`).

    Only what all names share goes. Raises UserError if there are two networks (`student.` and `teacher.`).
    """
    plain = {_INSIDE.sub("", name): value for name, value in tensors.items()}
    while plain:
        counters = {name for name in plain if name in _COUNTERS}
        first = {name.partition(".")[0] for name in plain.keys() - counters}
        if not first or not first <= _WRAPPERS:
            break
        if len(first) > 1:
            raise UserError(f"{where}: holds several networks: {', '.join(sorted(first))}", cure=_ONE_NETWORK)
        plain = {name.partition(".")[2]: value for name, value in plain.items() if name not in counters}
    return plain


def load_plain(data: bytes) -> Any:
    """What `torch.save` wrote, on the CPU; nothing in it is run.

    Raises what `torch.load` raises, and RuntimeError for content that does not match its checksums: `torch.load` itself
    does not compare them. Files of old versions, and those that were saved without, have none.
    """
    try:
        if zipfile.is_zipfile(io.BytesIO(data)):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.infolist():
                    if member.CRC:
                        archive.read(member)
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, struct.error, OverflowError) as error:
        raise RuntimeError(f"its archive is damaged ({error})") from error
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_names_and_shapes(name: str, file: object, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise UserError with the first differences unless both hold the same names with the same shapes."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} is not part of {name}" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(found[key].shape)}, {name} has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{file}: it does not hold the weights of {name}: {'; '.join(wrong[:3])}{more}",
            cure=f"give a file of {name}'s weights, under the names its library gives them",
        )


def refusal(where: str, asked: str) -> UserError:
    """The error for a file that asks for a thing by name which is not plain data."""
    return UserError(
        f"{where}: refused, it asks for {asked}, which could run a stranger's code; only tensors, arrays and "
        "plain data are read",
        cure="if you trust the file, load it where it was made and save its model again, as "
        'torch.save({"model": model.state_dict()}, FILE)',
    )


def asked_of_torch(error: Exception) -> str | None:
    """What a file asked for that `torch.load(weights_only=True)` refused with this error, if that was the reason."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else None
