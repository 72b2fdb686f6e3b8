"""The planner's arithmetic: phases, cache, faults and advice, times and volumes, search."""

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.errors import ConfigError, DoesNotFitError
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.plan.activations import LOGITS_BYTES, chunks_in_flight, logits_bytes
from ppomax.engine.plan.advice import proposals, with_values
from ppomax.engine.plan.gpus import COMPUTE_EFFICIENCY, GPUS, find_gpu
from ppomax.engine.plan.memory import GIB, Bytes
from ppomax.engine.plan.models import MODELS, known_model
from ppomax.engine.plan.moments import OFFLOADED, held, moments
from ppomax.engine.plan.plan import CACHE_SHARE, Plan, check_fits, make_plan
from ppomax.engine.plan.search import search
from ppomax.engine.plan.timing import forward_flops, scoring_cost, update_cost
from ppomax.engine.plan.weights import Parameter, buffer_numel
from ppomax.engine.plan.workload import make_workload, microbatches

CONFIG = str(Path(__file__).parents[2] / "examples/configs/ppo_max_llama7b.toml")
H100 = GPUS["h100"]


def planned(*overrides: str, gpus: int = 8, command: str = "ppo", **options: Any) -> Plan:
    config = load_config(CONFIG, overrides, command=command, for_planning=True)
    return make_plan(config, command, gpus, gpu=H100, **options)


def test_planning_imports_no_torch() -> None:
    code = "import sys, ppomax.tools.plan; print([m for m in ('torch', 'megatron', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_constants_are_those_of_the_engine() -> None:
    from ppomax.engine.rollout import generate
    from ppomax.kernels import linear

    assert LOGITS_BYTES == linear.CHUNK_BYTES
    assert CACHE_SHARE == generate.CACHE_SHARE


def test_a_buffer_is_padded_by_hand_as_here() -> None:
    # From the last: 10 at 0, 70 at 64, 3 at 192: 195, up to 256; with dp 3 up to lcm(3, 128) = 384.
    parameters = [Parameter(3), Parameter(70), Parameter(10)]
    assert buffer_numel(parameters, 1) == 256
    assert buffer_numel(parameters, 3) == 384
    # A shared embedding ends the bucket before it: 10 and 70 end at 134, up to 256; 3 more, up to 384.
    assert buffer_numel([Parameter(3, is_shared=True), *parameters[1:]], 1) == 384


def test_a_7b_policy_has_18_bytes_a_parameter_at_dp_1_and_6_and_12_over_dp_beyond() -> None:
    for gpus, per_parameter in ((8, 18), (32, 6 + 12 / 4)):
        state = planned(gpus=gpus).ranks[0].roles[0].resident
        assert state.total / 842_399_744 == pytest.approx(per_parameter, rel=1e-5)


def test_phases_add_the_working_role_to_what_stays() -> None:
    rank = planned().worst
    policy, critic, reference, reward = rank.roles
    resident = sum((role.resident for role in rank.roles), Bytes())
    assert rank.peak("update").total == resident.total + policy.extra["update"].total
    assert rank.peak("rollout").kv_cache == policy.extra["rollout"].kv_cache > 0
    assert rank.peak("scoring").gradients == policy.resident.gradients + critic.resident.gradients
    # While the policy is loaded the others are not there yet.
    loading = (policy.resident + policy.extra["load"]).total
    assert loading < rank.peak("load").total <= resident.total + reward.extra["load"].total
    assert set(reference.extra) == {"load", "scoring"}


def test_the_cache_is_that_of_the_generator() -> None:
    plan = planned()
    # 64 pages of 32 tokens for each of 128 responses of 2048 tokens; 16 layers, 8 heads of 128, keys and values.
    assert plan.cache_pages == 128 * 64
    assert plan.worst.peak("rollout").kv_cache == 128 * 64 * 32 * 16 * 8 * 128 * 2 * 2
    assert planned("sampling.cache_gib=4").worst.peak("rollout").kv_cache == 4 * GIB
    small = planned(capacity=34 * GIB)
    assert small.cache_pages is not None
    free = 34 * GIB - sum(memory.resident.total for memory in small.ranks[0].roles)
    page = 32 * 16 * 8 * 128 * 2 * 2
    assert 0 <= CACHE_SHARE * free - small.cache_pages * page < page


def test_a_cache_without_room_for_the_longest_request_does_not_fit() -> None:
    plan = planned("sampling.cache_gib=0.1")
    (fault,) = plan.faults
    assert "room for 51 pages of 32 tokens" in fault
    assert "needs 128" in fault  # two flights of 64 pages
    assert plan.worst.total < H100.memory


