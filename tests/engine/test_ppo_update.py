"""Experience and update on tiny real models: what each switch of PPO-max does to the numbers and the gradients."""

import math
from dataclasses import replace

import pytest
import torch

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ArchitectureConfig
from ppomax.engine.config_ppo import PpoConfig, RewardSource
from ppomax.engine.data.datasets import DialogueRow
from ppomax.engine.errors import DivergedError
from ppomax.engine.models.roles import as_scalar, make_role, random_reader, role_groups
from ppomax.engine.models.shape import shape_from_init
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.ppo import update as ppo_update
from ppomax.engine.ppo.experience import Models, kept_tokens, make_experience, sampler_weights
from ppomax.engine.ppo.rewards import RewardScaler
from ppomax.engine.ppo.scoring import token_logprobs, token_values
from ppomax.engine.ppo.statistics import rollout_statistics
from ppomax.engine.ppo.update import RATIO_METRICS, Ratios, UpdateSettings, take, update
from ppomax.engine.rewards.functions import Response
from ppomax.engine.rewards.mixture import RewardMix
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.steps import StepCounter, language_model_gradients

LIMIT = 4096
PROMPTS = [[1, 7, 9, 12], [1, 30], [1, 4, 4, 8, 15, 16, 23, 42], [1, 5, 50], [1, 60, 61], [1, 2, 3, 33, 34, 35]]
BASE = PpoConfig(preset="none", rollout_size=6, minibatch_size=3, kl_coef=0.1)


@pytest.fixture(scope="module")
def groups():
    torch.set_num_threads(1)
    start(60)
    yield role_groups(RunConfig())
    stop()


@pytest.fixture
def models(groups):
    """Four roles with different weights; policy and critic are trained."""

    def role(name, seed, *, scalar=False, trained=False):
        init = ArchitectureConfig(
            hidden_size=32, num_layers=2, num_heads=4, num_query_groups=2, ffn_hidden_size=64, init_std=0.2
        )
        config = RunConfig.model_validate({"model": {"init": init.model_dump()}, "train": {"seed": seed}})
        shape = shape_from_init(init, 67)
        shape = as_scalar(shape) if scalar else shape
        return make_role(
            name, shape, random_reader(shape, config), config, groups[name], source="random", trained=trained
        )

    return Models(
        policy=role("policy", 1, trained=True),
        critic=role("critic", 2, scalar=True, trained=True),
        reference=role("reference", 3),
        reward=role("reward", 4, scalar=True),
    )


