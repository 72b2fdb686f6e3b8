"""What the type of stored logits does to PPO's ratio exp(logp - old_logp), and that ours are exact enough."""

import pytest
import torch
from torch import Tensor

from ppomax.kernels.linear_logprobs import linear_logprobs

N, H, V = 128, 512, 16000


def ratio_error(logprobs: Tensor, exact: Tensor) -> Tensor:
    """|ratio - 1| [N] of the same policy evaluated twice, once exactly."""
    return torch.expm1(logprobs.double() - exact).abs()


@pytest.mark.parametrize(("std", "share_above_1_percent"), [(2.0, 0.05), (4.0, 0.4)])
def test_bf16_logits_put_errors_into_the_ratio_and_ours_do_not(std: float, share_above_1_percent: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).bfloat16()
    weight = (std * torch.randn(V, H, generator=generator) / H**0.5).bfloat16()
    logits = hidden.double() @ weight.double().T
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)
    exact = logits.log_softmax(dim=1).gather(1, labels)[:, 0]
    stored = logits.bfloat16().double().log_softmax(dim=1).gather(1, labels)[:, 0]
    ours, _ = linear_logprobs(hidden, weight, labels[:, 0])
    assert (ratio_error(stored, exact) > 0.01).double().mean() > share_above_1_percent
    assert ratio_error(ours, exact).max() < 2e-5
