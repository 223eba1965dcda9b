"""A head whose vocabulary two ranks share against the whole head; test_vocabulary_parallel.py runs this."""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mft_lightning import ranks
from mft_lightning.model.head_loss import head_loss
from mft_lightning.model.objective import Objective
from mft_lightning.model.tensor_parallel import is_head_cut, split_head

TOKENS, VOCABULARY = 13, 12
OBJECTIVES = (Objective(), Objective(label_smoothing=0.1, z_loss=0.3, focal_gamma=2.0), Objective(focal_gamma=0.5))


def model(vocabulary: int = VOCABULARY, **changed: Any) -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 8}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=vocabulary, **changed))


def heads(mesh: DeviceMesh, dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A head, and the same one of which each rank has its part; two tokens always have the same logit."""
    causal_lm = model()
    whole = nn.Linear(8, VOCABULARY, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        whole.weight[[2, 9]] = 4 * torch.eye(8, dtype=torch.float64)[0]
        if bias:
            whole.bias[9] = whole.bias[2]
    shared = copy.deepcopy(whole).to(dtype)
    causal_lm.set_output_embeddings(shared)
    split_head(causal_lm, mesh)
    assert cast(DTensor, shared.weight).to_local().shape == (VOCABULARY // 2, 8)
    return whole.to(dtype), shared


def compare(
    mesh: DeviceMesh, objective: Objective, rows: int, dtype: torch.dtype, *, bias: bool, trains: bool, reaches: bool
) -> float:
    """The largest difference of losses, NLLs, and gradients, relative; hits must be the same."""
    whole, part = heads(mesh, dtype, bias=bias)
    hidden = torch.randn(TOKENS, 8, dtype=dtype)
    hidden[:4] = torch.eye(8, dtype=dtype)[0]  # whose likeliest tokens are the two that have the same logit
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[:4] = torch.tensor([2, 9, 2, 0])
    factors = torch.rand(TOKENS, dtype=torch.float64)
    found = []
    for head in (whole, part):
        head.requires_grad_(trains)
        inputs = hidden.clone().requires_grad_(reaches)
        losses = head_loss(head, inputs, targets, factors, objective, rows)
        with torch.no_grad():
            again = head_loss(head, inputs, targets, factors, objective, rows)
        assert again.correct.tolist() == losses.correct.tolist()
        if trains or reaches:
            losses.loss.backward()
        gradients = [inputs.grad, *(parameter.grad for parameter in head.parameters())]
        values = [losses.loss, losses.nll, again.loss, again.nll, *(one for one in gradients if one is not None)]
        found.append((losses.correct.tolist(), [whole_of(value) for value in values]))
    (hits, ours), (other_hits, theirs) = found
    assert hits == other_hits
    assert hits[:4] == [1, 0, 1, 0]  # the first of equals, as argmax has it
    assert len(ours) == len(theirs)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def whole_of(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().double()


def main() -> None:
    ranks.join()
    torch.set_num_threads(1)
    torch.manual_seed(5)  # the same on both ranks
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor_parallel",))
    for objective, rows, bias in itertools.product(OBJECTIVES, (1, 4, 50), (False, True)):
        assert compare(mesh, objective, rows, torch.float64, bias=bias, trains=True, reaches=True) < 1e-14
    for trains, reaches in ((False, True), (True, False), (False, False)):
        assert compare(mesh, Objective(), 4, torch.float64, bias=False, trains=trains, reaches=reaches) < 1e-14
    assert compare(mesh, OBJECTIVES[1], 4, torch.float32, bias=True, trains=True, reaches=True) < 1e-6
    assert compare(mesh, OBJECTIVES[1], 4, torch.bfloat16, bias=True, trains=True, reaches=True) < 1e-2
    assert compare(mesh, OBJECTIVES[1], 4, torch.float16, bias=True, trains=True, reaches=True) < 1e-3

    whole, part = heads(mesh, torch.float64, bias=True)
    hidden = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(part(hidden), whole(hidden))  # as generate calls it
    nothing = head_loss(
        part, hidden[:0].requires_grad_(), torch.zeros(0, dtype=torch.int64), torch.zeros(0), Objective(), 4
    )
    nothing.loss.backward()
    assert float(nothing.loss) == 0 and not whole_of(part.weight.grad).any()

    assert is_head_cut(model(), 2) and not is_head_cut(model(vocabulary=13), 2)
    assert not is_head_cut(model(tie_word_embeddings=True), 2)
    if dist.get_rank() == 0:
        print("all as whole")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
