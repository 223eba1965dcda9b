"""Words that only the command line's parser would check, in objects that Python makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import pytest

from mft_lightning import (
    CheckpointSettings,
    EvaluationSettings,
    LoraSettings,
    MFTDataModule,
    MFTModule,
    QLoraSettings,
    UserError,
)
from mft_lightning.words import check_words

REFUSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (MFTDataModule, {"padding_mode": "padded"}, "data.padding_mode: 'padded' is none of pack, padding, concat. The n"),
    (MFTDataModule, {"on_overlong": "cut"}, "data.on_overlong: 'cut' is none of drop, truncate, error."),
    (MFTModule, {"peft_type": "qLoRA"}, "model.peft_type: 'qLoRA' is none of lora, qlora."),
    (MFTModule, {"weighted_loss_mode": "case5"}, "model.weighted_loss_mode: 'case5' is none of case1, case2, case3, "),
    (MFTModule, {"optimizer": "adam"}, "model.optimizer: 'adam' is none of adamw, paged_adamw. The nearest is adamw."),
    (MFTModule, {"init": True}, "model.init: True is none of pretrained, random."),
    (EvaluationSettings, {"strategy": "no"}, "evaluation.strategy: 'no' is none of steps, epoch, "),
    (CheckpointSettings, {"mode": "maximum"}, "checkpoint.mode: 'maximum' is none of min, max."),
    (MFTModule, {"lora": {"r": 4}}, "model.lora: takes LoraSettings, not {'r': 4}."),
    (MFTModule, {"coba": None}, "model.coba: takes CobaSettings, not None."),
    (QLoraSettings, {"bits": 3}, "model.qlora.bits: 3 is none of 4, 8."),
]


@pytest.mark.parametrize(("maker", "given", "message"), REFUSED, ids=[message[:24] for *_, message in REFUSED])
def test_a_word_that_no_annotation_lists_is_refused(
    maker: Callable[..., Any], given: dict[str, Any], message: str
) -> None:
    needed = {MFTDataModule: {"data_paths": ["a"], "tokenizer_path": "t"}, MFTModule: {"pretrained_model_path": "m"}}
    with pytest.raises(UserError, match=re.escape(message)):
        maker(**needed.get(maker, {}), **given)


def test_what_an_annotation_lists_or_leaves_open_is_taken() -> None:
    def make(
        one: Literal["a", "b"],
        two: Literal["a"] | Callable[[], int] | None = None,
        three: str = "",
        four: list[LoraSettings] | None = None,
    ) -> None: ...

    check_words("group", make, {"one": "b", "two": None, "three": "any", "four": [LoraSettings()], "five": "others"})
    check_words("group", make, {"one": "a", "two": int})
    with pytest.raises(UserError, match=re.escape("group.two: 'b' is none of a.")):
        check_words("group", make, {"one": "a", "two": "b"})
