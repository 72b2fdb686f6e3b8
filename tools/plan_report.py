"""The tables and curves of docs/planning: `python -m ppomax.tools.plan_report`, from the root of the repository."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.plan.advice import with_layout, with_values
from ppomax.engine.plan.gpus import GPUS, Gpu
from ppomax.engine.plan.memory import GIB, KINDS
from ppomax.engine.plan.models import MODELS
from ppomax.engine.plan.plan import Plan, make_plan
from ppomax.engine.plan.search import search

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "examples/configs/ppo_max_llama7b.toml"
GPU_NAMES = ("a100-40g", "a100-80g", "h100", "h200")
CLUSTERS = {"llama-7b": (4, 8, 16, 32, 64), "llama-13b": (8, 16, 32, 64), "llama-70b": (32, 64, 128, 256)}


@dataclass(frozen=True)
class Curve:
    """A model under one layout of all roles, from as many GPUs as it needs."""

    model: str
    tp: int
    pp: int
    smallest: int


CURVES = (Curve("llama-7b", 4, 2, 8), Curve("llama-13b", 8, 1, 8), Curve("llama-70b", 8, 8, 64))
LARGEST = 4096
PER_GPU = 16
"""Responses of an iteration for each GPU where they grow with the cluster; a quarter of them are a minibatch."""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes tables.md and scaling.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/planning"))
    output = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    (output / "tables.md").write_text(tables(), encoding="utf-8")
    plot(output / "scaling.png")


def tables() -> str:
    """The document with all tables."""
    parts = [
        "# Plans of PPO-max for LLaMA",
        f"Written by `python -m ppomax.tools.plan_report` from `{CONFIG}` (128 responses an iteration, prompts of 512 "
        "tokens, responses of 512, at most 2048 tokens, micro-batches of 16384 tokens, bf16): predictions by "
        "[planning.md](../planning.md), not measurements. GiB are those of the fullest rank in its fullest phase. "
        "Offloading is tried where nothing fits without. Where policy and reference have GPUs of their own, beside "
        "critic and reward model, their number is given.",
    ]
    for model in MODELS:
        parts.append(f"## {model}\n{_clusters(model)}")
    parts.append(f"## Where the memory goes\n{kinds()}")
    parts.append(f"## Scaling\n{scaling()}\n\n![weak and strong scaling](scaling.png)")
    return "\n\n".join(parts) + "\n"


def _config() -> RunConfig:
    return load_config(str(ROOT / CONFIG), [], command="ppo", for_planning=True)


def _plan(config: RunConfig, model: str, gpus: int, gpu: Gpu) -> Plan:
    return make_plan(config, "ppo", gpus, gpu=gpu, model=MODELS[model])


def _replan(model: str, gpu: Gpu, config: RunConfig, world_size: int) -> Plan:
    return _plan(config, model, world_size, gpu)


def _layout_text(plan: Plan) -> str:
    """tp x pp of each role, roles alike on the same GPUs together, and vpp where there is more than one chunk."""
    names: dict[tuple[str, int], list[str]] = {}
    for role in plan.roles:
        layout = role.layout
        text = f"{layout.tp} x {layout.pp}" + (f", vpp {layout.vpp}" if layout.vpp > 1 else "")
        if layout.num_ranks < plan.world_size:
            text += f", {layout.num_ranks} GPUs"
        names.setdefault((text, layout.first_rank), []).append(role.name)
    texts = [f"{' + '.join(roles)} {text}" if len(names) > 1 else f"all {text}" for (text, _), roles in names.items()]
    offload = "" if plan.roles[0].offload == "none" else f"; offload {plan.roles[0].offload}"
    return f"{'; '.join(texts)}; recompute {plan.config.model.recompute}{offload}"


def _clusters(model: str) -> str:
    """The fastest layout that fits, for some numbers of some GPUs."""
    rows = [
        (
            "GPUs",
            "GPU",
            "seconds an iteration",
            "tokens / s / GPU",
            "GiB",
            "of",
            "tp x pp of the fastest layouts that fit",
        )
    ]
    for gpus in CLUSTERS[model]:
        for name in GPU_NAMES:
            gpu = GPUS[name]
            start = with_values(_config(), with_layout("tp", 1) | with_layout("pp", 1))
            found = search(_plan(start, model, gpus, gpu), gpu, partial(_replan, model, gpu), most=1)
            if not found:
                rows.append((str(gpus), name, "", "", "", f"{gpu.memory / GIB:.1f}", "none fits"))
                continue
            plan = found[0].plan
            numbers = (f"{plan.seconds:.1f}", f"{plan.tokens_per_second:.0f}", f"{plan.worst.total / GIB:.1f}")
            rows.append((str(gpus), name, *numbers, f"{gpu.memory / GIB:.1f}", _layout_text(plan)))
    return _markdown(rows)


def kinds() -> str:
    """By kind, at the fullest phase, of one layout for each model."""
    rows = [("model", "GPUs", "tp x pp x dp", "phase", *(kind.replace("_", " ") for kind in KINDS), "sum, GiB")]
    for curve in CURVES:
        for gpus in (curve.smallest, 4 * curve.smallest):
            plan = _plan(_layout(curve, "full"), curve.model, gpus, GPUS["h100"])
            phase = plan.worst.worst_phase()
            peak = plan.worst.peak(phase)
            values = (*(getattr(peak, kind) for kind in KINDS), peak.total)
            sizes = f"{curve.tp} x {curve.pp} x {plan.roles[0].layout.dp}"
            rows.append((curve.model, str(gpus), sizes, phase, *(f"{value / GIB:.1f}" for value in values)))
    return f"With full recomputation, on the rank that has the most.\n\n{_markdown(rows)}"


def _layout(curve: Curve, recompute: str) -> RunConfig:
    values = with_layout("tp", curve.tp) | with_layout("pp", curve.pp)
    return with_values(_config(), {**values, "model.recompute": recompute})


@dataclass(frozen=True)
class Point:
    gpus: int
    weak: Plan
    strong: Plan


def points(curve: Curve) -> Iterator[Point]:
    """weak: PER_GPU responses for each GPU. strong: those of the smallest cluster's 16-fold on every cluster."""
    config = _layout(curve, "full")
    gpus = curve.smallest
    while gpus <= LARGEST:
        plans = []
        for responses in (PER_GPU * gpus, 16 * PER_GPU * curve.smallest):
            sizes = {"ppo.rollout_size": responses, "ppo.minibatch_size": responses // 4}
            plans.append(_plan(with_values(config, sizes), curve.model, gpus, GPUS["h100"]))
        yield Point(gpus, *plans)
        gpus *= 2


def scaling() -> str:
    rows = [("model", "tp x pp", "GPUs", "weak: seconds", "weak: efficiency", "strong: seconds", "strong: efficiency")]
    for curve in CURVES:
        first = None
        for point in points(curve):
            first = first or point
            weak = first.weak.seconds / point.weak.seconds
            strong = first.strong.seconds * first.gpus / (point.strong.seconds * point.gpus)
            numbers = (f"{point.weak.seconds:.1f}", f"{weak:.2f}", f"{point.strong.seconds:.1f}", f"{strong:.2f}")
            rows.append((curve.model, f"{curve.tp} x {curve.pp}", str(point.gpus), *numbers))
    text = (
        f"h100, full recomputation, one layout for all roles. Weak: {PER_GPU} responses for each GPU. Strong: the "
        "responses of 16 of the smallest clusters, whatever the cluster. A minibatch is a quarter of them. Efficiency: "
        "time of the smallest cluster over time (times its share of the GPUs, where the work stays the same); above 1 "
        "where more replicas leave more memory of each GPU to the key / value cache."
    )
    return f"{text}\n\n{_markdown(rows)}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def plot(path: Path) -> None:
    """Tokens per second over GPUs, weak and strong, with the straight lines of perfect scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axes, kind in zip(both, ("weak", "strong"), strict=True):
        for curve in CURVES:
            found = list(points(curve))
            gpus = [point.gpus for point in found]
            rates = [getattr(point, kind).tokens_per_second * point.gpus for point in found]
            (line,) = axes.plot(gpus, rates, "o-", label=f"{curve.model}, tp {curve.tp} x pp {curve.pp}")
            perfect = [rates[0] * number / gpus[0] for number in gpus]
            axes.plot(gpus, perfect, ":", color=line.get_color(), alpha=0.6)
        axes.set(xscale="log", yscale="log", xlabel="GPUs (h100)", title=f"{kind} scaling, predicted")
        axes.set_xticks(gpus_of_axis := [8 * 2**i for i in range(10)], [str(number) for number in gpus_of_axis])
        axes.grid(alpha=0.3)
        axes.legend()
    both[0].set_ylabel("prompt and response tokens per second")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