def test_vllm_brings_a_copy_of_the_weights_to_a_rollout() -> None:
    embedded, vllm = (
        planned(f"sampling.backend={backend}").ranks[0].peak("rollout").weights for backend in ("embedded", "vllm")
    )
    assert vllm - embedded == 2 * 6_738_415_616 // 8


def test_a_rollout_has_room_for_evaluations_and_over_sampling() -> None:
    few = ["ppo.rollout_size=32", "monitor.eval_size=8", "sampling.batch_size=64"]
    pages = [
        planned(*few, more).cache_pages
        for more in ("train.seed=1", "monitor.eval_size=48", "ppo.over_sampling_size=40")
    ]
    assert pages == [32 * 64, 48 * 64, 40 * 64]


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_what_is_offloaded_is_on_the_device_when_a_run_has_it_there(offload: str) -> None:
    """By the table of tests/dist/test_offload.py, which whole runs are held to."""
    path = Path(__file__).parents[1] / "dist/test_offload.py"
    spec = importlib.util.spec_from_file_location("_by_path_test_offload", path)
    assert spec is not None
    assert spec.loader is not None
    of_runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(of_runs)
    rank = planned(f"parallel.offload={offload}").worst
    phases = {}
    for moment in moments(rank.roles):
        if moment.phase != "checkpoint":
            is_step = moment.phase == "update" and moment.extra == Bytes()
            work = {"rollout": "rollout", "scoring": f"forward {moment.role}", "update": f"backward {moment.role}"}
            here = {
                f"{memory.role.name} {kind}"
                for memory in rank.roles
                for kind, size in vars(held(memory, moment.needs.get(memory.role.name, ()))).items()
                if size > 0
            }
            phases[f"step {moment.role}" if is_step else work[moment.phase]] = here
    assert phases == of_runs.PHASES[offload]


def test_the_kinds_that_offload_names_are_those_of_the_engine() -> None:
    from ppomax.engine.models import offload

    assert OFFLOADED == offload.MOVED