@pytest.fixture
def rollout(models):
    sampling = SamplingConfig(max_new_tokens=9, temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    return generate(models.policy, PROMPTS, sampling, seeds=request_seeds(0, 0, len(PROMPTS)), eos_id=2, pad_id=0)


def experience_of(rollout, models, config=BASE, scaler=None):
    return make_experience(
        rollout, models, scaler or RewardScaler(), kl_coef=config.kl_coef, config=config, tokens_per_microbatch=LIMIT
    )[0]


def settings_for(config):
    return UpdateSettings(config, RunConfig().optim, LIMIT)


def gradient(role):
    return torch.cat([p.main_grad.flatten().clone() for p in role.stage.parameters()])


def policy_gradient(models, experience, config, dialogues=()):
    mask = kept_tokens(experience.rollout, config)
    weights = mask.float() / mask.sum().clamp_min(1)
    settings = settings_for(config)
    sums = ppo_update._policy_gradients(models.policy, experience, mask, weights, dialogues, settings, Ratios())
    return dict(zip(ppo_update.POLICY_SUMS, sums.tolist(), strict=True)), gradient(models.policy)


def whole_logprobs(role, rollout):
    """[B, T, V] log-probabilities by one forward pass per sequence, straight from the hidden states."""
    from ppomax.engine.data.batches import Rows, unpad
    from ppomax.engine.models.roles import role_packs
    from ppomax.engine.parallel.pipeline import run_forward

    sequences = unpad(rollout.tokens, rollout.lengths)
    num_columns = rollout.response_mask.shape[1]
    every = [torch.arange(s.numel() - 1) for s in sequences]
    rows = Rows(every, [torch.full_like(r, -1) for r in every], [b * num_columns + r for b, r in enumerate(every)])
    weight = role.stage.vocabulary_weight()[:67]
    out = run_forward(
        role.modules,
        role.groups,
        role_packs(role, sequences, rows, LIMIT),
        lambda hidden, pack: hidden @ weight.T,
        rollout.response_mask.numel(),
        width=67,
    )
    return out.view(*rollout.response_mask.shape, 67).log_softmax(-1)


def test_experience_matches_a_hand_written_loop(models, rollout):
    experience = experience_of(rollout, models)
    mask = rollout.response_mask
    assert torch.equal(experience.advantages[~mask], torch.zeros_like(experience.advantages[~mask]))
    scaled = (experience.scores - experience.scores.mean()) / experience.scores.std()
    for b in range(len(PROMPTS)):
        columns = mask[b].nonzero().squeeze(1).tolist()
        advantage, next_value = 0.0, 0.0
        for t in reversed(columns):
            reward = -0.1 * float(experience.logprobs[b, t] - experience.ref_logprobs[b, t])
            reward += float(scaled[b]) if t == columns[-1] else 0.0
            advantage = reward + next_value - float(experience.values[b, t]) + 0.9 * advantage
            next_value = float(experience.values[b, t])
            assert experience.advantages[b, t].item() == pytest.approx(advantage, abs=2e-5)
            assert experience.returns[b, t].item() == pytest.approx(advantage + next_value, abs=2e-5)


def test_logprobs_of_the_trainer_equal_those_of_the_sampler(models, rollout):
    logprobs, entropy = token_logprobs(models.policy, rollout, tokens_per_microbatch=LIMIT)
    assert (logprobs - rollout.sampling_logprobs).abs().max() < 5e-5
    whole = whole_logprobs(models.policy, rollout)
    assert torch.allclose(entropy, -(whole.exp() * whole).sum(-1) * rollout.response_mask, atol=1e-5)


def test_old_logprobs_can_be_the_samplers(models, rollout):
    experience = experience_of(rollout, models, BASE.model_copy(update={"old_logprobs": "rollout"}))
    assert torch.equal(experience.logprobs, rollout.sampling_logprobs)


def test_full_kl_is_that_of_the_two_distributions(models, rollout):
    experience = experience_of(rollout, models, BASE.model_copy(update={"kl_estimator": "full"}))
    p, q = whole_logprobs(models.policy, rollout), whole_logprobs(models.reference, rollout)
    expected = (p.exp() * (p - q)).sum(-1) * rollout.response_mask
    assert torch.allclose(experience.kl, expected, atol=1e-5)
    assert (experience.kl >= 0).all()


def test_importance_sampling_takes_the_ratio_against_the_reference(models, rollout):
    experience = experience_of(rollout, models, BASE.model_copy(update={"importance_sampling": True}))
    assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
    assert not torch.equal(experience.old_logprobs, experience.logprobs)


def test_responses_without_eos_are_penalised_or_left_out(models, rollout):
    unfinished = replace(rollout, finished=torch.tensor([True, False, True, True, True, False]))
    plain = experience_of(unfinished, models)
    penalised = experience_of(unfinished, models, BASE.model_copy(update={"no_eos_penalty": 2.0}))
    change = (plain.token_rewards - penalised.token_rewards).sum(1)
    assert torch.allclose(change, torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0, 2.0]), atol=1e-5)
    mask = kept_tokens(unfinished, BASE.model_copy(update={"mask_no_eos": True}))
    assert not mask[1].any()
    assert torch.equal(mask[0], rollout.response_mask[0])


def one_row_mix(values, is_end, **settings):
    """A mixture of the reward model and a function per step that gives values [B, T] where is_end [B, T] is True."""

    class Given(RewardMix):
        def step_ends(self, rollout):
            return is_end

        def responses(self, rollout):
            return [Response((), "", "", 0, True, ("",) * int(row.sum())) for row in is_end]

    steps = RewardSource(kind="function", path="a:b", name="steps", per_step=True, **settings)
    functions = {"steps": lambda responses: [v[e].tolist() for v, e in zip(values, is_end, strict=True)]}
    return Given((RewardSource(kind="model", weight=2.0), steps), functions, None, "", {})


