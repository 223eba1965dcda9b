"""What a user writes, for mypy alone: the page's own lines, and mistakes that a type checker is to find.

``warn_unused_ignores`` makes mypy fail where it does not find one of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import assert_type

import torch

from mft_lightning import Balancer, EvaluationSettings, LoraSettings, MFTDataModule, MFTModule, Trainer


def quickstart() -> float:
    tasks = [f"examples/quickstart/{name}" for name in ("text_to_code", "code_explanation", "unit_tests")]
    data = MFTDataModule(data_paths=tasks, tokenizer_path="examples/model", data_split="90,10,0", seq_length=256)
    model = MFTModule(pretrained_model_path="examples/model", init="random", learning_rate=3e-3)
    trainer = Trainer("checkpoints/notebook", max_steps=300, evaluation=EvaluationSettings(exact_match_per_task=100))
    trainer.fit(model, data)
    assert_type(trainer.metrics["val/loss"], float)
    return trainer.validate(model, data, ckpt_path=trainer.best_model_path)["val/loss"]


def trained_further(trainer: Trainer, tokenizer: Path) -> MFTModule:
    best = trainer.best_model_path
    assert best is not None
    return MFTModule(pretrained_model_path=best, tokenizer_path=tokenizer)


class Harder(Balancer):
    def after_step(self, step: int, train: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.weights = train / train.mean()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.weights = state["weights"]


def own_classes() -> None:
    MFTModule(pretrained_model_path="m", optimizer=torch.optim.SGD, weighted_loss_mode=Harder)
    MFTModule(pretrained_model_path="m", optimizer=partial(torch.optim.SGD, momentum=0.9), lora=LoraSettings(r=8))


def mistakes() -> None:
    Trainer(max_step=300)  # type: ignore[call-arg]
    Trainer(max_steps="300")  # type: ignore[arg-type]
    MFTModule(pretrained_model_path="m", init="randomly")  # type: ignore[arg-type]
    MFTModule()  # type: ignore[call-arg]
    MFTDataModule(data_paths=[1], tokenizer_path="m")  # type: ignore[list-item]
    MFTModule(pretrained_model_path="m", weighted_loss_mode="case5")  # type: ignore[arg-type]
    Trainer().fit(MFTModule(pretrained_model_path="m"))  # type: ignore[call-arg]
    EvaluationSettings(strategy="sometimes")  # type: ignore[arg-type]
