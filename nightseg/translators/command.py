"""A program of the user as a translator: PNGs in a folder in, PNGs of the same names and sizes in a folder out.

The program is started without a shell, with an argument list from the recipe; names of frames never become arguments.
What it leaves is checked before any of it is used: exit code, number, names, sizes.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.data import table as frame
from nightseg.data.images import BadFrame, decode_image, encode_png, image_size
from nightseg.data.labels import train_ids_of
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError
from nightseg.progress import printable
from nightseg.storage import sha256_of
from nightseg.storage.scratch import temporary_folder

Pixels = npt.NDArray[np.uint8]
Row = Mapping[str, Any]

_TAIL_BYTES: Final = 2000  # of what the program printed
_TAIL_LINES: Final = 8
_LISTED: Final = 5
_NAME_LETTERS: Final = 80
_WRITE_PNG: Final = "let it write 8-bit RGB PNGs, and end when they are complete"


class Program(NamedTuple):
    """What to start. `argv` may hold {input}, {output}, {labels}, {seed} and {to}."""

    argv: tuple[str, ...]
    to: str
    seed: int
    timeout_seconds: float | None

    @property
    def wants_labels(self) -> bool:
        return any("{labels}" in word for word in self.argv)

    def words(self, folders: Mapping[str, Path]) -> list[str]:
        """The arguments with the placeholders filled in, in one pass: a folder's own name is not looked into."""
        known = {name: str(path) for name, path in folders.items()} | {"seed": str(self.seed), "to": self.to}
        return [re.sub(r"\{([a-z_]+)\}", lambda found: known.get(found[1], found[0]), word) for word in self.argv]


def translate_by(program: Program, rows: Sequence[Row], classes: Taxonomy) -> Iterator[tuple[Row, Pixels | BadFrame]]:
    """One run of the program over the frames of all rows; each row with its translated image, or why there is none.

    One decoded frame at a time is in memory, the rest lies in a temporary folder, without frames that cannot be read.
    With {labels}, labels are there as PNGs of train ids, for frames that have one.
    Raises UserError: the program is not there, fails, takes too long, or leaves other files than it should.
    """
    with temporary_folder() as scratch:
        folders = {name: scratch / name for name in ("input", "output", "labels")}
        for folder in folders.values():
            folder.mkdir()
        given = [(row, _hand_over(row, program, folders, classes)) for row in rows]
        names = [name for _, name in given if isinstance(name, str)]
        if len(set(names)) < len(names):
            raise AssertionError("two frames of a table have one id")
        if names:
            _run(program.words(folders), scratch, program.timeout_seconds)
            _check_files(program, names, folders["input"], folders["output"])
        for row, name in given:
            yield row, name if isinstance(name, BadFrame) else _read(program, folders["output"] / name)


def plain_name(frame_id: str) -> str:
    """A flat file name for a frame: its last part, and a hash that tells equal ones apart. Spaces and accents stay."""
    stem = frame.file_name(frame_id.rpartition("/")[2][:_NAME_LETTERS], "")
    return f"{stem}-{sha256_of(frame_id.encode('utf-8', 'surrogatepass'))[:12]}.png"


def _hand_over(row: Row, program: Program, folders: Mapping[str, Path], classes: Taxonomy) -> str | BadFrame:
    """Write the frame where the program finds it; its name, or why it could not be read."""
    name = plain_name(row[frame.FRAME_ID])
    try:
        image = frame.image_of(row)
        label = train_ids_of(row, classes, image.shape[:2]) if program.wants_labels else None
    except BadFrame as fault:
        return fault
    (folders["input"] / name).write_bytes(encode_png(image))
    if label is not None:
        (folders["labels"] / name).write_bytes(encode_png(label))
    return name


def _run(words: list[str], scratch: Path, timeout_seconds: float | None) -> None:
    with (scratch / "printed").open("w+b") as printed:  # to a file: a talkative program fills no memory and no pipe
        try:
            running = subprocess.Popen(  # noqa: S603 (an argument list of the recipe, no shell)
                words, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise UserError(
                f"the program {words[0]} cannot be started here: {error.strerror or error}",
                cure="install it on every node that translates, give its absolute path, and make it executable",
            ) from error
        except ValueError as error:  # a NUL character
            raise UserError(
                f"the arguments of {words[0]!r} cannot be passed on: {error}", cure="check `argv`"
            ) from error
        try:
            code = running.wait(
                math.inf if timeout_seconds is None else timeout_seconds
            )  # with one, Python looks often
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"{words[0]} was stopped after {timeout_seconds:g} seconds{_tail(printed)}",
                cure="raise `timeout_seconds`, or cut the frames into smaller shards",
            ) from error
        finally:
            _end(running)
        if code != 0:
            how = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise UserError(f"{words[0]} {how}{_tail(printed)}", cure="run it by hand on a few frames")


def _end(running: subprocess.Popen[bytes]) -> None:
    """Kill the program, if it still runs, with what it has started."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def _tail(printed: IO[bytes]) -> str:
    """The last lines that the program printed, safe to show."""
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - _TAIL_BYTES))
    lines = printed.read().decode(errors="replace").strip().splitlines()[-_TAIL_LINES:]
    return "".join(["; it printed last:", *(f"\n  {printable(line)}" for line in lines)]) if lines else ""


def _check_files(program: Program, names: Sequence[str], given: Path, made: Path) -> None:
    """Exactly one file for each frame, of its name and size. Nothing is used of a program that broke the agreement."""
    found = {entry.name for entry in made.iterdir()}
    missing, extra = sorted(set(names) - found), sorted(found - set(names))
    if missing or extra:
        parts = [
            f"{len(some)} {what} ({', '.join(map(printable, some[:_LISTED]))}{', ...' if len(some) > _LISTED else ''})"
            for some, what in ((missing, "are missing"), (extra, "were not asked for"))
            if some
        ]
        raise UserError(
            f"{program.argv[0]} left {len(found)} files for {len(names)} frames: {' and '.join(parts)}",
            cure="let it write one PNG a frame to {output}, under the name that the frame has in {input}",
        )
    for name in names:
        wanted = image_size((given / name).read_bytes())
        try:
            got = image_size((made / name).read_bytes())
        except (BadFrame, OSError) as fault:
            raise UserError(
                f"{program.argv[0]} left {printable(name)}, which is no image: {fault}", cure=_WRITE_PNG
            ) from fault
        if got != wanted:
            raise UserError(
                f"{program.argv[0]} made {printable(name)} {got[1]} x {got[0]} pixels large, the frame is "
                f"{wanted[1]} x {wanted[0]}: its label would not fit",
                cure="scale it back in the program",
            )


def _read(program: Program, file: Path) -> Pixels:
    try:
        return decode_image(file.read_bytes())
    except BadFrame as fault:
        raise UserError(
            f"{program.argv[0]} left {printable(file.name)}, which is no whole image: {fault}", cure=_WRITE_PNG
        ) from fault
