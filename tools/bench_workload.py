"""What bench_ppo.py runs: random models, a tokenizer and prompts of given lengths, as a real run finds them on disk.

Responses end by EOS with a chosen probability per token, the same for every engine that loads the folders.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from ppomax.engine.config import DataConfig, RunConfig
from ppomax.engine.config_file import load_config
from ppomax.engine.data.chat import Turn, make_template
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.shape import ModelShape

PAD, BOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<s>", "</s>")
INIT_STD = 0.02
CONSTANT = 4.0
"""Of the first hidden unit, from which the head reads the logit of EOS."""


@dataclass(frozen=True)
class Workload:
    """One iteration. prompt_tokens: of every prompt, template included. mean_new_tokens: of a response that no limit
    cuts, None for responses of exactly max_new_tokens. minibatches: optimizer steps of an iteration.
    """

    shape: ModelShape
    prompts: int
    prompt_tokens: int
    max_new_tokens: int
    mean_new_tokens: float | None
    minibatches: int
    dtype: str = "fp32"


def make_files(work: Workload, folder: Path) -> dict[str, Any]:
    """Writes the models and prompts into a folder; returns the sections of a configuration that runs them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("policy", "reward", "critic"):
        _write_model(work, folder / name, scalar=name != "policy", seed=len(name))
    _write_prompts(work, folder)
    exact = work.mean_new_tokens is None
    return {
        "model": {**{name: str(folder / name) for name in ("policy", "reward", "critic")}, "dtype": work.dtype},
        "data": {"train": str(folder / "prompts.jsonl"), "max_length": work.prompt_tokens + work.max_new_tokens},
        "sampling": {
            "temperature": 1.0,
            "top_p": 1.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": work.max_new_tokens,
            "min_new_tokens": work.max_new_tokens if exact else 0,
            "batch_size": work.prompts,
        },
        "ppo": {
            "rollout_size": work.prompts,
            "minibatch_size": work.prompts // work.minibatches,
            # In fp32 the sampler's log-probs are the trainer's; TRL takes them from there, too.
            "old_logprobs": "rollout" if work.dtype == "fp32" else "recompute",
        },
        "optim": {"schedule": "constant", "lr": 1e-6, "critic_lr": 1e-6},
    }


def _write_model(work: Workload, folder: Path, *, scalar: bool, seed: int) -> None:
    shape = replace(work.shape, scalar=scalar, tie_embeddings=False)
    reader = RandomReader(shape, seed=seed, std=INIT_STD)
    weights = {name: reader.read(name).contiguous() for name in reader.sizes}
    if not scalar:
        end_by_chance(weights, shape, work.mean_new_tokens)
    dtype = torch.float32 if work.dtype == "fp32" else torch.bfloat16
    folder.mkdir(exist_ok=True)
    save_file({name: x.to(dtype) for name, x in weights.items()}, folder / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    config = config_json(shape, dtype=name, bos_id=BOS, eos_id=EOS, pad_id=PAD)
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer(shape.vocab_size).save(str(folder / "tokenizer.json"))
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def end_by_chance(weights: dict[str, Tensor], shape: ModelShape, mean: float | None) -> None:
    """Gives EOS the probability 1 / mean at every place, nearly none without a mean; padding is never drawn.

    The first hidden unit is a constant that no layer writes to; after the last norm it is about constant still, since
    it outweighs the others. The head reads the logits of EOS and padding from it alone.
    """
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, 0] = CONSTANT
    for layer in range(shape.num_layers):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weights[f"model.layers.{layer}.{name}.weight"][0] = 0
    normed = math.sqrt(shape.hidden_size)  # CONSTANT over the root mean square of a vector that is nearly all there
    others = math.log(shape.vocab_size - 2)  # logits of about 0
    chance = 1e-9 if mean is None else 1 / mean
    head[:, 0] = 0
    head[[EOS, PAD]] = 0
    head[EOS, 0] = (others + math.log(chance / (1 - chance))) / normed
    head[PAD, 0] = -30 / normed


def _tokenizer(vocab_size: int) -> Tokenizer:
    words = {word: i for i, word in enumerate((*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocab_size))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{len(SPECIAL)}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def _write_prompts(work: Workload, folder: Path) -> None:
    template = make_template(DataConfig(), load_tokenizer(str(folder / "policy")))

    def text(num_words: int, seed: int) -> str:
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(len(SPECIAL), work.shape.vocab_size, (num_words,), generator=draw).tolist()
        return " ".join(f"w{i}" for i in ids)

    around = len(template.encode_prompt([Turn("human", text(1, 0))])) - 1
    num_words = work.prompt_tokens - around
    rows = [{"prompt": text(num_words, b)} for b in range(4 * work.prompts)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def shared_folder(scratch: Path) -> Path:
    """The same folder for all ranks of a host: named by the run of torchrun."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return scratch if run is None else Path(tempfile.gettempdir()) / f"bench_ppo_{run}_{os.environ['MASTER_PORT']}"


def bench_config(work: Workload, folder: Path, overrides: Sequence[str]) -> RunConfig:
    """The run of a workload, whose files it makes in a folder that all ranks of the host share."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        sections = make_files(work, folder)
        sections["train"] = {"output": str(folder / "run"), "log_every": 10**9}
        (folder / "bench.partial").write_text(_toml(sections))
        (folder / "bench.partial").rename(folder / "bench.toml")
    while not (folder / "bench.toml").exists():  # the first rank of the host makes it
        time.sleep(0.1)
    return load_bench_config(folder, overrides)


def load_bench_config(folder: Path, overrides: Sequence[str]) -> RunConfig:
    """As bench_config, which has made the files."""
    return load_config(str(folder / "bench.toml"), list(overrides), command="ppo")


def _toml(sections: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"
