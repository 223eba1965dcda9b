"""A CSV log that one run keeps across resumes, without rows that are trained again, and lines on the screen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from mft_lightning.aside import written_aside
from mft_lightning.training.progress import Pace
from mft_lightning.training.task_losses import in_a_line, of_tasks


class PlainLines(Logger):
    """A line on the screen for every validation and, where no progress bar is shown, for every logged step.

    Args:
        total_steps: the run's last step.
        pace: tells the time left; None where a bar tells of the steps.
    """

    def __init__(self, total_steps: int, pace: Pace | None) -> None:
        super().__init__()
        self.total_steps, self.pace = total_steps, pace

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the plan of the run was printed before."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val/loss" in metrics:
            each = in_a_line(of_tasks(metrics, "val/loss"))
            self._print(step, f"val/loss {metrics['val/loss']:.4f}  ({each})")
        elif "train/grad_norm" in metrics and self.pace is not None:  # of a skipped step another line tells
            left = self.pace.left(step or 0)
            line = (
                f"loss {metrics['train/loss']:.4f}  ({in_a_line(of_tasks(metrics, 'train/loss'))})  lr "
                f"{metrics['train/lr']:.2e}  grad norm {metrics['train/grad_norm']:.3f}  "
                f"{metrics['train/tokens_per_second']:,.0f} tokens/s"
            )
            self._print(step, line + (f"  {left} left" if left else ""))

    def _print(self, step: int | None, line: str) -> None:
        print(f"step {step}/{self.total_steps}  {line}", flush=True)


class MetricsCSV(Logger):
    """One ``metrics.csv``: a row per logged step, a column per metric, ``step`` first.

    Lightning's CSVLogger deletes an existing file; this one goes on in it, after cutting the rows of steps after
    ``resumed_step``. A metric that appears later gets a column of its own.

    Args:
        file: where to write.
        resumed_step: the optimizer step the run starts from.
    """

    def __init__(self, file: Path, resumed_step: int) -> None:
        super().__init__()
        self.file, self.resumed_step = file, resumed_step
        self._columns: list[str] = []
        self._opened = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def root_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not self._opened:
            self._go_on()
        elif not self.file.exists():  # someone removed it
            self._rewrite(self._columns, [])
        row = {"step": step, **metrics}
        if new := [name for name in row if name not in self._columns]:
            self._rewrite([*self._columns, *new], self._rows())
        with self.file.open("a", newline="") as handle:
            csv.DictWriter(handle, self._columns).writerow(row)

    def _go_on(self) -> None:
        rows = [row for row in self._rows() if int(row["step"]) <= self.resumed_step] if self.resumed_step else []
        self._rewrite(list(rows[0]) if rows else ["step"], rows)
        self._opened = True

    def _rows(self) -> list[dict[str, str]]:
        if not self.file.is_file():
            return []
        with self.file.open(newline="") as handle:
            whole = [line for line in handle if line.endswith("\n")]  # a kill may have cut the last one
        return list(csv.DictReader(whole))

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        with written_aside(self.file) as aside, aside.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, columns)
            writer.writeheader()
            writer.writerows(rows)
