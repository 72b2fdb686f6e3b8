"""Does a reward per step teach faster than one for the result? Chains of additions modulo 10, one per line.

`python -m ppomax.tools.process_experiment OUTPUT [--seeds 0 1 2]` makes data, fits a tiny model to solutions of which
many steps are wrong, and trains it with PPO, once with the reward of the final answer alone ("outcome"), once with a
reward for each line too ("process"); all else is equal. It writes a folder per run, results.json and a plot.

The prompt "3 5 2" asks for 3+5=8, then 8+2=0. A line is right where it goes on from the line before.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ppomax.engine.config import RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.rewards.functions import Response
from ppomax.engine.stage import stage_function

NUM_ADDITIONS = 6
WRONG_STEPS = 0.4
"""Share of lines of the SFT data whose result is drawn at random."""
ARMS = {"outcome": 0.0, "process": 1.0 / NUM_ADDITIONS}
"""Weight of the reward per step beside the reward of the answer, of weight 1."""
NUM_SFT, NUM_PROMPTS, NUM_HELD_OUT = 12000, 2000, 256
NUM_ITERATIONS = 40


def step_rewards(responses: Sequence[Response]) -> list[list[float]]:
    """1 for each right line, 0 for any other one."""
    return [_right_lines(response.prompt[-1].text, response.steps) for response in responses]


def _right_lines(prompt: str, lines: Sequence[str]) -> list[float]:
    first, *others = prompt.split()
    so_far, right = first, []
    for number, line in enumerate(lines):
        expected = f"{so_far}+{others[number]}=" if number < len(others) else None
        result = line[-1:]
        is_right = expected is not None and line == f"{expected}{(int(so_far) + int(others[number])) % 10}"
        right.append(float(is_right))
        so_far = result if result.isdigit() else "0"
    return right


def solution(digits: Sequence[int], draw: random.Random, wrong: float) -> str:
    """Lines of additions; each result is drawn at random with the probability `wrong`, and the next line goes on."""
    lines, so_far = [], digits[0]
    for digit in digits[1:]:
        result = draw.randrange(10) if draw.random() < wrong else (so_far + digit) % 10
        lines.append(f"{so_far}+{digit}={result}")
        so_far = result
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    _write_data(output)
    if not (output / "sft/hf/config.json").is_file():
        stage_function("sft")(_config(output, "sft", []))
    results = []
    for seed in arguments.seeds:
        for arm, weight in ARMS.items():
            folder = output / f"{arm}_{seed}"
            if not (folder / "hf/config.json").is_file():
                started = time.perf_counter()
                stage_function("ppo")(_config(output, "ppo", _ppo(folder, seed, weight)))
                (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - started))
            results.append(_result(folder, arm, seed))
    (output / "results.json").write_text(json.dumps(results, indent=1))
    _plot(results, output / "process_rewards.png")
    for row in results:
        half = "never" if row["half"] is None else f"{row['half']:.1f}"
        print(f"{row['arm']} {row['seed']}: half of the answers right after {half} iterations, {row['seconds']:.0f} s")
        print("  ", [round(x, 3) for x in row["accuracy"]])


def first_at(steps: Sequence[int], values: Sequence[float], level: float) -> float | None:
    """Where straight lines between the points first reach a level; None where they do not."""
    for i, value in enumerate(values):
        if value >= level:
            if i == 0:
                return float(steps[0])
            share = (level - values[i - 1]) / (value - values[i - 1])
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return None


def _config(output: Path, command: str, overrides: list[str]) -> RunConfig:
    shared = ["data.max_length=96", "train.tokens_per_microbatch=8192", 'data.step_delimiter="\\n"']
    if command == "sft":
        overrides = [
            f"model.tokenizer={output}/tokenizer.json",
            f"data.train={output}/sft.jsonl",
            "model.init={hidden_size=64, num_layers=2, num_heads=4, num_query_groups=4, ffn_hidden_size=128}",
            "train.steps=1200",
            "train.batch_size=64",
            "optim.lr=3e-3",
            "optim.schedule=cosine",
            f"train.output={output}/sft",
            "train.log_every=50",
        ]
    return load_config(None, shared + overrides, command=command)


def _ppo(folder: Path, seed: int, step_weight: float) -> list[str]:
    rewards = (
        '[{kind="math"}, {kind="function", name="steps", per_step=true, '
        f'path="ppomax.tools.process_experiment:step_rewards", weight={step_weight}}}]'
    )
    data = folder.parent
    return [
        f"model.policy={data}/sft/hf",
        f"data.train={data}/train.jsonl",
        f"data.eval={data}/held_out.jsonl",
        f"train.output={folder}",
        f"train.seed={seed}",
        f"train.steps={NUM_ITERATIONS}",
        "train.log_every=10",
        f"ppo.rewards={rewards}",
        "ppo.critic_init=sft",
        "ppo.rollout_size=128",
        "ppo.minibatch_size=64",
        "ppo.kl_coef=0.02",
        "ppo.ptx_coef=0",
        "optim.lr=5e-4",
        "optim.critic_lr=2e-3",
        "optim.schedule=constant",
        "sampling.max_new_tokens=48",
        "sampling.temperature=1.0",
        "sampling.top_p=1.0",
        "sampling.repetition_penalty=1.0",
        "sampling.batch_size=128",
        "monitor.eval_every=2",
        "monitor.num_samples=2",
        "monitor.eval_size=256",
    ]


def _write_data(output: Path) -> None:
    draw = random.Random(0)

    def digits() -> list[int]:
        return [draw.randrange(10) for _ in range(NUM_ADDITIONS + 1)]

    prompts: dict[str, int] = {}
    while len(prompts) < NUM_PROMPTS + NUM_HELD_OUT:
        given = digits()
        prompts[" ".join(map(str, given))] = sum(given) % 10
    rows = [{"prompt": prompt, "answer": str(answer)} for prompt, answer in prompts.items()]
    _write(output / "train.jsonl", rows[:NUM_PROMPTS])
    _write(output / "held_out.jsonl", rows[NUM_PROMPTS:])
    shown = []
    for _ in range(NUM_SFT):
        given = digits()
        turns = (("user", " ".join(map(str, given))), ("assistant", solution(given, draw, WRONG_STEPS)))
        shown.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    _write(output / "sft.jsonl", shown)
    characters = sorted(set("0123456789+= \nHuman:Assistant"))
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>")])
    tokenizer.save(str(output / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (output / "tokenizer_config.json").write_text(json.dumps(special))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _result(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = {r["step"]: r for r in records if r["kind"] == "evaluation"}
    steps, accuracy = list(evaluations), [r["reward/math"] for r in evaluations.values()]
    return {
        "arm": arm,
        "seed": seed,
        "half": first_at(steps, accuracy, 0.5),
        "step": steps,
        "accuracy": accuracy,
        "right_steps": [r["reward/steps"] for r in evaluations.values()],
        "kl": [r["kl"] for r in evaluations.values()],
        "seconds": json.loads((folder / "seconds.json").read_text()),
    }


def _plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    colours = dict(zip(ARMS, ("tab:blue", "tab:red"), strict=True))
    for axis, name, title in (
        (axes[0], "accuracy", "right final answers"),
        (axes[1], "right_steps", "right lines"),
    ):
        for row in results:
            label = row["arm"] if row["seed"] == results[0]["seed"] else None
            axis.plot(row["step"], row[name], color=colours[row["arm"]], label=label)
        axis.set_xlabel("PPO iterations")
        axis.set_title(f"{title}, held-out prompts")
        axis.set_ylim(0, 1)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
