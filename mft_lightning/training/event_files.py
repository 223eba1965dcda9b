"""The event files of TensorBoard, which end where a run goes on from, so that no curve has points of two pasts.

TensorBoard has a mark for this, the ``purge_step`` of a writer, but the server that it starts by default does not know
it (https://github.com/tensorflow/tensorboard/issues/4784): there a curve keeps every point that the resumed run has not
overtaken, like that of the last validation before a crash.
"""

from __future__ import annotations

import struct
from pathlib import Path

from mft_lightning.aside import written_aside

EVENTS = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q")  # before each event, followed by a checksum; another checksum comes after the event
_CHECKSUM = 4


def end_events(directory: Path, step: int) -> None:
    """Take what comes after an optimizer step off the event files, and an event that a kill has left unfinished.

    Args:
        directory: of the files; need not be there.
        step: of the last events that stay; 0 where the run starts anew, and none do.
    """
    for file in directory.glob(EVENTS):
        stay = _stay(file, step) if step else []
        if len(stay) < 2:  # the file's version alone
            file.unlink()
        elif sum(stop - start for start, stop in stay) < file.stat().st_size:
            with written_aside(file) as aside, file.open("rb") as old, aside.open("wb") as new:
                for start, stop in stay:
                    old.seek(start)
                    new.write(old.read(stop - start))


def _stay(file: Path, step: int) -> list[tuple[int, int]]:
    """Where each event up to a step starts and ends, the file's version included.

    They need not be in the order of their steps: a callback of the user's may write at numbers of its own.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event  # as late as torch.utils.tensorboard

    stay = []
    with file.open("rb") as handle:
        while len(head := handle.read(_LENGTH.size + _CHECKSUM)) == _LENGTH.size + _CHECKSUM:
            start = handle.tell() - len(head)
            (length,) = _LENGTH.unpack_from(head)
            content = handle.read(min(length, file.stat().st_size) + _CHECKSUM)
            if not length or len(content) < length + _CHECKSUM:
                break
            try:
                if Event.FromString(content[:length]).step <= step:
                    stay.append((start, handle.tell()))
            except DecodeError:
                break
    return stay
