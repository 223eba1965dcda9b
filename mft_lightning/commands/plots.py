"""Pictures of the data as files and inside TensorBoard."""

from __future__ import annotations

import io
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mft_lightning.commands.figures import balance_figure, lengths_figure, require_matplotlib
from mft_lightning.data.balance import Balance
from mft_lightning.errors import UserError, first_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENTS_SUFFIX = ".plots"  # by which an earlier call's event file is known and replaced


def write_plots(directory: Path, *, lengths: Mapping[str, np.ndarray], seq_length: int, balance: Balance) -> list[Path]:
    """Write ``lengths.png``, ``balance.png`` and a TensorBoard event file, in place of those of an earlier call.

    Other files stay as they are. In TensorBoard are the pictures, the lengths as histograms ``data/length/<task>`` of
    step 0, and ``data/balance/{lightest,mean,heaviest,deviation}`` over optimizer steps, ``useful`` too if padded.
    They want a directory of their own: in a run's ``tensorboard_dir``, ``fit`` takes them for another run's curves.

    Args:
        directory: made if it is missing.
        lengths: tokens of each conversation by task, ``int64 [conversations]``.
        seq_length: most tokens of a conversation.
        balance: of the training split.

    Returns:
        The files, pictures first.

    Raises:
        UserError: matplotlib is missing, or the directory cannot be written.
    """
    require_matplotlib()
    pictures = {
        "lengths": _png(lengths_figure(lengths, seq_length)),
        "balance": _png(balance_figure(balance)),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".plots-", dir=directory))
        try:
            for name, data in pictures.items():
                (aside / f"{name}.png").write_bytes(data)
            _write_events(aside, pictures, lengths, balance)
            return _move(aside, directory, [f"{name}.png" for name in pictures])
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{directory}: the plots cannot be written there ({first_line(error)}).") from error


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter of a task's name that no font has is drawn as a box, which says as much.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write_events(
    directory: Path, pictures: Mapping[str, bytes], lengths: Mapping[str, np.ndarray], balance: Balance
) -> None:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory), filename_suffix=EVENTS_SUFFIX) as writer:
        for name, data in pictures.items():
            # `add_figure` would import pyplot, and draw once more.
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            writer.add_image(f"data/{name}", pixels, 0, dataformats="HWC")
        for task, values in lengths.items():
            if len(values):
                writer.add_histogram(f"data/length/{task}", np.asarray(values), 0)
        per_step = ["lightest", "mean", "heaviest", "deviation", *([] if balance.packed else ["useful"])]
        for name in per_step:
            for step, value in enumerate(getattr(balance, name), start=1):
                writer.add_scalar(f"data/balance/{name}", float(value), step)


def _move(aside: Path, directory: Path, names: list[str]) -> list[Path]:
    earlier = list(directory.glob(f"events.out.tfevents.*{EVENTS_SUFFIX}"))
    events = [file.name for file in aside.glob("events.out.tfevents.*")]
    files = [(aside / name).replace(directory / name) for name in [*names, *events]]
    for file in earlier:
        if file not in files:
            file.unlink(missing_ok=True)
    return files