def test_offload_lowers_the_peak_and_costs_transfers() -> None:
    plans = [planned(f"parallel.offload={what}") for what in ("none", "optimizer", "all")]
    peaks = [plan.worst.total for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert plans[0].seconds < plans[1].seconds < plans[2].seconds
    state = 12 * 6_738_415_616 / 8
    assert plans[1].costs["policy", "offload"].host == pytest.approx(4 * 2 * state)
    # Weights come for sampling, scoring and the update, and go back once.
    assert plans[2].costs["policy", "offload"].host == pytest.approx(4 * 2 * state + 4 * 2 * 6_738_415_616 / 8)
    assert plans[2].costs["reward", "offload"].host == pytest.approx(2 * 6_607_347_712 / 8)


def test_fewer_layers_where_the_head_is_shorten_the_slowest_stage() -> None:
    shape = replace(MODELS["llama-7b"], vocab_size=128_000, num_layers=31)
    words = ["parallel.tp=1", "parallel.pp=4"]
    even = planned(*words, gpus=4, model=replace(shape, num_layers=32))
    uneven = planned(*words, "parallel.last_stage_layers=7", gpus=4, model=shape)
    assert uneven.costs["reference", "scoring"].seconds < even.costs["reference", "scoring"].seconds
    assert uneven.ranks[0].roles[0].resident == even.ranks[0].roles[0].resident
    assert uneven.ranks[3].roles[0].resident.total < even.ranks[3].roles[0].resident.total


def test_tied_embeddings_and_uneven_stages_are_planned_rank_by_rank() -> None:
    shape = replace(MODELS["llama-7b"], tie_embeddings=True)
    plan = planned("parallel.tp=1", "parallel.pp=4", gpus=4, model=shape)
    first, second, third, last = (rank.roles[0].resident.weights for rank in plan.ranks)
    assert second == third < first < last  # both ends have the embedding, the last one the final norm too


def test_mixed_layouts_meet_on_the_fullest_rank() -> None:
    plan = planned(
        "parallel.policy.pp=4", "parallel.policy.tp=1", "parallel.critic.pp=2", "parallel.reward.tp=1", gpus=16
    )
    # Policy stages of one rank each, critic stages of four: after 8 ranks both begin anew.
    assert [len(plan.ranks), len(plan.place)] == [8, 16]
    assert plan.rank(3) == plan.rank(11) != plan.rank(7)
    assert plan.worst.total == max(
        max(rank.peak(phase).total for phase in rank.phases) for rank in (plan.rank(r) for r in range(16))
    )


@pytest.mark.parametrize(
    ("command", "roles"),
    [
        ("sft", {"policy": True}),
        ("reward", {"reward": True}),
        ("critic", {"policy": False, "reward": False, "critic": True}),
        ("ppo", {"policy": True, "critic": True, "reference": False, "reward": False}),
        ("evaluate", {"policy": False, "reference": False, "reward": False}),
    ],
)
def test_each_stage_plans_its_own_roles(command: str, roles: dict[str, bool]) -> None:
    plan = planned(command=command)
    assert {role.name: role.trained for role in plan.roles} == roles
    assert ("rollout" in plan.worst.phases) == (command in ("critic", "ppo", "evaluate"))
    assert ("update" in plan.worst.phases) == (command != "evaluate")


def test_the_reward_stage_plans_both_heads() -> None:
    (both,) = planned(command="reward").roles
    assert both.extra_scalar_head
    assert not both.shape.scalar
    (scalar,) = planned("reward.lm_coef=0", command="reward").roles
    assert scalar.shape.scalar


def test_in_flight_by_hand() -> None:
    pp4 = ParallelLayout(tp=1, pp=4, dp=1)
    assert [chunks_in_flight(pp4, rank, 8) for rank in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(pp4, rank, 2) for rank in range(4)] == [2, 2, 2, 1]
    assert [chunks_in_flight(replace(pp4, vpp=2), rank, 8) for rank in range(4)] == [11, 9, 7, 5]


def test_logits_are_those_of_one_chunk() -> None:
    shape = MODELS["llama-7b"]
    chunk = 2**31 // (4 * 32000) // 128 * 128
    assert logits_bytes(shape, 1, rows=10**6, device="cuda", backward=False) == chunk * 32000 * 4
    assert logits_bytes(shape, 1, rows=100, device="cuda", backward=False) == 100 * 32000 * 4
    assert logits_bytes(replace(shape, scalar=True), 1, rows=100, device="cuda", backward=True) == 0


def test_packs_are_those_that_sequences_are_dealt_into() -> None:
    from ppomax.engine.data.batches import balance

    layout = ParallelLayout(tp=1, pp=2, dp=3, vpp=2)
    for sequences, length, limit in ((32, 100, 350), (7, 100, 50), (2, 100, 1000)):
        packs = microbatches(layout, sequences, length, limit)
        dealt = balance([length] * sequences, 3, limit, multiple_of=2)
        assert packs.number == len(dealt[0])
        assert packs.tokens >= max(len(pack) * length for replica in dealt for pack in replica)


def test_no_recomputation_keeps_most_and_full_keeps_least() -> None:
    kept = [planned(f"model.recompute={how}").worst.peak("update").activations for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > 5 * kept[2]


def test_operations_agree_with_20_a_parameter_and_token() -> None:
    """Four forward passes (2 N each) and two trainings (6 N): the roofline of docs' peers."""
    plan = planned("model.recompute=none", "parallel.tp=1", "parallel.pp=1", gpus=1, response=512)
    speed = H100.flops * COMPUTE_EFFICIENCY
    policy, critic, reference, reward = plan.roles
    work = replace(plan.workload, ptx=0)
    seconds = sum(scoring_cost(role, plan.config, work, H100).seconds for role in plan.roles)
    steps = sum(update_cost(role, plan.config, work, H100).seconds for role in (policy, critic))
    optimizer = 2 * work.steps * 6.7e9 * 38 / (H100.bandwidth * 0.8)
    per_token = (seconds + steps - optimizer) * speed / (work.sequences * work.mean)
    assert per_token / 6.6e9 == pytest.approx(20, rel=0.06)
    assert forward_flops(reference.shape, 0) / 2 == pytest.approx(reward.shape.num_parameters(), rel=0.025)


def test_volumes_by_hand() -> None:
    none = planned("parallel.tp=1", "parallel.pp=1", gpus=1).costs["critic", "update"]
    assert (none.tp, none.pp, none.dp) == (0, 0, 0)
    dp = planned("parallel.tp=1", "parallel.pp=1", gpus=4).costs["critic", "update"].dp
    # Four steps: fp32 gradients out, bf16 weights back, three quarters of them each.
    assert dp == pytest.approx(4 * 6 * 6_607_347_712 * 3 / 4)
    tp = planned("parallel.tp=2", "parallel.pp=1", gpus=2).costs["reference", "scoring"].tp
    # Two sums a layer of [tokens, 4096] in bf16; a ring of two sends each once.
    assert tp == pytest.approx(2 * 32 * 128 * 1024 * 4096 * 2)
    pp = planned("parallel.tp=1", "parallel.pp=2", gpus=2).costs["reference", "scoring"].pp
    assert pp == pytest.approx(128 * 1024 * 4096 * 2)


def test_full_recomputation_costs_one_more_forward_pass() -> None:
    none, full = (
        planned(f"model.recompute={how}", "parallel.tp=1", "parallel.pp=1", gpus=1).costs["critic", "update"].seconds
        for how in ("none", "full")
    )
    assert 1.25 < full / none < 4 / 3


def test_the_bubble_is_pp_minus_1_micro_batches_and_vpp_divides_it() -> None:
    def seconds(*overrides: str) -> float:
        return planned("parallel.tp=1", *overrides, gpus=8).costs["reward", "scoring"].seconds

    work = make_workload(planned().config, "ppo")
    packs = microbatches(ParallelLayout(tp=1, pp=8, dp=1), work.sequences, work.mean, 16384)
    assert packs.number == 8
    plain, interleaved = seconds("parallel.pp=8"), seconds("parallel.pp=8", "parallel.reward.vpp=4")
    assert interleaved < plain
    assert interleaved / plain == pytest.approx((8 + 7 / 4) / (8 + 7), rel=0.05)


def test_replicas_scale_nearly_and_never_beyond_linearly() -> None:
    def weak(gpus: int) -> float:
        return planned(f"ppo.rollout_size={16 * gpus}", f"ppo.minibatch_size={4 * gpus}", gpus=gpus).tokens_per_second

    rates = [weak(gpus) for gpus in (8, 16, 64, 512, 4096)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0.5 * rates[0]
    strong = [planned(gpus=gpus).seconds for gpus in (8, 16, 32)]
    assert strong[0] > strong[1] > strong[2] > strong[0] / 4


def test_what_does_not_fit_says_so_and_every_proposal_fits() -> None:
    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=H100, model=MODELS["llama-70b"])

    plan = planned(gpus=64, model=MODELS["llama-70b"])
    with pytest.raises(DoesNotFitError, match=r"rank 0 needs 199.* GiB in update, .* more than the 74.5 GiB"):
        check_fits(plan)
    texts = proposals(plan, replan, largest_tp=8)
    assert texts
    for text in texts:
        arguments = text.partition(":")[0].split(" on ")[0].split()
        config = load_config(CONFIG, arguments, command="ppo", for_planning=True)
        check_fits(replan(config, 64))


def test_a_configuration_is_changed_at_any_depth() -> None:
    config = with_values(RunConfig(), {"parallel.critic.tp": 4, "model.recompute": "full"})
    assert (config.parallel.critic.tp, config.parallel.policy.tp, config.model.recompute) == (4, 1, "full")


def test_the_search_finds_layouts_that_fit_and_beat_the_one_given() -> None:
    plan = planned(gpus=16)

    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=H100)

    found = search(plan, H100, replan)
    assert len(found) == 5
    seconds = [one.plan.seconds for one in found]
    assert all(later > 0.97 * earlier for earlier, later in itertools.pairwise(seconds))
    assert found[0].plan.seconds < plan.seconds
    for one in found:
        assert one.plan.faults == []
        assert all(role.layout.tp <= H100.per_node for role in one.plan.roles)
        config = load_config(CONFIG, one.overrides(), command="ppo", for_planning=True)
        assert replan(config, 16).seconds == one.plan.seconds


SPLIT = tuple(f"parallel.{role}.num_ranks=8" for role in ("policy", "reference")) + tuple(
    f"parallel.{role}.first_rank=8" for role in ("critic", "reward")
)


@pytest.mark.parametrize(("placed", "of_roles"), [((), sum), (SPLIT, max)], ids=["turns", "at_once"])
def test_roles_on_ranks_of_their_own_work_at_the_same_time(
    placed: tuple[str, ...], of_roles: Callable[[Iterable[float]], float]
) -> None:
    plan = planned("parallel.pp=1", "parallel.tp=4", *placed, gpus=16)
    seconds = {cost: value.seconds for cost, value in plan.costs.items()}
    pairs = (("policy", "reference"), ("critic", "reward"))
    scoring = [sum(seconds.get((role, "scoring"), 0) for role in pair) for pair in pairs]
    update = [seconds[pair[0], "update"] for pair in pairs]
    assert min(scoring + update) > 0
    assert plan.seconds == pytest.approx(seconds["policy", "rollout"] + of_roles(scoring) + of_roles(update))


@pytest.mark.slow
def test_the_search_splits_the_roles_of_a_large_cluster_where_that_is_faster() -> None:
    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=H100)

    plan = planned("parallel.tp=4", gpus=64)
    found = search(plan, H100, replan)[0]
    policy, critic = (
        next(role.layout for role in found.plan.roles if role.name == name) for name in ("policy", "critic")
    )
    assert policy.ranks.stop == critic.ranks.start
    assert critic.ranks.stop == 64
    assert found.plan.faults == []
    config = load_config(CONFIG, found.overrides(), command="ppo", for_planning=True)
    assert replan(config, 64).seconds == found.plan.seconds
    # From a split plan: what it places is taken back where a found layout does not.
    for one in search(planned(*SPLIT, gpus=16), H100, replan):
        config = load_config(CONFIG, [*SPLIT, *one.overrides()], command="ppo", for_planning=True)
        assert replan(config, 16).seconds == one.plan.seconds


