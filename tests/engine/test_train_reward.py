"""Dynamic batches of the reward model, and its loss and gradients against a plain torch computation."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from ppomax.engine.config import RewardConfig, RunConfig
from ppomax.engine.config_models import ArchitectureConfig
from ppomax.engine.data.datasets import Dataset, PairRow, SolutionRow
from ppomax.engine.models.roles import load_role, make_role, random_reader, role_groups
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo.evaluation import pair_accuracy
from ppomax.engine.ppo.scoring import step_values
from ppomax.engine.ppo.types import Rollout
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


def test_a_process_model_learns_labelled_steps(tiny, tmp_path):
    """The stage itself; its folder then judges steps. At initialisation the loss is that of the plain sum."""
    import json

    from ppomax.engine.train_process import process_gradients
    from ppomax.engine.train_reward import run

    draw = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(60):
        right = torch.randint(0, 2, (3,), generator=draw).tolist()
        rows.append({"prompt": "q", "steps": ["a" if r else "b" for r in right], "labels": [2 * r - 1 for r in right]})
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = tiny.config("reward", tmp_path / "run", reward={"labels": "steps", "tokens_per_batch": 400})
    sections["data"] |= {"train": str(tmp_path / "steps.jsonl"), "eval": str(tmp_path / "steps.jsonl")}
    sections["train"] |= {"steps": 30, "tokens_per_microbatch": 100}
    sections["optim"]["lr"] = 5e-3
    config = RunConfig.model_validate(sections)
    run(config)
    metrics = json.loads((tmp_path / "run/reward_eval.json").read_text())
    assert metrics["accuracy"] > 0.95
    assert min(metrics["accuracy_right"], metrics["accuracy_wrong"]) > 0.9
    start(60)
    try:
        groups = role_groups(config)["reward"]
        folder = str(tmp_path / "run/hf")
        model = load_role("reward", folder, config, groups, scalar=True, trained=True)
        solutions = [
            SolutionRow((3, 4, 5, 6, 7), (2, 4), (1.0, 0.25), 2, (), 0, 1),
            SolutionRow((8, 9, 10), (2,), (0.0,), 1, (), 0, 2),
        ]
        losses = process_gradients(model, solutions, config)
        ends = torch.zeros(2, 4, dtype=torch.bool)
        ends[0, 1] = ends[0, 3] = ends[1, 1] = True
        tokens = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
        lengths = torch.tensor([5, 3])
        rollout = Rollout(tokens, torch.tensor([2, 1]), lengths, ends, lengths > 0, torch.zeros(2, 4))
        values = step_values(model, rollout, ends, tokens_per_microbatch=100)
        right = (values[ends] + 1) / 2
        targets = torch.tensor([1.0, 0.25, 0.0])
        expected = -(targets * right.log() + (1 - targets) * (1 - right).log()).mean()
        assert losses["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert (values[~ends] == 0).all()
    finally:
        stop()
