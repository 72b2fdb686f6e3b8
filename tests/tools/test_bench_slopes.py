"""Growth of an iteration: slopes are those of power laws, and each axis changes what it names."""

import pytest

from ppomax.tools.bench_ppo import CASES
from ppomax.tools.bench_slopes import AXES, slope, table


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_has_its_power_as_slope(power: float) -> None:
    sizes = [4.0, 8.0, 32.0]
    assert slope(sizes, [0.3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_changes_its_size_and_nothing_else(axis: str) -> None:
    work = CASES["exact"]
    size_of, resized = AXES[axis]
    changed = resized(work, 6)
    assert size_of(changed) == 6
    assert resized(changed, size_of(work)) == work
    others = [other for other in AXES if other != axis]
    assert all(AXES[other][0](changed) == AXES[other][0](work) for other in others)


def test_the_table_has_a_row_for_each_axis() -> None:
    phases = {"rollout": 0.5, "scoring": 1.0, "update": 1.5}
    values = {"sizes": [1, 2, 4], "seconds": [1.0, 1.5, 2.0], "slope": 0.5, "cpu_slope": 0.625}
    lines = table({axis: values | {"cpu_slope_by_phase": phases} for axis in AXES})
    assert lines[-2] == "| layers | 1, 2, 4 | 1, 1.5, 2 | 0.50 | 0.62 | 0.50 | 1.00 | 1.50 |"
    assert len(lines) == 10
