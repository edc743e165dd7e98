"""Curves and pictures of a training as TensorBoard event files, on any file system, true after every restart.

TensorBoard reads event files in the order of their names. An object store cannot append, and a killed writer leaves
steps behind that its successor does again: so every flush writes one new file, whole, named by its last step and a
number, and whoever continues after step s removes the files that end later.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nightseg.storage.paths import Location

_NAME: Final = "events.out.tfevents."  # TensorBoard finds event files by it
SECONDS_BETWEEN_FLUSHES: Final = 30.0
SHARE_BETWEEN_FLUSHES: Final = 0.02  # of the time so far: a week of training is a few hundred files


class Curves:
    """Collects what happens up to a step; `flush` makes it visible. One writer a folder: rank 0.

    Without a folder, as on all other workers, nothing is collected or written.
    """

    def __init__(self, folder: Location | None, step: int = 0) -> None:
        """Continue after `step`: what an earlier run wrote of later steps is removed."""
        self.folder = folder
        self._records: list[bytes] = []
        self._last_step = step
        self._begun = self._flushed = time.monotonic()
        self._parts = 0  # files that end with the last step
        if folder is None or not folder.is_folder():
            return
        for entry in folder.list():
            if entry.name.startswith(_NAME) and _step_of(entry.name) > step:
                (folder / entry.name).delete()
            elif entry.name.startswith(_NAME) and _step_of(entry.name) == step:
                self._parts += 1

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point of each curve at `step` (steps finished). Slashes in names make groups: `validation/miou`."""
        if values:
            self._add(step, [{"tag": tag, "simple_value": float(value)} for tag, value in values.items()])

    def picture(self, step: int, tag: str, png: bytes, height: int, width: int) -> None:
        """An RGB picture, as PNG."""
        image = {"height": height, "width": width, "colorspace": 3, "encoded_image_string": png}
        self._add(step, [{"tag": tag, "image": image}])

    def begin(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """What this folder is a trial of: TensorBoard's table of hyperparameters shows these values beside the last
        point of these curves."""
        from tensorboardX.summary import hparams

        for summary in hparams(dict(values), dict.fromkeys(metrics, 0.0))[:2]:
            self._records.append(_framed({"step": 0, "summary": summary}))

    def end(self, is_success: bool) -> None:
        """The trial is over. Written at once."""
        from tensorboardX.proto.api_pb2 import Status
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo
        from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

        ended = SessionEndInfo(status=Status.Value("STATUS_SUCCESS" if is_success else "STATUS_FAILURE"))
        content = HParamsPluginData(session_end_info=ended, version=0).SerializeToString()
        plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
        value = Summary.Value(tag="_hparams_/session_end_info", metadata=SummaryMetadata(plugin_data=plugin))
        self._records.append(_framed({"step": self._last_step, "summary": Summary(value=[value])}))
        self.flush()

    def flush_if_due(self) -> None:
        """Write what there is if the last time was long ago: for those who watch while it runs."""
        now = time.monotonic()
        if now - self._flushed >= max(SECONDS_BETWEEN_FLUSHES, SHARE_BETWEEN_FLUSHES * (now - self._begun)):
            self.flush()

    def flush(self) -> None:
        """Write what there is. Call it before the checkpoint of the same step, so that no curve has a gap."""
        if self.folder is not None and self._records:
            data = b"".join([_framed({"file_version": "brain.Event:2"}), *self._records])
            (self.folder / f"{_NAME}{self._last_step:010d}.{self._parts:03d}").write_bytes(data)
            self._records = []
            self._parts += 1
        self._flushed = time.monotonic()

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        if self.folder is None:
            return
        self._records.append(_framed({"step": step, "summary": {"value": values}}))
        if step > self._last_step:
            self._last_step, self._parts = step, 0


def _step_of(name: str) -> int:
    digits = name.removeprefix(_NAME).partition(".")[0]
    return int(digits) if digits.isdecimal() else -1


def _framed(event: Mapping[str, Any]) -> bytes:
    """A TFRecord: length and content, each followed by its masked checksum (tensorflow/core/lib/io/record_writer.h)."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    data: bytes = Event(wall_time=time.time(), **event).SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