def test_step_rewards_reach_the_advantages_of_earlier_tokens_only(models, rollout):
    """Hand-worked: gamma 1, lambda 0.9, unscaled, a step of reward 1 at the third token and one of -2 at the fifth."""
    config = BASE.model_copy(update={"reward_scaling": "none", "reward_clip": None})
    longest = int(rollout.response_mask.sum(1).argmax())
    columns = rollout.response_mask[longest].nonzero().squeeze(1)
    assert len(columns) >= 6
    values, is_end = torch.zeros_like(rollout.sampling_logprobs), torch.zeros_like(rollout.response_mask)
    values[longest, columns[2]], values[longest, columns[4]] = 0.5, -1.0
    is_end[longest, columns[2]] = is_end[longest, columns[4]] = True
    model_alone = replace(one_row_mix(values, is_end & False), sources=(RewardSource(kind="model", weight=2.0),))
    results = [
        make_experience(
            rollout, models, RewardScaler(), kl_coef=0.1, config=config, tokens_per_microbatch=LIMIT, rewards=mix
        )[0]
        for mix in (model_alone, one_row_mix(values, is_end, weight=2.0))
    ]
    change = (results[1].advantages - results[0].advantages)[longest, columns]
    # -2 at the fifth token reaches the third as -2 * 0.9 ** 2.
    expected = [0.81 - 2 * 0.9**4, 0.9 - 2 * 0.9**3, 1 - 2 * 0.9**2, -1.8, -2.0] + [0.0] * (len(columns) - 5)
    assert torch.allclose(change, torch.tensor(expected), atol=1e-5)
    rewards = (results[1].token_rewards - results[0].token_rewards)[longest]
    assert rewards.nonzero().flatten().tolist() == columns[[2, 4]].tolist()
    others = torch.arange(len(PROMPTS)) != longest
    assert torch.equal(results[1].advantages[others], results[0].advantages[others])
    assert float(results[1].scores[longest] - results[0].scores[longest]) == pytest.approx(-1.0, abs=1e-6)


def test_moments_are_those_of_whole_responses_and_scale_steps_too(models, rollout):
    generator = torch.Generator().manual_seed(0)
    is_end = rollout.response_mask & (torch.rand(rollout.response_mask.shape, generator=generator) < 0.5)
    values = torch.randn(is_end.shape, generator=generator) * 30 * is_end
    config = BASE.model_copy(update={"kl_coef": 0.0, "reward_clip": None})
    options = {"kl_coef": 0.0, "config": config, "tokens_per_microbatch": LIMIT}
    mix = one_row_mix(values, is_end)
    experience, scaler = make_experience(rollout, models, RewardScaler(), rewards=mix, **options)
    plain, _ = make_experience(rollout, models, RewardScaler(), **options)
    totals = 2 * plain.scores + values.sum(1)
    torch.testing.assert_close(experience.scores, totals)
    assert (scaler.mean, scaler.std) == pytest.approx((float(totals.mean()), float(totals.std())))
    # The sum of a response's token rewards is its normalised total; each step has its own share where it ends.
    torch.testing.assert_close(experience.token_rewards.sum(1), (totals - totals.mean()) / totals.std())
    last = rollout.lengths - 2
    inner = is_end.clone()
    inner[torch.arange(len(PROMPTS)), last] = False
    torch.testing.assert_close(experience.token_rewards[inner], (values / totals.std())[inner])
    clipped = config.model_copy(update={"reward_clip": 0.5})
    experience, _ = make_experience(rollout, models, RewardScaler(), rewards=mix, **options | {"config": clipped})
    assert experience.token_rewards[inner].abs().max() == 0.5
    metrics = rollout_statistics(experience).metrics
    assert metrics["reward/steps"] == pytest.approx(float(values.sum() / is_end.sum()))
    assert metrics["reward/model"] == pytest.approx(float(plain.scores.mean()))


def test_the_reward_model_alone_gives_the_same_bits_through_the_mixture(models, rollout):
    plain, scaler = make_experience(
        rollout, models, RewardScaler(), kl_coef=0.1, config=BASE, tokens_per_microbatch=LIMIT
    )
    mix = replace(one_row_mix(None, None), sources=(RewardSource(kind="model"),))
    mixed, same_scaler = make_experience(
        rollout, models, RewardScaler(), kl_coef=0.1, config=BASE, tokens_per_microbatch=LIMIT, rewards=mix
    )
    assert scaler == same_scaler
    for name in ("scores", "token_rewards", "advantages", "returns"):
        assert torch.equal(getattr(plain, name), getattr(mixed, name)), name


def test_ptx_adds_its_gradient_to_that_of_the_policy_loss(models, rollout):
    experience = experience_of(rollout, models)
    dialogue = DialogueRow(tuple(range(3, 15)), (False,) * 4 + (True,) * 8, (), 0, 1)
    config = BASE.model_copy(update={"ptx_coef": 0.7})
    _, alone = policy_gradient(models, experience, BASE)
    stats, mixed = policy_gradient(models, experience, config, [dialogue])
    loss = language_model_gradients(models.policy, [dialogue], LIMIT)
    assert stats["ptx_loss"] == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(mixed, alone + 0.7 * gradient(models.policy), atol=1e-6)


