"""``validate`` and ``test``: the metrics of a checkpoint on a split."""

from __future__ import annotations

from mft_lightning import ranks
from mft_lightning.commands.outcome import task_results
from mft_lightning.commands.prepared import build_for, named_checkpoint
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.screen import say, shown
from mft_lightning.training.asking import Asking
from mft_lightning.training.questions import check_questions
from mft_lightning.training.run import Run
from mft_lightning.training.stages import find_callback
from mft_lightning.training.trainer import evaluation_trainer


def validate(argv: list[str]) -> None:
    """Measure ``--ckpt_path`` (or, without it, the model as it starts) on the validation split."""
    _evaluate(argv, "validate", "valid")


def test(argv: list[str]) -> None:
    """Measure ``--ckpt_path`` (or, without it, the model as it starts) on the test split."""
    _evaluate(argv, "test", "test")


def _evaluate(argv: list[str], command: str, split: str) -> None:
    quieten()
    config = RunConfig(argv, command)
    with config.placing():
        measure(config, command, split)


def measure(config: Run, command: str, split: str) -> dict[str, float]:
    """Measure a run's checkpoint, or its model as it starts; what was measured, by name."""
    module, datamodule = config.model, config.datamodule
    module.check(datamodule, config.settings.parallel.tensor_parallel_size)
    checkpoint = named_checkpoint(config)
    with ranks.first_before_others("data"):
        datamodule.setup(command)
    datamodule.check_evaluation(split)
    check_questions(config.settings.evaluation, datamodule)
    state = "before training" if module.built is None else "the model as it is"  # which Python may have trained
    checkpoint_io = build_for(config, checkpoint)
    say(*datamodule.notes)
    trainer = evaluation_trainer(config.trainer_config, config.settings, checkpoint_io, config.output_dir)
    run = trainer.validate if command == "validate" else trainer.test
    run(
        module,
        datamodule=datamodule,
        ckpt_path=checkpoint.path if checkpoint else None,
        weights_only=True,
        verbose=False,
    )
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    asking = find_callback(trainer, Asking)
    exact = asking.counts if asking is not None else None
    say(f"{split} split, {shown(checkpoint.path) if checkpoint else state}")
    say(task_results(datamodule, split, metrics, exact=exact))
    name = f"{'val' if command == 'validate' else 'test'}/loss"
    say(f"{name} {metrics[name]:.6f}")
    return metrics
