"""What a report takes from run folders, whole, growing or broken; that it stays small, and that data stay data."""

import html.parser
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppomax.engine import cli
from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config, write_config
from ppomax.engine.errors import DataError
from ppomax.tools.report_config import config_rows
from ppomax.tools.report_data import report_data, spread
from ppomax.tools.report_histogram import reward_histograms
from ppomax.tools.report_page import ASSETS, SCRIPTS, policy, render_page, safe_json
from ppomax.tools.report_series import MAX_POINTS, charts, curves, group_of, phases, split_repeated, stretches
from ppomax.tools.run_folder import check_has_records, open_run, read_records


def read(folder: Path):
    run = open_run(folder)
    read_records(run)
    return run


def tree_of(folder: Path):
    return report_data([read(folder)], with_rollouts=True)["runs"][0]


def rows(values, kind="ppo", name="reward"):
    return [{"kind": kind, "step": step, name: value} for step, value in enumerate(values, 1)]


def test_a_report_holds_all_that_the_folder_holds(fake_run):
    tree = tree_of(fake_run.folder)
    assert (tree["stage"], tree["step"], tree["name"]) == ("ppo", 12, "runs/ppo")
    assert tree["curves"]["ppo"]["reward"] == {"x": [*range(1, 13)], "y": [s / 10 for s in range(1, 13)], "last": 1.2}
    assert tree["curves"]["evaluation"]["reward"]["x"] == [0, 12]
    assert [event["step"] for event in tree["events"]] == [6]
    assert sorted(tree["samples"]) == [0, 12]
    assert sorted(tree["dumps"]) == tree["rollouts"] == [6, 12]
    assert tree["histogram"]["source"] == "all responses of the rollouts"
    assert "no end" in " ".join(tree["notes"])


def test_a_growing_file_is_read_on_and_a_torn_line_waits_for_its_end(fake_run):
    run = read(fake_run.folder)
    before = len(run.metrics.rows)
    read_records(run)
    assert len(run.metrics.rows) == before
    fake_run.append('ep": 13, "reward": 2.0}')
    read_records(run)
    assert run.metrics.rows[before:] == [{"kind": "ppo", "step": 13, "reward": 2.0}]
    assert run.notes == []


def test_a_replaced_file_is_read_anew(fake_run):
    run = read(fake_run.folder)
    (fake_run.folder / "metrics.jsonl").unlink()
    fake_run.steps(1, 2)
    read_records(run)
    assert [row["step"] for row in run.metrics.rows] == [1, 2]