def test_no_layout_of_70b_fits_one_node_of_40_gb() -> None:
    gpu = GPUS["a100-40g"]
    plan = make_plan(planned().config, "ppo", 8, gpu=gpu, model=MODELS["llama-70b"])

    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=gpu, model=MODELS["llama-70b"])

    assert search(plan, gpu, replan) == []


@pytest.mark.slow
def test_the_search_offloads_where_nothing_fits_without() -> None:
    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=small)

    small = replace(GPUS["a100-40g"], memory=33e9)
    plan = make_plan(planned().config, "ppo", 8, gpu=small)
    found = search(plan, small, replan)
    assert found
    for one in found:
        assert {role.offload for role in one.plan.roles} == {"all"}
        config = load_config(CONFIG, one.overrides(), command="ppo", for_planning=True)
        assert replan(config, 8).worst.total == one.plan.worst.total <= 33e9


@pytest.mark.slow
def test_split_layouts_that_do_not_fit_keep_no_colocated_one_from_being_found() -> None:
    def replan(config: RunConfig, world_size: int) -> Plan:
        return make_plan(config, "ppo", world_size, gpu=H100, model=MODELS["llama-70b"])

    (found,) = search(make_plan(planned().config, "ppo", 32, gpu=H100, model=MODELS["llama-70b"]), H100, replan, most=1)
    assert {(role.offload, role.layout.num_ranks) for role in found.plan.roles} == {("all", 32)}


