"""The event files of TensorBoard, which end where a run goes on from, so that no curve has points of two pasts.

TensorBoard has a mark for this, the ``purge_step`` of a writer, but the server that it starts by default does not know
it (https://github.com/tensorflow/tensorboard/issues/4784): there a curve keeps every point that the resumed run has not
overtaken, like that of the last validation before a crash.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

EVENTS = "events.out.tfevents.*"
_LENGTH = struct.Struct("<Q")  # before each event, followed by a checksum; another checksum comes after the event
_CHECKSUM = 4


def end_events(directory: Path, step: int) -> None:
    """Cut what comes after an optimizer step off the event files, and an event that a kill has left unfinished.

    Args:
        directory: of the files, each with its events in the order of their steps; need not be there.
        step: of the last events that stay; 0 where the run starts anew, and none do.
    """
    for file in directory.glob(EVENTS):
        end = _end(file, step) if step else 0
        if end == 0:
            file.unlink()
        elif end < file.stat().st_size:
            os.truncate(file, end)


def _end(file: Path, step: int) -> int:
    """Where the first event after a step starts, or the last whole one ends; 0 if only the file's version is before."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event  # as late as torch.utils.tensorboard

    events = end = 0
    with file.open("rb") as handle:
        while len(head := handle.read(_LENGTH.size + _CHECKSUM)) == _LENGTH.size + _CHECKSUM:
            (length,) = _LENGTH.unpack_from(head)
            content = handle.read(min(length, file.stat().st_size) + _CHECKSUM)
            if not length or len(content) < length + _CHECKSUM:
                break
            try:
                if Event.FromString(content[:length]).step > step:
                    break
            except DecodeError:
                break
            events, end = events + 1, handle.tell()
    return end if events > 1 else 0