def test_damaged_lines_are_left_out_and_named(fake_run):
    bad = [
        "{",
        "[1]",
        '{"kind": "ppo"}',
        '{"kind": "ppo", "step": true}',
        '{"kind": "ppo", "step": 1e999}',
        "[" * 99999,
    ]
    fake_run.folder.joinpath("metrics.jsonl").unlink()
    fake_run.steps(1, 1).append(*bad).steps(2, 2)
    run = read(fake_run.folder)
    assert [row["step"] for row in run.metrics.rows] == [1, 2]
    assert len(run.notes) == len(bad)
    assert run.notes[0] == "metrics.jsonl, line 2, is left out: not JSON"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "no such run folder"),
        (lambda folder: folder.mkdir(), "holds no run"),
        (lambda folder: (folder / "ppo").mkdir(parents=True) or (folder / "ppo/metrics.jsonl").touch(), "several runs"),
        (lambda folder: folder.mkdir() or (folder / "metrics.jsonl").touch(), "no record yet"),
        (lambda folder: folder.mkdir() or (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n"), "no readable record"),
        (lambda folder: folder.write_text("a file"), "no such run folder"),
    ],
    ids=["missing", "empty", "a recipe's", "not begun", "binary", "a file"],
)
def test_a_folder_without_a_run_is_a_clear_error(tmp_path, capsys, make, message):
    make(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == DataError.exit_code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/report.html").exists()


def test_damaged_side_files_are_notes_not_errors(fake_run):
    (fake_run.folder / "samples_000012.jsonl").write_text("{")
    (fake_run.folder / "rollouts/step_000012.jsonl").write_text('{"pieces": ["a"], "tokens": [1], "kl": []}\n')
    (fake_run.folder / "plan.json").write_text('{"ranks": [{"peak": "much"}]}')
    (fake_run.folder / "config.toml").write_text("= broken")
    (fake_run.folder / "versions.json").write_text("[]")
    tree = tree_of(fake_run.folder)
    assert sorted(tree["samples"]) == [0]
    assert tree["rollouts"] == [6]
    assert tree["plan"] is None
    assert sum("step_000012" in note or "samples_000012" in note for note in tree["notes"]) == 2


def test_what_is_no_number_is_a_gap_and_counted(fake_run):
    curve = tree_of(fake_run.folder)["curves"]["ppo"]["grad_norm"]
    assert curve["y"][:3] == [1.0, None, 1.0]
    assert (curve["bad"], curve["num_bad"]) == ([2], 1)
    odd = curves(rows([math.nan, math.inf, 1.0, "text", None, True, 10**400]))["ppo"]["reward"]
    assert odd["y"] == [None, None, 1.0, None, None, None, None]


def test_timing_is_read_beside_the_metrics_and_wins(fake_run):
    timing = [{"kind": "ppo", "step": step, "seconds": 5.0, "rollout_seconds": 3.0} for step in range(1, 13)]
    fake_run.lines("timing.jsonl", timing)
    tree = tree_of(fake_run.folder)
    assert tree["curves"]["timing"]["seconds"]["last"] == 5.0
    assert "seconds" not in tree["curves"]["ppo"]
    assert tree["phases"]["names"] == ["rollout", "rest"]


def test_quantiles_of_one_thing_share_a_chart():
    (group,) = charts(["reward", "reward_min", "reward_p10", "reward_max", "reward_std", "margin_max"])
    shown = {chart["title"]: chart["metrics"] for chart in group["charts"]}
    assert shown["reward: range"] == ["reward_min", "reward_p10", "reward_max"]
    assert shown["margin_max"] == ["margin_max"]
    assert (shown["reward"], shown["reward_std"]) == (["reward"], ["reward_std"])


def test_unknown_metrics_are_shown_and_each_metric_once(fake_run):
    groups = charts(["reward", "perplexity", "ref_perplexity", "odd_one", "ref_alone", "reward"])
    shown = [metric for group in groups for chart in group["charts"] for metric in chart["metrics"]]
    assert sorted(shown) == ["odd_one", "perplexity", "ref_alone", "ref_perplexity", "reward"]
    assert groups[-1]["title"] == "Other"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        *(("reward_std", "Reward"), ("kl_coef", "KL and drift"), ("sampler_mismatch_mean", "KL and drift")),
        *(("response_length", "Response"), ("value_loss", "Loss"), ("explained_variance", "Value and advantage")),
        *(("learning_rate", "Optimizer"), ("seconds_update", "Time and memory"), ("entropy", "Language")),
    ],
)
def test_metrics_are_grouped_by_what_they_measure(name, group):
    assert group_of(name) == group


def test_steps_that_were_done_again_are_set_apart():
    again = [{"kind": "ppo", "step": step, "x": x} for x, step in enumerate([1, 2, 3, 4, 3, 4, 5, 2, 3])]
    kept, old = split_repeated(again)
    assert [(row["step"], row["x"]) for row in kept] == [(1, 0), (2, 7), (3, 8)]
    assert [[row["x"] for row in part] for part in old] == [[2, 3], [1, 4, 5, 6]]
    assert curves(again)["ppo"]["x"]["old"] == [[[3, 4], [2, 3]], [[2, 3, 4, 5], [1, 4, 5, 6]]]


