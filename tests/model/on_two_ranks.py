"""A network sharded over two ranks against the same network before it was sharded; test_parallel.py runs this."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from mft_lightning import ranks
from mft_lightning.data.tokenizer import load_tokenizer
from mft_lightning.model.generation import GenerationSettings, answer, answer_together
from mft_lightning.model.gradients import clip_gradients
from mft_lightning.model.parallel import ParallelSettings, fill, gathered, gathered_state, shard
from mft_lightning.model.source import ModelSource, build_causal_lm, load_config
from mft_lightning.model.supervised_loss import SupervisedLM

EOS = 0
# rank 0 has more prompts, and one so long that those beside it get a second round; rank 1 fewer, or none
PROMPTS = {0: [[[5] * 250, [7, 8], [9] * 30], [[11, 12]]], 1: [[[13] * 200, [14]], []]}


def loud(directory: str) -> SupervisedLM:
    """A random network whose answers depend on the whole prompt, some of them short."""
    source = ModelSource(
        path=directory,
        init="random",
        model_type=load_config(directory, "gpt_neox").model_type,
        dtype=torch.float64,
        attn_implementation="sdpa",
        trust_remote_code=False,
        seed=3,
    )
    model = build_causal_lm(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
        model.gpt_neox.final_layer_norm.bias[0] = 1.0
        model.get_output_embeddings().weight[EOS, 0] += 2.0
    model.config.max_position_embeddings = 256
    return SupervisedLM(model.eval())


def clip_flat_shards(dtype: torch.dtype) -> None:
    """Where one rank's shard of FSDP1 holds all that trains, and the other's nothing."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
    whole[1].requires_grad_(False)
    flat = FullyShardedDataParallel(copy.deepcopy(whole), use_orig_params=True, device_id=torch.device("cpu"))
    batch = torch.randn(4, 8).to(dtype)
    for network in (whole, flat):
        network(batch).float().square().sum().backward()
    trained = list(flat[0].parameters())
    assert any(parameter.grad is not None for parameter in trained) == (dist.get_rank() == 0)
    norms = [clip_gradients(network, list(network[0].parameters()), 0.1) for network in (whole, flat)]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-12, atol=0)
    if dist.get_rank() == 0:
        for ours, theirs in zip(trained, whole[0].parameters(), strict=True):
            assert torch.equal(ours.grad.flatten(), theirs.grad.flatten())


def main(directory: str) -> None:
    ranks.join()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(directory)
    network = loud(directory)
    whole = {name: value.clone() for name, value in network.state_dict().items()}
    settings = GenerationSettings(max_new_tokens=20)
    mine = PROMPTS[dist.get_rank()]
    alone = [answer(network.model, tokenizer, batch, settings) if batch else [] for batch in mine]

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",))
    shard(network, mesh, ParallelSettings(), "32-true")

    state = network.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    kept = gathered_state({"deep": [state]}, keep=dist.get_rank() == 1)["deep"][0]
    if dist.get_rank() == 1:
        assert all(torch.equal(kept[name], whole[name]) for name in whole)
    else:
        assert not any(value.numel() for value in kept.values())
    with torch.no_grad():
        for name, value in whole.items():
            state[name].zero_()
            fill(state[name], value)
            assert torch.equal(gathered(state[name]), value), name

    for batch, expected in zip(mine, alone, strict=True):
        assert answer_together(network, tokenizer, batch, settings) == expected
    lengths = sorted(len(found.ids) for batch in alone for found in batch)
    clip_flat_shards(torch.float32)
    clip_flat_shards(torch.bfloat16)
    if dist.get_rank() == 0:
        assert lengths[0] < lengths[-1] == 20, (
            lengths
        )  # both an answer that ended and one that a second round made longer
        print("all as before")
    gc.collect()  # FSDP1's modules hold gloo's threads, which must end before the process does
    dist.destroy_process_group()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
