"""Dynamic batches of the reward model, and its loss and gradients against a plain torch computation."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from ppomax.engine.config import ArchitectureConfig, RewardConfig, RunConfig
from ppomax.engine.data.datasets import Dataset, PairRow
from ppomax.engine.models.roles import make_role, random_reader, role_groups
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo.evaluation import pair_accuracy
from ppomax.engine.train_reward import plan_batches, reward_gradients


def pair(draw, prompt=4):
    lengths = torch.randint(1, 12, (2,), generator=draw).tolist()
    head = torch.randint(3, 60, (prompt,), generator=draw).tolist()
    chosen, rejected = (tuple(head + torch.randint(3, 60, (n,), generator=draw).tolist() + [2]) for n in lengths)
    return PairRow(chosen, rejected, prompt, (), 0, 1)


@pytest.fixture(scope="module")
def pairs():
    draw = torch.Generator().manual_seed(0)
    return [pair(draw, 3 + i % 5) for i in range(50)]


def test_batches_take_pairs_until_their_tokens_suffice(pairs):
    dataset = Dataset((tuple(pairs),), (1.0,), ())
    config = RewardConfig(min_pairs=4, max_pairs=8, tokens_per_batch=150, epochs=1)
    batches = plan_batches(dataset, dataset.order(3), config, 0)
    assert sum(map(len, batches)) == 50
    assert len({id(p) for batch in batches for p in batch}) == 50
    for batch in batches[:-1]:
        tokens = [len(p.chosen) + len(p.rejected) for p in batch]
        assert 4 <= len(batch) <= 8
        assert len(batch) == 4 or sum(tokens[:-1]) < 150
        assert len(batch) == 8 or sum(tokens) >= 150


def test_train_steps_overrides_the_epochs(pairs):
    dataset = Dataset((tuple(pairs),), (1.0,), ())
    config = RewardConfig(min_pairs=4, max_pairs=4, tokens_per_batch=10)
    assert [len(batch) for batch in plan_batches(dataset, dataset.order(3), config, 20)] == [4] * 20


@pytest.mark.parametrize("tokens_per_microbatch", [40, 10000])
@pytest.mark.parametrize("lm_coef", [0.0, 1.5])
def test_loss_and_gradient_are_those_of_equation_2(pairs, tokens_per_microbatch, lm_coef):
    torch.set_num_threads(1)
    init = ArchitectureConfig(hidden_size=32, num_layers=2, ffn_hidden_size=64, init_std=0.2)
    config = RunConfig.model_validate(
        {
            "model": {"init": init.model_dump()},
            "reward": {"lm_coef": lm_coef},
            "train": {"tokens_per_microbatch": tokens_per_microbatch},
        }
    )
    start(60)
    try:
        shape = shape_from_init(init, 67)
        model = make_role(
            "reward",
            shape,
            random_reader(shape, config),
            config,
            role_groups(config)["reward"],
            source="random",
            extra_scalar_head=True,
            fresh_head=True,
            trained=True,
        )
        losses = reward_gradients(model, pairs[:9], config)
        head_gradient = model.stage.scalar_head.weight.main_grad.clone()
        differences = pair_accuracy(model, pairs[:9], config.train).differences
        assert losses["ranking_loss"] == pytest.approx(-logsigmoid(differences).mean().item(), rel=1e-5)
        assert losses["accuracy"] == pytest.approx((differences > 0).float().mean().item())
        assert losses["loss"] == pytest.approx(losses["ranking_loss"] + lm_coef * losses["lm_loss"], rel=1e-5)
        if lm_coef:
            assert losses["lm_loss"] == pytest.approx(chosen_nll(model, pairs[:9]), rel=1e-5)
        # The scalar head's gradient by finite differences along one direction.
        direction = torch.randn(head_gradient.shape, generator=torch.Generator().manual_seed(1))
        step = 1e-2
        values = []
        for sign in (1, -1):
            model.stage.scalar_head.weight.data.add_(sign * step * direction)
            values.append(reward_gradients(model, pairs[:9], config)["loss"])
            model.stage.scalar_head.weight.data.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        assert float((head_gradient * direction).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-4)
    finally:
        stop()


def chosen_nll(model, pairs):
    """Mean over the tokens of all chosen responses, one sequence at a time."""
    from ppomax.engine.data.batches import Rows
    from ppomax.engine.models.roles import role_packs
    from ppomax.engine.parallel.pipeline import run_forward

    total, count = 0.0, 0
    for row in pairs:
        tokens = torch.tensor(row.chosen)
        every = torch.arange(len(tokens))
        packs = role_packs(model, [tokens], Rows([every], [torch.full_like(every, -1)], [every]), 10000)
        weight = model.stage.vocabulary_weight()[:67]
        logits = run_forward(
            model.modules, model.groups, packs, lambda hidden, pack, w=weight: hidden @ w.T, len(tokens), width=67
        )
        logprobs = logits.log_softmax(-1)
        for t in range(row.prompt_length, len(tokens)):
            total -= logprobs[t - 1, tokens[t]].item()
            count += 1
    return total / count