def test_a_long_curve_is_thinned_without_losing_its_extremes():
    draw = random.Random(0)
    values = [draw.gauss(0, 1) for _ in range(10_000)]
    values[5_000], values[7_000] = 99.0, -99.0
    curve = curves(rows(values))["ppo"]["reward"]
    assert len(curve["x"]) == MAX_POINTS // 2
    assert (max(curve["hi"]), min(curve["lo"])) == (99.0, -99.0)
    assert (curve["x"][0], curve["x"][-1], curve["last"]) == (1, 10_000, pytest.approx(values[-1], rel=1e-5))
    weighted = sum(mean * (b - a) for mean, (a, b) in zip(curve["y"], stretches(10_000, MAX_POINTS // 2), strict=True))
    assert weighted == pytest.approx(sum(values), rel=1e-4)


def test_ten_thousand_steps_make_a_small_page_that_says_what_was_thinned(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    draw = random.Random(0)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, 10_001):
            record = {"kind": "ppo", "step": step, "seconds": 1.0} | {f"metric_{i}": draw.random() for i in range(50)}
            file.write(json.dumps(record) + "\n")
    started = time.perf_counter()
    assert cli.main(["report", str(folder)]) == 0
    assert time.perf_counter() - started < 60
    assert (folder / "report.html").stat().st_size < 2**20
    assert "10000 steps: curves show the mean, lowest and highest value" in capsys.readouterr().out


def test_rollouts_are_cut_to_their_budget_first_and_last_step_first(tmp_path, fake_run, monkeypatch):
    for step in range(20, 60):
        fake_run.rollouts(step)
    monkeypatch.setattr("ppomax.tools.report_data.ROLLOUT_BYTES", 30_000)
    tree = tree_of(fake_run.folder)
    assert {6, 59} <= set(tree["rollouts"])
    assert len(json.dumps(tree["dumps"])) < 35_000
    assert "steps are left out" in " ".join(tree["notes"])
    assert spread([1, 2, 3, 4, 5]) == [1, 5, 3, 2, 4]
    assert (spread([]), spread([7])) == ([], [7])


def test_histograms_of_other_edges_come_onto_one_grid():
    records = [
        {"kind": "ppo", "step": 1, "reward_histogram": {"edges": [0, 1, 2], "counts": [4, 0]}},
        {"kind": "ppo", "step": 2, "reward_histogram": {"edges": [0, 4], "counts": [8]}},
        {"kind": "ppo", "step": 3, "reward_histogram": {"edges": [0], "counts": [8]}},
    ]
    found = reward_histograms(records, {}, {})
    assert (found["edges"][0], found["edges"][-1]) == (0, 4)
    first, second = (column["counts"] for column in found["columns"])
    assert sum(first) == pytest.approx(4)
    assert sum(first[:10]) == pytest.approx(4)
    assert second == pytest.approx([0.2] * 40)


@pytest.mark.parametrize("value", [0.0, 5e-324, 2.0**52, 4.5036e15, 1e150])
def test_a_range_narrower_than_numbers_can_tell_apart_is_widened(value):
    records = [{"kind": "ppo", "step": 1, "reward_histogram": {"edges": [value, value], "counts": [3]}}]
    found = reward_histograms(records, {}, {})
    assert found["edges"] == sorted(found["edges"])
    assert sum(found["columns"][0]["counts"]) == pytest.approx(3)


def test_histograms_come_from_rollouts_or_samples_where_records_have_none():
    assert reward_histograms([], {3: [{"score": 1.0}, {"score": None}]}, {})["source"].startswith("responses written")
    found = reward_histograms([], {}, {0: [{"reward": 1.0}], 5: [{"reward": 1.0}]})
    assert found["source"].startswith("samples")
    assert [sum(column["counts"]) for column in found["columns"]] == [1, 1]
    assert reward_histograms([], {}, {}) is None


def test_times_of_phases_and_what_is_left_add_up(fake_run):
    found = phases(read(fake_run.folder).metrics.rows)
    assert found["names"] == ["rollout", "update", "rest"]
    assert found["totals"] == [12.0, 6.0, 6.0]
    assert found["bars"][0] == {"from": 1, "to": 1, "means": [1.0, 0.5, 0.5]}
    assert phases([{"kind": "ppo", "step": 1, "seconds": 3.0}])["names"] == ["step"]
    measured = {"seconds": 3.0, "rollout_seconds": 1.0, "other_seconds": 2.0, "rollout_tokens_per_second": 9.0}
    found = phases([{"kind": "ppo", "step": 1, **measured}, {"kind": "ppo", "step": 2, **measured}])
    assert (found["names"], found["totals"]) == (["rollout", "other"], [2.0, 4.0])


def test_the_configuration_shows_what_was_set_and_no_more(tmp_path):
    given = [
        "model.policy=p",
        "model.reward=r",
        "data.train=d.jsonl",
        "data.ptx=x.jsonl",
        "train.steps=5",
        "ppo.lam=0.5",
    ]
    write_config(load_config(None, given, command="ppo"), tmp_path / "config.toml")
    import tomllib

    config = tomllib.loads((tmp_path / "config.toml").read_text())
    found = {row["key"]: row for row in config_rows([config], ["ppo"])}
    assert set(found) == {"model.policy", "model.reward", "data.train", "data.ptx", "train.steps", "ppo.lam"}
    assert (found["ppo.lam"]["base"], found["ppo.lam"]["values"]) == (["0.9"], ["0.5"])
    other = {**config, "ppo": {**config["ppo"], "lam": 0.9, "gamma": 0.99}}
    both = {row["key"]: row for row in config_rows([config, other], ["ppo", "ppo"])}
    assert both["ppo.lam"]["differs"]
    assert both["ppo.gamma"]["values"] == ["1.0", "0.99"]
    assert not both["train.steps"]["differs"]
    strange = config_rows([{"ppo": {"preset": "unknown", "new": 1}, "odd": 3}, None], ["ppo", "ppo"])
    assert {"ppo.new", "odd"} <= {row["key"] for row in strange}
    assert config_rows([None], ["ppo"]) == []


def test_the_defaults_of_a_stage_show_no_row():
    import tomllib

    from ppomax.engine.config_file import to_toml

    assert config_rows([tomllib.loads(to_toml(RunConfig()))], ["sft"]) == []


class _Reader(html.parser.HTMLParser):
    """Counts elements, and keeps what is in scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


def test_data_cannot_leave_their_element(fake_run):
    page = render_page(report_data([read(fake_run.folder)], with_rollouts=True))
    reader = _Reader()
    reader.feed(page)
    assert reader.tags.count("script") == 2
    assert [tag for tag in reader.tags if tag in ("img", "svg", "iframe", "object", "base", "form")] == []
    data = json.loads(reader.scripts[0])
    assert data["runs"][0]["samples"]["12"][0]["response"] == "<script>window.pwned = 1</script> at 12"
    assert page.isascii()
    assert re.findall(r"[<>&]", reader.scripts[0]) == []


def test_the_page_names_no_address_and_its_policy_allows_none(fake_run):
    page = render_page(report_data([read(fake_run.folder)], with_rollouts=True))
    reader = _Reader()
    reader.feed(page)
    addresses = [value for name, value in reader.attributes if name in ("src", "href", "action", "srcset")]
    assert all(value.startswith("data:") for value in addresses)
    assert policy(live=False).startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src" not in policy(live=False)
    assert "unsafe" not in policy(live=True)


def test_scripts_build_no_markup_from_text():
    text = "".join((ASSETS / name).read_text() for name in SCRIPTS)
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc|DOMParser|createContextual"
    )
    assert re.findall(forbidden, text) == []
    assert sorted(path.name for path in ASSETS.iterdir()) == sorted([*SCRIPTS, "style.css"])


def test_json_refuses_what_a_browser_cannot_read():
    with pytest.raises(ValueError, match="not JSON compliant"):
        safe_json({"x": math.nan})
    assert safe_json("</script>\u2028\u202e&") == '"\\u003c/script\\u003e\\u2028\\u202e\\u0026"'


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("reward", "reward_histogram", "seconds", "evidence", "samples", "message", "severity", "x_p10", "x_seconds")
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from(["ppo", "event", "evaluation"]), "step": st.integers(0, 9) | st.floats(0, 9)},
    optional=dict.fromkeys(FIELDS, ANYTHING),
)
HISTOGRAMS = st.fixed_dictionaries(
    {"edges": st.lists(st.floats(), max_size=4), "counts": st.lists(st.floats(), max_size=3)}
)
RANKS = st.lists(st.dictionaries(st.sampled_from(["rank", "peak", "measured", "phases"]), ANYTHING), max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORDS, max_size=6), HISTOGRAMS, ANYTHING, RANKS | ANYTHING)
def test_whatever_a_folder_holds_becomes_json(tmp_path, records, histogram, anything, ranks):
    run = FakeFolder(tmp_path)
    records.append({"kind": "ppo", "step": 3, "reward_histogram": histogram})
    run.write("metrics.jsonl", *records)
    run.write("timing.jsonl", *records[:2])
    run.write("plan.json", {"ranks": ranks, "capacity": anything})
    run.write("versions.json", anything)
    run.write("samples_000001.jsonl", {"prompt": anything, "response": "r", "reward": anything, "finished": anything})
    row: dict[str, Any] = {"pieces": ["a"], "index": anything, "score": anything, "prompt": anything}
    for name in ("tokens", "logprobs", "ref_logprobs", "kl", "advantages", "values", "token_rewards"):
        row[name] = [anything]
    run.write("rollouts/step_000001.jsonl", row)
    json.loads(safe_json(report_data([read(tmp_path)], with_rollouts=True)))


class FakeFolder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "rollouts").mkdir(exist_ok=True)

    def write(self, name: str, *rows: Any) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_output_that_cannot_be_written_is_a_clear_error(fake_run, capsys):
    assert cli.main(["report", str(fake_run.folder), "--output", str(fake_run.folder / "no/such/folder.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_records_alone_are_enough(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "sft", "step": 1, "loss": 2.0}')
    run = read(folder)
    check_has_records(run)
    tree = report_data([run], with_rollouts=True)["runs"][0]
    assert (tree["curves"]["sft"]["loss"]["y"], tree["notes"]) == ([2.0], [])
