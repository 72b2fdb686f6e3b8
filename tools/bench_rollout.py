"""Times generation: `make bench-rollout`. On a CPU beside transformers, on a GPU against what its memory allows.

    python -m ppomax.tools.bench_rollout [--repeats N] [--threads N ...] [--output FOLDER]

CPU: 64 prompts of 8 to 64 tokens, limits spread evenly over 16 to 256 new tokens, greedy, float32, random weights of
two sizes. The contenders take turns; each ratio is of neighbouring runs. GPU: 512 tokens of prompt and 512 new ones,
bfloat16, models of 1 and 7 billion parameters. The report goes to docs/benchmarks/<date>-rollout-<device>/.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import RunConfig, SamplingConfig
from ppomax.engine.config_models import ModelConfig
from ppomax.engine.models.hf_reader import ALL, RandomReader
from ppomax.engine.models.roles import Role, make_role
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.parallel.device import start
from ppomax.engine.parallel.groups import make_groups
from ppomax.engine.parallel.layout import ParallelLayout
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.tools.bench_kernels import ROOT, commit, device_name, folder_name
from ppomax.tools.bench_peers import versions
from ppomax.tools.bench_timing import ceilings


def llama(vocab: int, hidden: int, layers: int, heads: int, groups: int, ffn: int, context: int) -> ModelShape:
    return ModelShape(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_query_groups=groups,
        head_dim=hidden // heads,
        ffn_hidden_size=ffn,
        max_position_embeddings=context,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tie_embeddings=False,
    )


SMALL = {
    "1 M (quickstart)": llama(1024, 128, 4, 4, 2, 384, 512),
    "25 M": llama(8192, 384, 10, 6, 2, 1280, 512),
}
LARGE = {
    "1.1 B": llama(32000, 2048, 22, 32, 4, 5632, 2048),
    "6.7 B": llama(32000, 4096, 32, 32, 32, 11008, 4096),
}
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, (8, 64), (16, 256)
LONG_CONTEXT = 384
GPU_BATCHES, GPU_TOKENS = (64, 128, 256), 512
GREEDY = SamplingConfig(temperature=0, top_p=1, repetition_penalty=1, batch_size=NUM_PROMPTS)
INIT_STD = 0.05
PATTERN_ROWS = 64


@dataclass(frozen=True)
class Work:
    """prompts, and the new tokens that each gets."""

    prompts: list[list[int]]
    limits: list[int]


class PatternReader(RandomReader):
    """Random rows that repeat: drawing billions of numbers would take longer than the benchmark."""

    def read(self, name: str, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        size = self.sizes[name]
        if len(size) == 1:
            return super().read(name, rows, columns)
        generator = torch.Generator().manual_seed(len(name))
        pattern = torch.empty(PATTERN_ROWS, size[1]).normal_(std=self._std, generator=generator)
        return pattern[torch.arange(size[0])[rows] % PATTERN_ROWS][:, columns]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ppomax.tools.bench_rollout", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender (default 3)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a CPU (default 1 2)")
    parser.add_argument("--output", type=Path, help="folder of the report")
    arguments = parser.parse_args(argv)
    device = start(600)
    on_gpu = device.type == "cuda"
    rows = list(gpu_rows(arguments.repeats) if on_gpu else cpu_rows(arguments.repeats, arguments.threads))
    environment = {
        "device": device_name(device),
        "versions": versions(),
        "command": " ".join(["python -m ppomax.tools.bench_rollout", *(argv if argv is not None else sys.argv[1:])]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    name = folder_name(environment).replace("-kernels-", "-rollout-")
    write(arguments.output or ROOT / "docs" / "benchmarks" / name, rows, environment)
    dist.destroy_process_group()


def make_model(shape: ModelShape, reader: RandomReader, dtype: Literal["fp32", "bf16"]) -> Role:
    config = RunConfig(model=ModelConfig(dtype=dtype))
    groups = make_groups({"policy": ParallelLayout(1, 1, 1)})["policy"]
    return make_role("policy", shape, reader, config, groups, source="benchmark")


def small_work(shape: ModelShape) -> Work:
    draw = random.Random(0)
    low, high = NEW_TOKENS
    limits = [low + round((high - low) * i / (NUM_PROMPTS - 1)) for i in range(NUM_PROMPTS)]
    draw.shuffle(limits)
    lengths = [draw.randint(*PROMPT_TOKENS) for _ in range(NUM_PROMPTS)]
    return Work([[draw.randrange(1, shape.vocab_size) for _ in range(n)] for n in lengths], limits)


def respond(role: Role, work: Work, sampling: SamplingConfig, **options: Any) -> list[list[int]]:
    """The new tokens of each prompt, by ours."""
    seeds = request_seeds(0, 0, len(work.prompts))
    rollout = generate(role, work.prompts, sampling, seeds=seeds, eos_id=-1, pad_id=0, limits=work.limits, **options)
    spans = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return [tokens[first:end] for tokens, first, end in spans]


def cpu_rows(repeats: int, thread_counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    for size, shape in SMALL.items():
        with contextlib.ExitStack() as stack:
            yield from small_rows(size, shape, repeats, thread_counts, stack)


def small_rows(
    size: str, shape: ModelShape, repeats: int, thread_counts: Sequence[int], stack: contextlib.ExitStack
) -> Iterator[dict[str, Any]]:
    """Those of one model; what runs beside it is ended by the stack."""
    reader = RandomReader(shape, seed=0, std=INIT_STD)
    role, work = make_model(shape, reader, "fp32"), small_work(shape)
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "ours": partial(respond, role, work, GREEDY),
        "transformers generate": to_longest(transformers_model(shape, reader), work),
        "transformers continuous batching": continuous(transformers_model(shape, reader), work, stack),
    }
    for threads in thread_counts:
        torch.set_num_threads(threads)
        yield from compared(size, threads, contenders, work, repeats)
        yield step_time_row(size, threads, role)


def compared(
    size: str, threads: int, contenders: dict[str, Callable[[], list[list[int]]]], work: Work, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of the contenders, after `repeats` turns of all; `ratio` is the median of time / our time in that turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            begin = time.perf_counter()
            tokens[name] = contender()
            if turn > 0:  # the first is for warming up
                times[name].append(time.perf_counter() - begin)
    for name in contenders:
        ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
        row = {
            "model": size,
            "threads": threads,
            "what": name,
            "seconds": statistics.median(times[name]),
            "tokens/s": sum(work.limits) / statistics.median(times[name]),
            "time / ours": statistics.median(ratios),
            "equal to ours": sum(a == b for a, b in zip(tokens[name], tokens["ours"], strict=True)),
        }
        print(row, flush=True)
        yield row


def transformers_model(shape: ModelShape, reader: RandomReader) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({name: reader.read(name) for name in reader.sizes})
    return model


def to_longest(model: Any, work: Work) -> Callable[[], list[list[int]]]:
    """One padded batch, which runs until the longest response has ended."""
    width, most = max(map(len, work.prompts)), max(work.limits)
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in work.prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in work.prompts])

    @torch.no_grad()
    def run() -> list[list[int]]:
        settings = {"do_sample": False, "max_new_tokens": most, "min_new_tokens": most, "pad_token_id": 0}
        rows = model.generate(tokens, attention_mask=mask, **settings).tolist()
        return [row[width : width + limit] for row, limit in zip(rows, work.limits, strict=True)]

    return run


def continuous(model: Any, work: Work, stack: contextlib.ExitStack) -> Callable[[], list[list[int]]]:
    """Continuous batching with the limit of each request. Its thread runs until the stack is closed: start and stop are
    not counted.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(do_sample=False, max_new_tokens=max(work.limits), eos_token_id=-1, pad_token_id=0)
    page_size = 32
    num_pages = sum(-(-(len(p) + n) // page_size) + 1 for p, n in zip(work.prompts, work.limits, strict=True))
    settings = ContinuousBatchingConfig(page_size=page_size, num_blocks=num_pages, max_batch_tokens=4096)
    manager = model.init_continuous_batching(generation, settings)
    manager.start()
    stack.callback(manager.stop, block=True)

    @torch.no_grad()
    def run() -> list[list[int]]:
        names = [
            manager.add_request(prompt, max_new_tokens=limit)
            for prompt, limit in zip(work.prompts, work.limits, strict=True)
        ]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            result = manager.get_result(timeout=60)
            if result is not None and result.is_finished():
                done[result.request_id] = list(result.generated_tokens)
        return [done[name] for name in names]

    return run


def step_time_row(size: str, threads: int, role: Role) -> dict[str, Any]:
    """Times of a decoding step of 32 requests: all short, one of them long, all long."""
    short, long = 32, LONG_CONTEXT
    cases = {"all short": [short] * 32, "one long": [short] * 31 + [long], "all long": [long] * 32}
    row: dict[str, Any] = {"model": size, "threads": threads, "what": "milliseconds of a step of 32 requests"}
    for name, lengths in cases.items():
        row[name] = 1e3 * statistics.median(step_times(role, Work([[1] * n for n in lengths], [24] * 32), GREEDY))
    print(row, flush=True)
    return row


def step_times(role: Role, work: Work, sampling: SamplingConfig) -> list[float]:
    """Seconds between one token and the next of the first request, without the first few."""
    moments: list[float] = []

    def note(row: int, token: int) -> None:
        if row == 0:
            moments.append(time.perf_counter())

    respond(role, work, sampling, on_token=note)
    return [b - a for a, b in itertools.pairwise(moments[4:])]


def gpu_rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Tokens per second, and the time of a decoding step against the bytes that it must read."""
    limits = ceilings(torch.device("cuda"), seconds=0.2)
    for size, shape in LARGE.items():
        role = make_model(shape, PatternReader(shape, seed=0, std=0.02), "bf16")
        for batch in GPU_BATCHES:
            work = Work([[1 + i % 1000] * GPU_TOKENS for i in range(batch)], [GPU_TOKENS] * batch)
            sampling = gpu_sampling(batch)
            mean_context = GPU_TOKENS + GPU_TOKENS // 2
            cache = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim * 2 * batch * mean_context
            weights = 2 * (shape.num_parameters() - shape.vocab_size * shape.hidden_size)
            if weights + 2 * cache > torch.cuda.get_device_properties(0).total_memory:
                continue
            for _ in range(repeats):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                respond(role, work, sampling)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - begin
            step = statistics.median(step_times(role, work, sampling))
            row = {
                "model": size,
                "batch": batch,
                "tokens/s": batch * GPU_TOKENS / seconds,
                "step, ms": 1e3 * step,
                "floor, ms": 1e3 * (weights + cache) / limits.bytes_per_second,
                "of the floor": (weights + cache) / limits.bytes_per_second / step,
                "GPU busy": busy_share(role, batch),
            }
            print(row, flush=True)
            yield row
        del role
        torch.cuda.empty_cache()


def gpu_sampling(batch: int) -> SamplingConfig:
    return GREEDY.model_copy(update={"batch_size": batch, "max_new_tokens": GPU_TOKENS})


def busy_share(role: Role, batch: int) -> float:
    """Share of the time between the first and the last kernel of some decoding steps in which one ran."""
    work = Work([[1 + i % 1000] * 8 for i in range(batch)], [64] * batch)
    respond(role, work, gpu_sampling(batch))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        respond(role, work, gpu_sampling(batch))
    spans = sorted((e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type.name == "CUDA")
    half = spans[len(spans) // 2 :]  # replayed graphs only
    busy, end = 0.0, half[0][0]
    for begin, stop in half:
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / (end - half[0][0])


def write(folder: Path, rows: list[dict[str, Any]], environment: dict[str, Any]) -> None:
    """README.md and results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    names = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    text = [
        f"# Generation on {environment['device']}",
        "",
        f"`{environment['command']}`, commit {environment['commit']}, {environment['date']}; {names}.",
        "",
    ]
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(tuple(row), []).append(row)
    for columns, members in kinds.items():
        text += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        text += [f"| {' | '.join(cell(row[column]) for column in columns)} |" for row in members]
        text.append("")
    (folder / "README.md").write_text("\n".join([*text, *(line for line in (__doc__ or "").splitlines()[4:]), ""]))
    print(f"wrote {folder}/README.md and results.json")


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
