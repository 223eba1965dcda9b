"""Callbacks and loggers of the user's own, beside those of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from mft_lightning import ranks
from mft_lightning.errors import UserError
from mft_lightning.training.curves import Curves
from mft_lightning.training.hooks import check_hooks
from mft_lightning.training.loadable import check_states, of_callback
from mft_lightning.training.loggers import MetricsCSV, PlainLines

# callbacks of Lightning's that decide what a run decides by itself, and what to use in their place
INSTEAD: dict[type[L.Callback], str] = {
    BatchSizeFinder: "data.per_device_train_batch_size, and the command estimate",
    GradientAccumulationScheduler: "data.gradient_accumulation_steps",
    LearningRateFinder: "model.learning_rate",
    ModelCheckpoint: "checkpoint.checkpointing_steps",
    StochasticWeightAveraging: "EMAWeightAveraging",
}


class StopTogether(L.Callback):
    """All ranks stop where a callback before this one set ``trainer.should_stop`` on one of them.

    Lightning leaves that to the callback, and ranks that go on alone wait for the others until they time out. A run's
    own :class:`~mft_lightning.training.signals.GracefulStop` agrees too, but before the user's callbacks are asked.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _agree(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _agree(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        _agree(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _agree(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            _agree(trainer)


def _agree(trainer: L.Trainer) -> None:
    trainer.should_stop = ranks.highest(int(trainer.should_stop)) > 0


def listed(value: Any) -> list[Any]:
    """The objects of a key that takes one, several, or null."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def own_callbacks(given: Any) -> list[L.Callback]:
    """Those of ``trainer.callbacks``, and what stops all ranks where one of them asks for it on one."""
    own = listed(given)
    _check_callbacks(own)
    return [*own, StopTogether()] if own else []


def own_loggers(given: Any) -> list[Logger]:
    """Those of ``trainer.logger``."""
    own = [] if isinstance(given, bool) else listed(given)
    _check_loggers(own)
    return own


def _check_callbacks(callbacks: Sequence[L.Callback]) -> None:
    """Refuse what would decide what a run decides by itself, and states that no checkpoint could give back.

    Raises:
        UserError: naming the callback, and what to use in its place or to mend.
    """
    for kind, here in INSTEAD.items():
        if found := next((callback for callback in callbacks if isinstance(callback, kind)), None):
            raise UserError(f"trainer.callbacks: {type(found).__name__} does not work here. Use {here}.")
    for callback in callbacks:
        check_hooks("trainer.callbacks", callback, L.Callback)
    check_states({of_callback(callback.state_key): _state(callback) for callback in callbacks})


def _state(callback: L.Callback) -> Any:
    """Its state before a run; None where it needs a run to have one, of which the first save then tells."""
    try:
        return callback.state_dict()
    except Exception:  # of a class of the user's, which may raise any
        return None


def _check_loggers(loggers: Sequence[Logger]) -> None:
    """Refuse what loggers would leave undone without a word.

    Raises:
        UserError: uploads of checkpoints, which take files of Lightning's and pass over directories
            (``_scan_checkpoints`` in ``lightning/pytorch/loggers/utilities.py``).
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger | MLFlowLogger) and logger._log_model:
            raise UserError(
                f"trainer.logger: {type(logger).__name__} uploads no checkpoint of this program, which is a directory. "
                "Leave log_model out, and upload the directory when the run is over."
            )


def tell_loggers(trainer: L.Trainer, keys: Mapping[str, Any]) -> None:
    """Tell the keys of a run that begins to the loggers of the user's own; of one that goes on they know them."""
    for logger in trainer.loggers if trainer.global_step == 0 else ():
        if not isinstance(logger, Curves | MetricsCSV | PlainLines):
            logger.log_hyperparams(dict(keys))


def count_steps_taken(trainer: L.Trainer) -> None:
    """Let what callbacks log with ``pl_module.log`` stand at the number of optimizer steps taken, as all else does.

    Lightning's own axis is one behind (``_LoggerConnector.log_metrics`` in ``logger_connector.py`` of 2.6).
    """
    connector = trainer._logger_connector
    log = connector.log_metrics

    def at_steps_taken(metrics: dict[str, Any], step: int | None = None) -> None:
        placed: dict[str, Any] = {"step": trainer.global_step, **metrics}
        log(placed if step is None and metrics else metrics, step)

    connector.log_metrics = at_steps_taken  # type: ignore[method-assign]
