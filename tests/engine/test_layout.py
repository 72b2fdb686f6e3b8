"""Layout arithmetic: products, coordinates and the messages of layouts that cannot be."""

import itertools

import pytest

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import ArchitectureConfig, ParallelConfig, RoleLayout
from ppomax.engine.errors import ConfigError
from ppomax.engine.models.shape import check_split, layers_per_stage, shape_from_init, stage_of_layer
from ppomax.engine.parallel.layout import ParallelLayout, check_layout, make_layout


def test_replicas_are_what_tp_and_pp_leave():
    assert make_layout("policy", RoleLayout(tp=4, pp=2), 32) == ParallelLayout(tp=4, pp=2, dp=4)


def test_model_chunks_take_no_ranks():
    assert make_layout("policy", RoleLayout(pp=2, vpp=3), 4) == ParallelLayout(tp=1, pp=2, dp=2, vpp=3)


def test_coordinates_run_through_tp_then_pp_then_dp():
    layout = ParallelLayout(tp=2, pp=3, dp=2)
    in_rank_order = [(tp, pp, dp) for dp, pp, tp in itertools.product(range(2), range(3), range(2))]
    assert [layout.coordinates(rank) for rank in range(layout.num_ranks)] == in_rank_order


def test_coordinates_refuse_a_rank_outside_the_role():
    with pytest.raises(ValueError, match="rank 4 is outside the 4 ranks"):
        ParallelLayout(tp=2, pp=2, dp=1).coordinates(4)


def test_a_role_takes_the_ranks_that_it_is_given():
    layout = make_layout("critic", RoleLayout(tp=2, first_rank=4, num_ranks=4), 12)
    assert layout == ParallelLayout(tp=2, pp=1, dp=2, first_rank=4)
    assert list(layout.ranks) == [4, 5, 6, 7]
    assert [layout.coordinates(rank) for rank in layout.ranks] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert list(make_layout("critic", RoleLayout(first_rank=3), 5).ranks) == [3, 4]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"first_rank": 4}, "ranks from 4 on, but this run has 4 ranks, 0 to 3; lower first_rank"),
        ({"first_rank": 2, "num_ranks": 3}, "ranks 2 to 4, but this run has 4 ranks"),
        ({"num_ranks": 3, "tp": 2}, "does not divide the 3 ranks of the role; .* one of 1, 3, or set num_ranks"),
        ({"first_rank": 1, "pp": 2}, "does not divide the 3 ranks of the role; .* or start a multiple of 2 ranks"),
    ],
)
def test_ranks_that_a_role_cannot_have_are_refused(layout: dict[str, int], message: str):
    with pytest.raises(ConfigError, match=message):
        make_layout("critic", RoleLayout.model_validate(layout), 4)


def test_check_layout_refuses_ranks_that_no_role_of_the_command_uses():
    config = RunConfig(parallel=ParallelConfig(policy=RoleLayout(num_ranks=2), critic=RoleLayout(first_rank=2)))
    check_layout(config, 4, ("policy", "critic"))
    with pytest.raises(ConfigError, match="ranks 2, 3 of 4 would have nothing to do: this command runs policy"):
        check_layout(config, 4, ("policy",))


def test_error_spells_the_product_out_and_says_what_would_fit():
    with pytest.raises(ConfigError) as caught:
        make_layout("policy", RoleLayout(tp=3, pp=2), 4)
    assert "parallel.policy: tp 3 * pp 2 = 6 does not divide the 4 ranks" in str(caught.value)
    assert "one of 1, 2, 4," in str(caught.value)


def test_check_layout_lists_every_role_that_does_not_fit():
    config = RunConfig(
        parallel=ParallelConfig(critic=RoleLayout(tp=3), reference=RoleLayout(tp=3), reward=RoleLayout(pp=5))
    )
    with pytest.raises(ConfigError) as caught:
        check_layout(config, 2)
    named = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert named == ["parallel.critic, reference", "parallel.reward"]


def test_check_layout_accepts_roles_with_different_replica_counts():
    check_layout(RunConfig(parallel=ParallelConfig(policy=RoleLayout(tp=2, pp=2), critic=RoleLayout(tp=2))), 4)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 1, "pp": 5, "vpp": 1}, "12 layers are not divisible by pp 5; choose a pp"),
        ({"tp": 1, "pp": 3, "vpp": 3}, r"12 layers cannot be split into pp 3 \* vpp 3 = 9 chunks: choose a vpp that "),
        (
            {"tp": 1, "pp": 3, "vpp": 2, "first_stage_layers": 6},
            r"pp 3 \* vpp 2 = 6 chunks: .* divides the 3 layers of",
        ),
        (
            {"tp": 1, "pp": 2, "vpp": 1, "first_stage_layers": 5, "last_stage_layers": 5},
            "2 are left for 0 other stages",
        ),
        ({"tp": 1, "pp": 4, "vpp": 1, "last_stage_layers": 2}, "10 are left for 3 other stages"),
        ({"tp": 1, "pp": 4, "vpp": 1, "first_stage_layers": 11}, "1 are left for 3 other stages"),
    ],
)
def test_layers_that_stages_and_chunks_cannot_share_are_refused(layout: dict[str, int], message: str):
    shape = shape_from_init(ArchitectureConfig(num_layers=12), 300)
    check_split(shape, tp=1, pp=3, vpp=2)
    with pytest.raises(ConfigError, match=message):
        check_split(shape, **layout)


@pytest.mark.parametrize(
    ("pp", "first", "last", "expected"),
    [
        (4, None, None, [3, 3, 3, 3]),
        (4, 3, 1, [3, 4, 4, 1]),
        (4, None, 3, [3, 3, 3, 3]),
        (2, 5, None, [5, 7]),
        (2, None, 5, [7, 5]),
        (2, 5, 7, [5, 7]),
        (3, 1, 1, [1, 10, 1]),
    ],
)
def test_first_and_last_stage_may_have_layers_of_their_own(pp: int, first: int, last: int, expected: list[int]):
    assert layers_per_stage(12, pp=pp, first=first, last=last) == expected


def test_chunks_of_uneven_stages_follow_each_other_around_the_ranks():
    # Chunks of 1, 2 and 1 layers, twice.
    assert [stage_of_layer(layer, [2, 4, 2], 2) for layer in range(8)] == [0, 1, 1, 2, 0, 1, 1, 2]
