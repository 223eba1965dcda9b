"""TensorBoard's files of a run, which one run keeps across resumes, without points that are trained again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from mft_lightning.errors import UserError
from mft_lightning.ranks import GO_ON
from mft_lightning.screen import say, shown
from mft_lightning.training.event_files import end_events
from mft_lightning.training.introduction import Introduction, introduce, text


class Curves(TensorBoardLogger):
    """TensorBoard's files straight in one directory, without the points after the step that a run goes on from.

    Args:
        directory: of the files; begun anew where someone removes it under the run.
        resumed_step: the optimizer step the run starts from.
        introduction: gives what the run says of itself before its curves.
    """

    def __init__(self, directory: Path, resumed_step: int, introduction: Callable[[], Introduction]) -> None:
        super().__init__(
            save_dir=directory,
            name="",
            version="",
            default_hp_metric=False,
            # for a TensorBoard that is looking on, and has read already what is cut off the files
            purge_step=resumed_step + 1 if resumed_step else None,
        )
        self.resumed_step, self.introduction = resumed_step, introduction

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the curves, whose file is the last: TensorBoard reads on in no other."""
        if self._experiment is None:
            end_events(Path(self.log_dir), self.resumed_step)
            introduce(Path(self.log_dir), self.introduction())
        return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All of a step as one event, which is a tenth of the work of an event for each."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._experiment is not None and not Path(self.log_dir).is_dir():
            say(f"note: {shown(Path(self.log_dir))} was removed under the run, and is begun anew.")
            self._experiment = None
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        with _told(Path(self.log_dir)):
            self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @rank_zero_only
    def log_text(self, tag: str, markdown: str, step: int) -> None:
        """A text of a step."""
        with _told(Path(self.log_dir)):
            self.experiment._get_file_writer().add_summary(text(tag, markdown), step)

    @rank_zero_only
    def save(self) -> None:
        """Nothing of a run that has logged nothing yet: what it goes on from stays as it is."""
        if self._experiment is not None:
            with _told(Path(self.log_dir)):
                self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with _told(Path(self.log_dir)):
            super().finalize(status)


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """What the disk refuses to TensorBoard's thread, as it is.

    Raises:
        UserError: with the directory, the reason, and the way on.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{shown(directory)}: the curves cannot be written ({error.strerror}). Free some space or mend the file "
            f"system.{GO_ON}"
        ) from error
