"""Matrices that neither two devices of a group nor two groups divide into equal parts; test_parallel.py runs this."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from mft_lightning import ranks
from mft_lightning.model.parallel import ParallelSettings, fill, gathered, shard
from mft_lightning.model.supervised_loss import SupervisedLM

SIZES = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 26}


def main() -> None:
    ranks.join()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = SupervisedLM(GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, vocab_size=14)))
    whole = {name: value.clone() for name, value in network.state_dict().items()}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(network, mesh, ParallelSettings(tensor_parallel_size=2), "32-true")
    shares = {name: value.to_local().numel() for name, value in network.state_dict().items()}
    with torch.no_grad():
        for name, value in network.state_dict().items():
            assert torch.equal(gathered(value), whole[name]), name
            value.zero_()
            fill(value, whole[name])
            assert torch.equal(gathered(value), whole[name]), name
    everywhere = [None] * 4
    dist.all_gather_object(everywhere, shares["model.lm_head.weight"])
    if dist.get_rank() == 0:
        assert everywhere == [80, 80, 60, 60]  # 7 rows of a device of either group, in shares of 4 and of 3
        print("all as before")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
