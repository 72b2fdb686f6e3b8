"""A tiny world for tests that run whole stages: Hugging Face folders, a tokenizer, data files, configurations."""

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of two test processes that wait for each other on two cores would spend the time that they save.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

if not torch.cuda.is_available():
    # Triton reads this when it is imported: the tests of kernels/ run its kernels in its interpreter. Everything else
    # runs what such a machine has without these variables: torch references, and C kernels in generation.
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PPOMAX_KERNELS"] = "cpu"

from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.shape import ModelShape

# An example that takes long is no fault: on a busy machine any may.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist tests of one file stay in one process, and all of tests/dist in the same: they share ranks."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "dist" if "/dist/" in file else file

    return ByFile(config, log)


BOS, EOS, PAD = 274, 275, 276
LIKELY_BYTES = slice(64, 74)  # "abcdefghij": a byte-level vocabulary starts with "!"
SEEDS = {"policy": 1, "reward": 2, "critic": 3}
# 277 tokens: padded at every tp > 1. Two query heads per key / value head.
SHAPE = ModelShape(
    vocab_size=277,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_query_groups=2,
    head_dim=8,
    ffn_hidden_size=48,
    max_position_embeddings=160,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)


class Tiny:
    """Folders and files, made once per session; `config` gives what `RunConfig.model_validate` takes.

    Texts are ragged: from 1 to 50 characters, two or four turns.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tokenizer = _tokenizer()
        draw = random.Random(0)
        self._write("prompts.jsonl", [{"prompt": _text(draw)} for _ in range(40)])
        self._write("dialogues.jsonl", [{"messages": _turns(draw)} for _ in range(40)])
        self._write("pairs.jsonl", [_pair(draw) for _ in range(40)])

    def path(self, name: str) -> str:
        return str(self.root / name)

    def model(self, name: str, *, tied: bool = False, num_layers: int = SHAPE.num_layers) -> str:
        """The folder of a random model: "policy" has a vocabulary head, "reward" and "critic" a scalar head."""
        is_tied = tied and name == "policy"
        shape = replace(SHAPE, num_layers=num_layers, tie_embeddings=is_tied, scalar=name != "policy")
        folder = self.root / f"{name}{'_tied' if is_tied else ''}_{num_layers}"
        if not folder.exists():
            folder.mkdir()
            reader = RandomReader(shape, seed=SEEDS[name], std=0.12)
            weights = {weight: reader.read(weight).contiguous() for weight in reader.sizes}
            if not shape.scalar:
                _prefer_likely_tokens(weights)
            save_file(weights, folder / "model.safetensors")
            config = config_json(shape, dtype="float32", bos_id=BOS, eos_id=EOS, pad_id=PAD)
            (folder / "config.json").write_text(json.dumps(config))
            self.tokenizer.save(str(folder / "tokenizer.json"))
        return str(folder)

    def config(
        self,
        stage: str,
        output: Path,
        *,
        tied: bool = False,
        num_layers: int = SHAPE.num_layers,
        **overrides: dict[str, Any],
    ) -> dict[str, Any]:
        """A few optimizer steps of a stage. overrides: sections, merged into those made here."""
        data = {"sft": "dialogues", "reward": "pairs", "critic": "prompts", "ppo": "prompts"}[stage]
        sections: dict[str, dict[str, Any]] = {
            "model": {"policy": self.model("policy", tied=tied, num_layers=num_layers)},
            "data": {"train": self.path(f"{data}.jsonl"), "max_length": 160},
            "optim": {"lr": 1e-3, "critic_lr": 1e-3, "schedule": "constant", "warmup_steps": 0},
            "train": {"output": str(output), "steps": 3, "batch_size": 3, "tokens_per_microbatch": 200, "seed": 24},
        }
        if stage in ("sft", "reward"):
            sections["data"]["eval"] = self.path(f"{data}.jsonl")
            sections["reward"] = {"tokens_per_batch": 500, "lm_coef": 0.5}
        else:
            sections["model"] |= {name: self.model(name, num_layers=num_layers) for name in ("reward", "critic")}
            sections["train"]["steps"] = 2
            sections["sampling"] = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
            sections["ppo"] = {"rollout_size": 12, "minibatch_size": 6, "epochs": 2}
        if stage == "ppo":
            sections["data"]["ptx"] = self.path("dialogues.jsonl")
            sections["ppo"] |= {"ptx_coef": 0.5, "ptx_ratio": 0.5, "entropy_coef": 0.01, "advantage_norm": True}
        for name, values in overrides.items():
            sections[name] = {**sections.get(name, {}), **values}
        return sections

    def _write(self, name: str, rows: list[dict[str, Any]]) -> None:
        (self.root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prefer_likely_tokens(weights: dict[str, Tensor]) -> None:
    """Makes the first hidden unit always positive, and the head read lower-case letters and EOS from it."""
    embedding = weights["model.embed_tokens.weight"]
    embedding[:, 0] += 2
    head = weights.get("lm_head.weight", embedding)
    head[LIKELY_BYTES, 0] += 0.8
    head[EOS, 0] += 1.4


def _text(draw: random.Random) -> str:
    """Long texts are of likely letters, short ones of unlikely letters: losses per token differ from text to text."""
    length = draw.choice((draw.randint(1, 6), draw.randint(20, 50)))
    return "".join(draw.choice("abcdefghij" if length > 6 else "KLMNOPQRST") for _ in range(length))


def _turns(draw: random.Random) -> list[dict[str, str]]:
    """Long answers to short questions, and the other way round."""
    texts = sorted((_text(draw) for _ in range(draw.choice((2, 2, 2, 4)))), key=len, reverse=draw.random() < 0.5)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _pair(draw: random.Random) -> dict[str, str]:
    (question, answer), (_, other) = ([turn["content"] for turn in _turns(draw)[-2:]] for _ in range(2))
    prompt = f"\n\nHuman: {question}\n\nAssistant: "
    return {"chosen": f"{prompt}{answer}y", "rejected": f"{prompt}{other}n"}


def _tokenizer() -> Tokenizer:
    """All bytes, 18 merges that spell the role markers, three special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=BOS, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["Human: Assistant: abcdefghij"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<pad>")])
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    torch.set_num_threads(1)
    return Tiny(tmp_path_factory.mktemp("tiny"))


@dataclass
class JsonService:
    """A local HTTP service. `answer` gets the number of the request (from 0) and its JSON, and returns what is sent:
    JSON for status 200, or (status, headers, bytes), or a list of bytes to be sent one each 0.1 s; or it raises
    ConnectionAbortedError to hang up.
    """

    answer: Callable[[int, Any], Any] = lambda number, body: {}
    url: str = ""
    bodies: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


@pytest.fixture
def json_service(monkeypatch: pytest.MonkeyPatch) -> Iterator[JsonService]:
    service = JsonService()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with service.lock:
                number = len(service.bodies)
                service.bodies.append({"path": self.path, **body})
                service.headers.append(dict(self.headers))
            try:
                answer = service.answer(number, body)
                is_raw = isinstance(answer, tuple)
                status, headers, content = answer if is_raw else (200, {}, json.dumps(answer).encode())
                self.send_response(status)
                pieces = content if isinstance(content, list) else [content]
                for name, value in ({"Content-Length": str(sum(map(len, pieces)))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                for piece in pieces:
                    self.wfile.write(piece)
                    time.sleep(0.1 if len(pieces) > 1 else 0)
            except (ConnectionAbortedError, ConnectionResetError, BrokenPipeError):
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        service.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield service
        server.shutdown()