def test_entropy_bonus_raises_entropy_and_its_target_turns_the_sign(models, rollout):
    experience = experience_of(rollout, models)
    _, plain = policy_gradient(models, experience, BASE)
    bonus = BASE.model_copy(update={"entropy_coef": 0.1})
    stats, with_bonus = policy_gradient(models, experience, bonus)
    _, above = policy_gradient(models, experience, bonus.model_copy(update={"entropy_target": stats["entropy"] - 0.1}))
    _, below = policy_gradient(models, experience, bonus.model_copy(update={"entropy_target": stats["entropy"] + 0.1}))
    assert torch.allclose(below, with_bonus, atol=1e-7)
    assert torch.allclose(above - plain, -(with_bonus - plain), atol=1e-6)
    assert not torch.allclose(with_bonus, plain, atol=1e-4)


def test_advantages_are_whitened_per_minibatch_then_clipped(models, rollout):
    experience = take(experience_of(rollout, models), torch.tensor([0, 2, 5]))
    kept = experience.advantages[experience.rollout.response_mask]
    whitened = (experience.advantages - kept.mean()) / kept.std(correction=0)
    assert (whitened[experience.rollout.response_mask].abs() > 0.5).any()
    by_hand = replace(experience, advantages=whitened.clamp(-0.5, 0.5))
    plain = BASE.model_copy(update={"advantage_norm": False, "advantage_clip": None})
    expected, expected_gradient = policy_gradient(models, by_hand, plain)
    config = BASE.model_copy(update={"advantage_norm": True, "advantage_clip": 0.5})
    stats, found = policy_gradient(models, experience, config)
    assert stats == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert torch.allclose(found, expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tokens_per_microbatch", [16, 40, 4096])
def test_losses_and_gradients_do_not_depend_on_the_microbatch(models, rollout, tokens_per_microbatch):
    experience = experience_of(rollout, models)
    expected, expected_gradient = policy_gradient(models, experience, BASE)
    weights = rollout.response_mask.float() / rollout.response_mask.sum()
    settings = UpdateSettings(BASE, RunConfig().optim, tokens_per_microbatch)
    sums = ppo_update._policy_gradients(
        models.policy, experience, rollout.response_mask, weights, (), settings, Ratios()
    )
    stats = dict(zip(ppo_update.POLICY_SUMS, sums.tolist(), strict=True))
    assert stats == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert torch.allclose(gradient(models.policy), expected_gradient, atol=1e-6)


def test_update_moves_policy_and_critic_and_counts_steps(models, rollout):
    experience = experience_of(rollout, models)
    before = [token_values(models.critic, rollout, tokens_per_microbatch=LIMIT), models.policy.stage]
    weights = [p.detach().clone() for p in models.policy.stage.parameters()]
    counter = StepCounter(0, 10, 0)
    config = BASE.model_copy(update={"epochs": 2})
    stats = update(models.policy, models.critic, experience, None, settings_for(config), counter, torch.Generator())
    assert counter.step == 4
    assert stats["optimizer_steps"] == 4
    assert all(math.isfinite(value) for value in stats.values())
    assert any(not torch.equal(a, b) for a, b in zip(weights, models.policy.stage.parameters(), strict=True))
    assert not torch.equal(before[0], token_values(models.critic, rollout, tokens_per_microbatch=LIMIT))


def test_critic_pretraining_leaves_the_policy_alone(models, rollout):
    experience = experience_of(rollout, models)
    weights = [p.detach().clone() for p in models.policy.stage.parameters()]
    update(None, models.critic, experience, None, settings_for(BASE), StepCounter(0, 10, 0), torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(weights, models.policy.stage.parameters(), strict=True))


def test_target_kl_ends_the_epochs_before_the_step(models, rollout):
    experience = experience_of(rollout, models)
    far = replace(experience, old_logprobs=experience.old_logprobs - 1.0 * rollout.response_mask)
    counter = StepCounter(0, 10, 0)
    config = BASE.model_copy(update={"target_kl": 0.01, "epochs": 3})
    stats = update(models.policy, models.critic, far, None, settings_for(config), counter, torch.Generator())
    assert counter.step == 0
    assert (stats["optimizer_steps"], stats["skipped_steps"], stats["ratio_p99"]) == (0, 0, pytest.approx(math.e))


def test_target_kl_is_about_the_policy_that_sampled_under_importance_sampling_too(models, rollout):
    config = BASE.model_copy(update={"target_kl": 1e-3, "importance_sampling": True})
    experience = experience_of(rollout, models, config)
    assert float((experience.logprobs - experience.old_logprobs).abs().mean()) > 0.1  # the reference is far away
    stats, _ = policy_gradient(models, experience, config)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    counter = StepCounter(0, 10, 0)
    update(models.policy, models.critic, experience, None, settings_for(config), counter, torch.Generator())
    assert counter.step > 0


def test_metrics_are_means_over_the_applied_steps(models, rollout):
    experience = experience_of(rollout, models)
    broken = experience.old_logprobs.clone()
    broken[0] = float("nan")  # the step whose minibatch has the first response is skipped
    counter = StepCounter(0, 10, 1)
    half_broken = replace(experience, old_logprobs=broken)
    stats = update(models.policy, models.critic, half_broken, None, settings_for(BASE), counter, torch.Generator())
    assert (stats["optimizer_steps"], stats["skipped_steps"]) == (1, 1)
    assert all(math.isfinite(value) for name, value in stats.items() if name not in RATIO_METRICS)  # of all steps


def test_a_minibatch_without_kept_tokens_changes_nothing_but_the_count(models, rollout):
    nothing = replace(rollout, finished=torch.zeros(6, dtype=torch.bool))
    experience = experience_of(nothing, models)
    config = BASE.model_copy(update={"mask_no_eos": True})
    stats, grads = policy_gradient(models, experience, config)
    assert stats["policy_loss"] == 0
    assert not grads.any()


def test_a_loss_that_is_not_finite_never_reaches_the_weights(models, rollout):
    experience = experience_of(rollout, models)
    broken = replace(experience, old_logprobs=experience.old_logprobs * float("nan"))
    weights = [p.detach().clone() for p in models.policy.stage.parameters()]
    counter = StepCounter(0, 10, 1, last_good=lambda: "runs/x/checkpoints/step_00000007")
    with pytest.raises(DivergedError, match=r"optimizer step 2: policy_\w+ is nan .*step_00000007"):
        update(models.policy, models.critic, broken, None, settings_for(BASE), counter, torch.Generator())
    assert all(torch.equal(a, b) for a, b in zip(weights, models.policy.stage.parameters(), strict=True))


def test_summary_reports_the_mean_k1_kl_and_the_true_perplexity(models, rollout):
    experience = experience_of(rollout, models)
    metrics = rollout_statistics(experience).metrics
    mask = rollout.response_mask
    assert metrics["kl"] == pytest.approx((experience.logprobs - experience.ref_logprobs)[mask].mean().item(), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(-experience.logprobs[mask].mean().item()), rel=1e-5)
    assert metrics["sampler_mismatch_max"] < 5e-5
    assert metrics["sampler_mismatch_mean"] < 2e-6


def test_ratio_tails_are_those_of_all_tokens_of_all_minibatches(models, rollout):
    """One minibatch, one step: the weights that the ratios are of are still those of the rollout."""
    experience = experience_of(rollout, models)
    mask = rollout.response_mask
    shift = torch.linspace(-1, 2, mask.numel()).view_as(mask) * mask
    shifted = replace(experience, old_logprobs=experience.logprobs - shift)
    config = BASE.model_copy(update={"minibatch_size": 6})
    stats = update(
        models.policy, models.critic, shifted, None, settings_for(config), StepCounter(0, 9, 0), torch.Generator()
    )
    ratio = shift[mask].double().exp()
    assert stats["ratio_min"] == pytest.approx(float(ratio.min()), rel=1e-4)
    assert stats["ratio_max"] == pytest.approx(float(ratio.max()), rel=1e-4)
    assert stats["ratio_p99"] == pytest.approx(float(shift[mask].quantile(0.99).exp()), rel=1e-4)
    fraction = float(ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()))
    assert stats["effective_sample_fraction"] == pytest.approx(fraction, rel=1e-4)
    assert math.hypot(stats["grad_norm_policy"], stats["grad_norm_critic"]) == pytest.approx(stats["grad_norm"])


