"""The peak memory of linear_policy_loss grows with the chunk of rows, not with rows times vocabulary."""

import json
import os
import subprocess
import sys

import pytest

MEBIBYTE = 2**20
H, V = 64, 32000

# Prints how far the process's peak memory rose over one call, in bytes.
SCRIPT = """
import json, resource, sys, torch
from ppomax.kernels.linear_policy_loss import linear_policy_loss
N, H, V, chunk_rows = json.loads(sys.argv[1])
torch.set_num_threads(1)
def case(N):
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) / 8).requires_grad_()
    return hidden, weight, torch.randint(V, (N,)), torch.zeros(N) - 10, torch.randn(N), torch.full((N,), 1 / N)
def step(inputs):
    loss = linear_policy_loss(*inputs, clip=0.2, entropy_coef=0.1, chunk_rows=chunk_rows).loss
    loss.backward()
warm, inputs = case(8), case(N)
step(warm)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(inputs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_growth(num_rows: int, chunk_rows: int) -> int:
    arguments = json.dumps([num_rows, H, V, chunk_rows])
    environment = {**os.environ, "PPOMAX_KERNELS": "reference", "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=environment,
    )
    return int(result.stdout)


@pytest.mark.one_version
def test_peak_memory_is_a_few_chunks_and_the_gradients() -> None:
    chunk_logits = 128 * V * 4
    small, large = peak_growth(512, 128), peak_growth(4096, 128)
    whole_logits = 4096 * V * 4  # 500 MiB
    # The gradient of the weight and a few buffers of one chunk (16 MiB); rows only add [N, H].
    assert large < 8 * chunk_logits + 3 * V * H * 4 < whole_logits / 2
    assert large - small < 2 * chunk_logits
