"""Peak memory of what works on logits, measured on processes of their own."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.one_version

H, V = 64, 32000
LINEAR = """
from ppomax.kernels.linear_policy_loss import linear_policy_loss
def case(N):
    hidden = torch.randn(N, H, requires_grad=True)
    weight = (torch.randn(V, H) / 8).requires_grad_()
    return hidden, weight, torch.randint(V, (N,)), torch.zeros(N) - 10, torch.randn(N), torch.full((N,), 1 / N)
def step(inputs):
    linear_policy_loss(*inputs, clip=0.2, entropy_coef=0.1, chunk_rows=chunk_rows).loss.backward()
"""
LOGITS = """
from ppomax.kernels.logprobs import token_logprobs
def case(N):
    return torch.randn(N, V, requires_grad=True), torch.randint(V, (N,))
def step(inputs):
    logprobs, entropy = token_logprobs(*inputs)
    (logprobs + entropy).sum().backward()
"""
# Prints how far the process's peak memory rises over one call, in bytes.
SCRIPT = """
import json, resource, sys, torch
N, H, V, chunk_rows = json.loads(sys.argv[1])
torch.set_num_threads(1)
{definitions}
warm, inputs = case(8), case(N)
step(warm)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(inputs)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def peak_growth(definitions: str, num_rows: int, chunk_rows: int = 0) -> int:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(definitions=definitions), json.dumps([num_rows, H, V, chunk_rows])],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PPOMAX_KERNELS": "reference", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return int(result.stdout)


def test_linear_loss_needs_a_few_chunks_and_the_gradients_however_many_rows() -> None:
    chunk_logits = 128 * V * 4
    small, large = peak_growth(LINEAR, 512, 128), peak_growth(LINEAR, 4096, 128)
    whole_logits = 4096 * V * 4  # 500 MiB
    # The gradient of the weight and a few buffers of one chunk (16 MiB); rows only add [N, H].
    assert large < 8 * chunk_logits + 3 * V * H * 4 < whole_logits / 2
    assert large - small < 2 * chunk_logits


def test_logprobs_of_stored_logits_add_their_gradient_and_no_second_copy() -> None:
    num_rows = 2048
    logits = num_rows * V * 4  # 250 MiB
    assert peak_growth(LOGITS, num_rows) < 1.3 * logits