def test_a_score_that_is_not_finite_stays_out_of_the_moments():
    scores = torch.tensor([1.0, 2.0, 4.0])
    spoiled = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 4.0])
    assert RewardScaler().update(spoiled) == RewardScaler().update(scores)
    assert RewardScaler().update(torch.tensor([float("nan")])) == RewardScaler()


def test_the_samplers_own_logprobs_are_compared_in_the_first_step(models, rollout):
    config = BASE.model_copy(update={"old_logprobs": "rollout"})
    experience = experience_of(rollout, models, config)
    assert "sampler_mismatch_max" not in rollout_statistics(experience).metrics
    counter = StepCounter(0, 10, 0)
    stats = update(models.policy, models.critic, experience, None, settings_for(config), counter, torch.Generator())
    assert 0 <= stats["first_step_kl"] < 1e-8


def off_by(rollout, difference):
    """The rollout of a sampler whose log-probs lie `difference` [B, T] below the trainer's."""
    return replace(rollout, sampling_logprobs=(rollout.sampling_logprobs - difference) * rollout.response_mask)


def test_summary_measures_how_far_sampler_and_trainer_are_apart(models, rollout):
    mask = rollout.response_mask
    difference = torch.zeros(mask.shape)
    columns = mask[0].nonzero().squeeze(1)
    difference[0, columns[0]], difference[0, columns[1]] = math.log(3), -0.5
    metrics = rollout_statistics(experience_of(off_by(rollout, difference), models)).metrics
    num_tokens = int(mask.sum())
    assert metrics["sampler_mismatch_mean"] == pytest.approx((math.log(3) + 0.5) / num_tokens, abs=1e-5)
    assert metrics["sampler_mismatch_max"] == pytest.approx(math.log(3), abs=1e-4)
    k3 = (3 - 1 - math.log(3)) + (math.exp(-0.5) - 1 + 0.5)
    assert metrics["sampler_mismatch_k3"] == pytest.approx(k3 / num_tokens, abs=1e-5)
    assert metrics["sampler_ratio_outside"] == pytest.approx(1 / num_tokens)
    assert metrics["token_mult_prob_error"] == pytest.approx(math.exp((math.log(3) + 0.5) / num_tokens), abs=1e-5)


