"""Run by test_build_7b.py: builds the policy of a configuration on the meta device, as each rank of its layout in turn.

One process under torch's fake process group is every rank, one after another. Arguments: the configuration file.
Prints JSON: the number of unique parameters of the whole model, and those of each rank.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ppomax.engine.config_file import load_config
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.models.transformer import build_chunks
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import make_layout


def main(path: str) -> None:
    config = load_config(path, [], command="ppo")
    shape = shape_from_init(config.model.init, 32000)
    size = config.parallel.policy.tp * config.parallel.policy.pp
    unique, per_rank = 0, []
    for rank in range(size):
        os.environ["WORLD_SIZE"] = str(size)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        start(60)
        layout = make_layout("policy", config.parallel.policy, size)
        groups = make_groups({"policy": layout})["policy"]
        with torch.device("meta"):
            chunks = build_chunks(
                config.model,
                shape,
                groups,
                sequence_parallel=config.parallel.sequence_parallel,
                on_cpu=True,
            )
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert all(parameter.is_meta for parameter in parameters)
        per_rank.append(sum(parameter.numel() for parameter in parameters))
        # Megatron marks what it splits over tp; all else is the same on every tp rank.
        unique += sum(
            parameter.numel()
            for parameter in parameters
            if groups.tp_rank == 0 or getattr(parameter, "tensor_model_parallel", False)
        )
        stop()
    print(json.dumps({"layout": [layout.tp, layout.pp], "unique": unique, "per_rank": per_rank}))


if __name__ == "__main__":
    main(sys.argv[1])