def test_the_search_drops_layouts_whose_cache_is_too_small() -> None:
    plan = planned("sampling.cache_gib=0.001")
    assert search(plan, H100, lambda config, world_size: make_plan(config, "ppo", world_size, gpu=H100)) == []


@pytest.mark.parametrize(
    ("given", "meant"), [("h10", "h100"), ("H200", None), ("a100-80", "a100-80g"), ("l40", "l40s")]
)
def test_a_gpu_is_found_in_any_case_or_the_nearest_named(given: str, meant: str | None) -> None:
    if meant is None:
        assert find_gpu(given) is GPUS[given.lower()]
        return
    with pytest.raises(ConfigError, match=f"did you mean {meant}"):
        find_gpu(given)


def test_measured_rates_stand_for_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    rates = replace(H100, name="measured", flops=H100.flops / 2, layer_seconds=3e-3)
    path.write_text(json.dumps(asdict(rates)))
    assert find_gpu(str(path)) == rates
    config = planned().config
    assert make_plan(config, "ppo", 8, gpu=rates).seconds > make_plan(config, "ppo", 8, gpu=H100).seconds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flops": "fast"}, "flops is 'fast'; expected a positive number"),
        ({"link": 0}, "link is 0; expected a positive number"),
        ({"host": float("nan")}, "host is nan; expected a positive number"),
        ({"per_node": 2.5}, "per_node is 2.5; expected a whole number"),
        ({"flop": 1}, "exactly"),
    ],
)
def test_rates_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(asdict(H100) | change))
    with pytest.raises(ConfigError, match=message):
        find_gpu(str(path))


def test_a_file_of_rates_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text("[1")
    for name in ("rates.json", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            find_gpu(str(tmp_path / name))


def test_published_sizes_add_up_to_the_names() -> None:
    sizes = {name: shape.num_parameters() for name, shape in MODELS.items()}
    assert sizes == {"llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-70b": 68_976_648_192}
    with pytest.raises(ConfigError, match="did you mean llama-7b"):
        known_model("llama-7")


def test_the_committed_report_is_what_the_planner_says_now() -> None:
    from ppomax.tools.plan_report import kinds, scaling

    committed = (Path(__file__).parents[2] / "docs/planning/tables.md").read_text()
    for part in (kinds, scaling):
        assert part() in committed, "run `python -m ppomax.tools.plan_report` from the root of the repository"
