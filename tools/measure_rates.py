"""Measures what `ppomax plan` needs to know of a machine, and writes it to a file for `ppomax plan --gpu FILE.json`.

    torchrun --standalone --nproc-per-node 2 -m ppomax.tools.measure_rates --output rates.json

All ranks measure at the same time; the slowest counts. A copy, a product and, with several ranks, sums over all of them
give bytes and operations a second; small models give what a layer takes however few tokens it has. Each number is the
best of some repeats. Where ranks span hosts, link and network are both that of the sum over all. A CPU rank measures
with one thread; what it computes alone is timed by its CPU time, which other programs hardly lengthen.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ModelConfig
from ppomax.engine.data.batches import last_token_rows
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.roles import Role, make_role, role_packs
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.parallel.pipeline import run_forward
from ppomax.engine.plan.gpus import Gpu
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.tools.bench_kernels import device_name
from ppomax.tools.bench_rollout import SMALL
from ppomax.tools.bench_timing import synchronize

TIMEOUT_SECONDS = 600
LAYERS = (2, 10)
"""Of two small models, whose difference is that of so many layers."""
PROMPT, NEW_TOKENS, REQUESTS = 8, 32, 2
COPY_BYTES = {"cpu": 2**26, "cuda": 2**31}
PRODUCT_SIZE = {"cpu": 512, "cuda": 8192}
SUM_BYTES = {"cpu": 2**24, "cuda": 2**28}
REPEATS = 20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.measure_rates", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("rates.json"), help="default: rates.json")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = start(TIMEOUT_SECONDS)
    rates = measure_rates(device)
    if dist.get_rank() == 0:
        arguments.output.write_text(json.dumps(asdict(rates), indent=1) + "\n")
        print(f"wrote {arguments.output}: {rates}")
    stop()


def measure_rates(device: torch.device) -> Gpu:
    """The rates of a rank of this run, the same on every rank, which must all call it after `start`."""
    kind, copied, size = device.type, COPY_BYTES[device.type], PRODUCT_SIZE[device.type]
    copy, host = (_slowest(seconds, device) for seconds in _copies(copied, device))
    product = _slowest(_product(size, device), device)
    num, summed = dist.get_world_size(), torch.ones(SUM_BYTES[kind] // 4, device=device)
    link, start_seconds = 2 * copied / copy, Gpu("", 0, 0, 0, 0, 0, 0).collective_seconds
    if num > 1:
        small = torch.ones(1, device=device)
        start_seconds = _slowest(best(lambda: dist.all_reduce(small), device, alone=False), device)
        whole = _slowest(best(lambda: dist.all_reduce(summed), device, alone=False), device)
        link = 2 * SUM_BYTES[kind] * (num - 1) / num / max(whole - start_seconds, 1e-9)
    layer, decode = layer_seconds(device)
    memory = torch.cuda.get_device_properties(device).total_memory if kind == "cuda" else psutil.virtual_memory().total
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Gpu(
        name=device_name(device),
        memory=memory if kind == "cuda" else memory / per_node,
        flops=2 * size**3 / product,
        bandwidth=2 * copied / copy,
        link=link,
        network=link,
        host=copied / host,
        per_node=per_node,
        collective_seconds=start_seconds,
        layer_seconds=_slowest(layer, device),
        decode_layer_seconds=_slowest(decode, device),
    )


def best(function: Callable[[], object], device: torch.device, *, alone: bool = True) -> float:
    """Seconds of the fastest of REPEATS calls, after one. alone: it waits for no other rank, so that a CPU's time
    counts.
    """
    now = time.process_time if alone and device.type == "cpu" else time.perf_counter
    least = math.inf
    for _ in range(1 + REPEATS):
        synchronize(device)
        begin = now()
        function()
        synchronize(device)
        least = min(least, now() - begin)
    return least


def _copies(num_bytes: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a copy on the device, and of one from or to its host, whose memory is pinned on CUDA."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    host = torch.empty_like(source, device="cpu", pin_memory=device.type == "cuda")
    there_and_back = best(lambda: (host.copy_(source), source.copy_(host)), device)
    return best(lambda: target.copy_(source), device), there_and_back / 2


def _product(size: int, device: torch.device) -> float:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Random numbers: a product of zeros runs faster, since it needs less power.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return best(lambda: a @ b, device)


def _slowest(seconds: float, device: torch.device) -> float:
    """Of all ranks. Collective."""
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def layer_seconds(device: torch.device) -> tuple[float, float]:
    """Of one layer with a handful of tokens: a forward pass as in scoring, and a step of generation."""
    passes, steps = [], []
    for layers in LAYERS:
        heads = replace(SMALL["1 M (quickstart)"], num_heads=2, num_query_groups=1, head_dim=16)
        role = _role(replace(heads, hidden_size=32, ffn_hidden_size=64, vocab_size=64, num_layers=layers))
        passes.append(best(lambda role=role: _score(role), device))  # type: ignore[misc]
        steps.append(best(lambda role=role: _generate(role), device) / NEW_TOKENS)  # type: ignore[misc]
    more = LAYERS[1] - LAYERS[0]
    return tuple(max(large - small, 1e-9) / more for small, large in (passes, steps))  # type: ignore[return-value]


def _role(shape: ModelShape) -> Role:
    config = RunConfig(model=ModelConfig(dtype="bf16" if torch.cuda.is_available() else "fp32"))
    groups = make_groups({"policy": ParallelLayout(1, 1, dist.get_world_size())})["policy"]
    return make_role("policy", shape, RandomReader(shape, seed=0, std=0.02), config, groups, source="benchmark")


def _score(role: Role) -> None:
    sequences = [torch.ones(PROMPT, dtype=torch.int64)] * dist.get_world_size()
    packs = role_packs(role, sequences, last_token_rows([PROMPT] * len(sequences)), PROMPT)
    run_forward(role.modules, role.groups, packs, lambda hidden, pack: hidden[:, 0], len(sequences))


def _generate(role: Role) -> None:
    prompts = [[1] * PROMPT] * REQUESTS * dist.get_world_size()
    sampling = SamplingConfig(max_new_tokens=NEW_TOKENS)
    generate(role, prompts, sampling, seeds=request_seeds(0, 0, len(prompts)), eos_id=-1, pad_id=0)


if __name__ == "__main__":
    main()
