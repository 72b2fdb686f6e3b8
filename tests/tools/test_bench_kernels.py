"""The benchmark's arithmetic, its report, and one small run on the CPU."""

import json
from pathlib import Path

import pytest
import torch

from ppomax.tools import bench_eager, bench_kernels, bench_ops
from ppomax.tools.bench_ops import Item
from ppomax.tools.bench_peers import Contender, eager_contenders, library_contenders
from ppomax.tools.bench_report import COLUMNS, OURS, Row, cells, rate, seconds, table
from ppomax.tools.bench_timing import Ceilings, measure, summary
from ppomax.tools.kernel_cases import gae_case, swiglu_case
from ppomax.tools.kernel_inputs import Maker, run
from ppomax.tools.kernel_shapes import PRODUCTION

CPU = torch.device("cpu")
ITEMS = bench_ops.items(CPU)
IDS = [f"{item.op}-{item.case.name}" for item in ITEMS]


def test_summary_pools_the_repeats_and_compares_their_medians() -> None:
    time = summary([[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0, 5.0, 6.0]])
    assert (time.median, time.p20, time.p80, time.num_calls) == (3.5, 2.0, 5.0, 10)
    assert time.spread == pytest.approx(4 / 3 - 1)


def test_measure_goes_on_after_a_function_that_fails() -> None:
    def broken() -> None:
        raise ValueError("no such thing")

    measured = measure({"broken": lambda: broken, "good": lambda: lambda: None}, CPU, seconds=0.001)
    assert measured["broken"].failure == "ValueError: no such thing"
    assert len(measured["good"].repeats) == 2


def test_the_floor_is_the_slower_of_memory_and_products() -> None:
    limits = Ceilings(bytes_per_second=100.0, flops_per_second=1000.0, what="")
    assert limits.floor(num_bytes=200, num_flops=0) == 2.0
    assert limits.floor(num_bytes=200, num_flops=5000) == 5.0


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.500 s"), (0.0123, "12.300 ms"), (0.001, "1.000 ms"), (2.5e-6, "2.5 us")]
)
def test_seconds_have_units(value: float, text: str) -> None:
    assert seconds(value) == text


def test_a_row_shows_its_share_of_the_floor_its_rate_and_its_ratio() -> None:
    row = Row("gae", "2 x 3", "forward", "eager", 2e-3, 1e-3, 3e-3, 0.01, 10, 4e9, 0, 1e-3, 4.0, 1e-7, 2**20)
    shown = dict(zip(COLUMNS, cells(row), strict=True))
    assert shown["of the floor"] == "50 %"
    assert shown["rate"] == "2e+03 GB/s"
    assert (shown["time / ours"], shown["error"], shown["memory"]) == ("4.00", "1.0e-07", "1 MiB")
    assert rate(Row("linear", "", "", OURS, median=1.0, num_bytes=8, num_flops=3e12)) == "3 TFLOP/s"


def test_a_row_without_a_time_shows_why() -> None:
    row = Row("rope", "8 x 2", "", "liger_kernel", note="not installed")
    assert cells(row)[:4] == ["rope 8 x 2", "", "liger_kernel", "not installed"]
    assert len(cells(row)) == len(COLUMNS)
    assert table([row]).count("\n") == 2


def test_traffic_counts_what_must_move() -> None:
    N, F = 8, 16
    item = Item(swiglu_case(N, F, torch.bfloat16), swiglu_case(N, F, torch.bfloat16), bench_ops.APART)
    bytes_of = bench_ops.traffic(item, item.case.inputs(Maker(CPU, dense=True)))
    assert bytes_of == {
        "forward": 2 * 3 * N * F,
        "backward": 2 * 5 * N * F,
        "forward and backward": 2 * 5 * N * F,
    }


def test_traffic_counts_what_is_updated_in_place() -> None:
    (item,) = (item for item in ITEMS if item.op == "adamw")
    inputs = item.case.inputs(Maker(CPU))
    assert bench_ops.traffic(item, inputs)["forward"] == 28 * inputs[0][0].numel()


@pytest.mark.parametrize("item", ITEMS, ids=IDS)
def test_ours_and_plain_torch_agree_with_fp64(item: Item) -> None:
    contenders = [Contender(OURS, item.case.function), *eager_contenders(item.function, compiled=False)]
    errors = {contender.name: bench_ops.error(item, contender, CPU) for contender in contenders}
    assert len(errors) >= 2
    assert max(errors.values()) < 3e-6, errors


def test_a_wrong_peer_shows() -> None:
    item = Item(gae_case(2, 9), gae_case(2, 9))
    assert (
        bench_ops.error(item, Contender("wrong", lambda r, v, mask, **s: bench_eager.gae(r, v * 1.01, mask, **s)), CPU)
        > 1e-3
    )


def test_peers_that_need_cuda_are_listed_on_a_cpu() -> None:
    contenders, absent = library_contenders("rms_norm", CPU)
    assert contenders == []
    assert absent == {"liger_kernel": "runs on CUDA only"}


def test_the_loops_over_time_agree_where_rows_have_no_gaps() -> None:
    case = gae_case(5, 21)
    inputs = case.inputs(Maker(CPU))
    (advantages, _), _ = run(case, inputs)
    for loop in (bench_eager.gae, bench_eager.gae_without_gaps):
        torch.testing.assert_close(loop(*inputs, **case.settings)[0], advantages, rtol=1e-5, atol=1e-5)


def test_a_dense_maker_masks_nothing() -> None:
    make = Maker(CPU, dense=True)
    assert (make.labels(16, 9) >= 0).all()
    assert make.mask(3, 8).all()
    assert (make.token_weights(16) == 1 / 16).all()
    assert (Maker(CPU).labels(16, 9) < 0).sum() == 2


def test_every_operation_of_production_is_timed_on_both_devices() -> None:
    ops = {case.op for case in PRODUCTION}
    assert {item.op for item in ITEMS} == ops
    assert {item.op for item in bench_ops.items(torch.device("cuda"))} == ops


def test_the_tests_of_an_operation_are_found(tmp_path: Path) -> None:
    (line,) = bench_kernels.commands("gae", CPU)
    assert line[-1].endswith("tests/kernels/test_gae.py")
    (line,) = bench_kernels.commands("swiglu", CPU)
    assert line[-1].endswith("test_transformer_ops.py")
    assert bench_kernels.commands("gae", torch.device("cuda"))[1][-5:-1] == ["-m", "gpu", "-k", "gae"]


def test_a_red_operation_is_not_timed_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_kernels, "failing", lambda ops, device: ["gae"])
    arguments = ["--only", "gae", "token_rewards", "--device", "cpu", "--seconds", "0.001", "--output", str(tmp_path)]
    with pytest.raises(SystemExit, match="gae failed"):
        bench_kernels.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    timed = {row["op"] for row in results["rows"] if row["median"]}
    assert timed == {"token_rewards"}
    assert results["environment"]["tests"] == "1 of 2 operations green"
    assert "token_rewards" in capsys.readouterr().out
    report = (tmp_path / "README.md").read_text()
    assert "tests fail: not timed" in report
    assert (tmp_path / "times.png").stat().st_size > 1000
