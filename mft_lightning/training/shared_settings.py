"""What Python tells a Trainer alone, given to data and model as the command line's links give it."""

from __future__ import annotations

from dataclasses import replace

from mft_lightning.data.datamodule import MFTDataModule
from mft_lightning.errors import UserError
from mft_lightning.model.module import MFTModule
from mft_lightning.training.evaluation import EvaluationSettings
from mft_lightning.training.trainer import product_dtype, weights_dtype

SEED = 42  # of a run that gives none


def share_settings(
    model: MFTModule, datamodule: MFTDataModule, *, precision: str, seed: int, evaluation: EvaluationSettings
) -> None:
    """Give data and model what the command line links: seed, types by the precision, limits of evaluations.

    Raises:
        UserError: one of them was given something else.
    """
    wanted_dtypes = (weights_dtype(precision), product_dtype(precision))
    now = tuple(str(dtype).removeprefix("torch.") for dtype in (model.source.dtype, model.product_dtype))
    if model.built is None:
        for key, has, wants in zip(("dtype", "product_dtype"), now, wanted_dtypes, strict=True):
            if has not in ("float32", wants):
                raise UserError(
                    f"MFTModule: {key} is {has}, but precision {precision} takes {wants}. Make a new one without it."
                )
        model.use_dtypes(*wanted_dtypes)
    elif now != wanted_dtypes:
        raise UserError(f"precision: {precision} is not what the model was built for. Make a new MFTModule.")
    for name, given, is_drawn in (
        ("MFTModule", model.source.seed, model.built is not None),
        ("MFTDataModule", datamodule.seed, bool(datamodule.corpora)),
    ):
        if given != seed and (given != SEED or is_drawn):
            raise UserError(
                f"{name}: seed is {given}, but that of the Trainer is {seed}. Make a new one, without a seed."
            )
    model.source, datamodule.seed = replace(model.source, seed=seed), seed
    if datamodule.devices != 1:
        raise UserError(f"MFTDataModule: devices is {datamodule.devices}, but a Trainer from Python runs on one.")
    limits = (evaluation.max_conversations_per_task, evaluation.exclude_tasks)
    if datamodule.given_limits not in ((None, []), limits):
        raise UserError("MFTDataModule: limits evaluations otherwise than evaluation does. Say it in evaluation alone.")
    datamodule.limit_evaluations(*limits)
    if model.tokenizer_path is not None and str(model.tokenizer_path) != str(datamodule.tokenizer_path):
        raise UserError(
            f"MFTModule: tokenizer_path is {model.tokenizer_path}, but that of the MFTDataModule is "
            f"{datamodule.tokenizer_path}. Give it there alone."
        )
