"""What training takes for granted of a model, tried out on it before the first step.

The loss here is computed from the backbone's hidden states and the bare head, over rows that are padded at the right or
packed. That is right only for a model that looks back alone, that keeps packed conversations apart, and whose logits
are nothing but its head's output. Most are; one that is not would train on a wrong loss without any sign of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mft_lightning.data.collate import MicroBatch
from mft_lightning.errors import UserError
from mft_lightning.model.supervised_loss import SupervisedLM

LENGTHS = (5, 7)
BEGINNING = 4  # tokens of the first conversation that are a third one
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def check_assumptions(network: SupervisedLM, *, packed: bool) -> None:
    """Compare logits as training computes them with the model's own, on three short conversations.

    Args:
        network: the model on its device, before adapters are added.
        packed: whether rows will be packed.

    Raises:
        UserError: naming what the model does otherwise.
    """
    model = network.causal_lm
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(vocabulary, (1, n), generator=generator) for n in LENGTHS)
    conversations = [first, second, first[:, :BEGINNING]]
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=ids, use_cache=False).logits[0] for ids in conversations]
        headed = network.logits(_row(first))
        row = network.logits(_row(*conversations)) if packed else None
    model.train(training)
    kind = model.config.model_type
    if not all(bool(logits.isfinite().all()) for logits in alone):
        raise UserError("model.pretrained_model_path: the model's logits are not finite; its weights are damaged.")
    computed = alone[0].dtype
    if computed == torch.float64 and model.config._attn_implementation == "eager":
        computed = torch.float32  # in which its softmax is
    tolerance = TOLERANCE.get(computed, 1e-4)
    if not _equal(headed, alone[0], tolerance):
        raise UserError(f"model.model_type: the logits of {kind} are not its head's output alone; it is not supported.")
    if not _equal(alone[2], alone[0][:BEGINNING], tolerance):
        raise UserError(f"model.model_type: {kind} looks at later tokens, so it is no causal language model.")
    if row is not None and not _equal(row, torch.cat(alone), tolerance):
        raise UserError(f"data.padding_mode: {kind} does not keep packed conversations apart. Use padding.")


def _row(*conversations: Tensor) -> MicroBatch:
    lengths = tuple(ids.shape[1] for ids in conversations)
    nothing = torch.empty(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.cat(conversations, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        predictors=torch.arange(sum(lengths)),
        targets=nothing,
        conversation=nothing,
        tasks=nothing,
        n_supervised=nothing,
        numbers=nothing,
        packed_lengths=lengths if len(lengths) > 1 else (),
    )


def _equal(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).double().norm() <= tolerance * expected.double().norm())