TRUNCATED = BASE.model_copy(update={"rollout_correction": "truncated", "rollout_correction_cap": 1.5})


def test_the_rollout_correction_is_nothing_where_sampler_and_trainer_agree(models, rollout):
    experience = experience_of(rollout, models)
    experience = replace(experience, rollout=replace(rollout, sampling_logprobs=experience.logprobs))
    assert torch.equal(sampler_weights(experience, TRUNCATED), torch.ones(rollout.response_mask.shape))
    _, plain = policy_gradient(models, experience, BASE)
    _, corrected = policy_gradient(models, experience, TRUNCATED)
    assert torch.equal(plain, corrected)


def test_the_rollout_correction_weighs_each_token_by_its_ratio_up_to_the_cap(models, rollout):
    """The gradient is that of advantages times the weights: before the first step no ratio is clipped."""
    difference = torch.linspace(-1, 1, rollout.response_mask.numel()).view(rollout.response_mask.shape)
    experience = experience_of(off_by(rollout, difference), models, TRUNCATED)
    weights = difference.exp().clamp_max(1.5)
    assert 0 < (weights == 1.5).sum() < weights.numel()
    mask = rollout.response_mask
    torch.testing.assert_close(sampler_weights(experience, TRUNCATED)[mask], weights[mask], rtol=1e-4, atol=0)
    _, corrected = policy_gradient(models, experience, TRUNCATED)
    weighted = replace(experience, advantages=experience.advantages * weights)
    _, expected = policy_gradient(models, weighted, BASE)
    torch.testing.assert_close(corrected, expected, rtol=1e-3, atol=1e-6)
    assert (corrected - policy_gradient(models, experience, BASE)[1]).abs().max() > 1e-3


def test_the_rollout_correction_leaves_rewards_and_kl_alone(models, rollout):
    difference = torch.full(rollout.response_mask.shape, 0.7)
    plain, corrected = (experience_of(off_by(rollout, difference), models, config) for config in (BASE, TRUNCATED))
    for name in ("kl", "token_rewards", "advantages", "returns"):
        assert torch.equal(getattr(plain, name), getattr(corrected, name))
    assert sampler_weights(plain, BASE) is None


def test_the_rollout_correction_needs_the_trainers_own_logprobs():
    with pytest.raises(ValueError, match="nothing to compare the sampler with"):
        PpoConfig(preset="none", rollout_correction="truncated", old_logprobs="rollout")
