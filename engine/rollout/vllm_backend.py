"""vLLM in the trainer's processes, behind the rollout protocol.

Each replica of the policy has an engine of its own: its ranks, whatever tp and pp the trainer gives them, are one
tensor-parallel group of vLLM (its "external launcher": every rank runs scheduler and worker, with equal decisions).
Weights come from the trainer, tensor by tensor. Only `setup` imports vllm.
"""

import contextlib
import gc
import os
import unittest.mock
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.config import SamplingConfig
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.engine.rollout.backend import Completion, FinishReason, RolloutRequest, finished_early
from ppomax.engine.rollout.vllm_penalty import make_penalty_processor

GIB = 2**30
CACHE_SHARE = 0.5
"""Of the GPU memory that is free after the weights, what the cache takes where sampling.cache_gib is 0."""
CPU_CACHE_GIB = 1.0
"""The cache on a CPU where sampling.cache_gib is 0; vLLM would take nearly all memory."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the external launcher works in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads stay where they are
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmBackend:
    """A RolloutBackend. Its noise is vLLM's own: the same seed gives other tokens than the embedded engine.

    folder: Hugging Face folder whose config.json says what the model is; weights are not read. dtype: "fp32" or "bf16".
    sampling: batch_size, tokens_per_step and cache_gib of the engine. eos_id: ends a response; negative: nothing does.
    max_length: tokens of prompt and response, where the model's context is not to be used to its end.
    """

    def __init__(
        self,
        folder: str,
        groups: RoleGroups,
        *,
        dtype: str,
        sampling: SamplingConfig,
        eos_id: int,
        max_length: int | None = None,
    ) -> None:
        self._folder, self._groups, self._dtype, self._sampling, self._eos_id = folder, groups, dtype, sampling, eos_id
        self._shape = read_shape(folder)
        self._context = min(self._shape.max_position_embeddings, max_length or self._shape.max_position_embeddings)
        self._llm: Any = None
        self._version: int | None = None
        self._is_asleep = False
        self._aborted: set[int] = set()

    def setup(self) -> None:
        if self._llm is not None:
            return
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        with _rank_in_environment():
            self._llm = LLM(**self._arguments())

    def load(self, named_tensors: Iterator[tuple[str, Tensor]], version: int) -> None:
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_tensors})
        self._llm.reset_prefix_cache()
        self._version = version

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Completion]:
        version = self._version
        assert version is not None, "vLLM has no weights; call load first"
        assert not self._is_asleep, "vLLM sleeps; call wake first"
        layout = self._groups.layout
        own: dict[int, Completion] = {}
        running: dict[int, RolloutRequest] = {}
        for b in range(self._groups.dp_rank, len(requests), layout.dp):
            early = finished_early(
                requests[b],
                aborted=self._aborted,
                vocab_size=self._shape.vocab_size,
                context=self._context,
                version=version,
            )
            if early is not None:
                own[b] = early
            else:
                running[b] = requests[b]
        own |= self._run(running, version)
        self._aborted.clear()
        shares = [own]
        if layout.dp > 1:
            shares *= layout.dp
            dist.all_gather_object(shares, own, group=self._groups.megatron.dp)
        results = {b: completion for share in shares for b, completion in share.items()}
        return [results[b] for b in range(len(requests))]

    def abort(self, ids: Collection[int]) -> None:
        """Running requests end at the next step, with what they have."""
        self._aborted.update(ids)

    def sleep(self, level: int) -> None:
        """On a CPU vLLM cannot give memory back: weights and cache stay."""
        self._llm.sleep(level)
        self._is_asleep = True
        if level == 2:
            self._version = None

    def wake(self) -> None:
        if not self._is_asleep:
            return
        self._is_asleep = False
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the trainer's allocator may hold what vLLM gave back
        self._llm.wake_up()

    def close(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import destroy_model_parallel

        # The engine would end all process groups of torch with its own: those of the trainer stay.
        with unittest.mock.patch("vllm.v1.engine.core.cleanup_dist_env_and_memory", destroy_model_parallel):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = self._version = None
        gc.collect()

    def _arguments(self) -> dict[str, Any]:
        """Those of vLLM's LLM."""
        has_gpu = torch.cuda.is_available()
        layout, sampling = self._groups.layout, self._sampling
        return {
            "model": self._folder,
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[self._dtype],
            "max_model_len": self._context,
            "max_num_seqs": sampling.batch_size,
            "max_num_batched_tokens": max(sampling.tokens_per_step, sampling.batch_size),
            "kv_cache_memory_bytes": self._cache_bytes(has_gpu),
            "tensor_parallel_size": layout.tp * layout.pp,
            "distributed_executor_backend": "external_launcher",
            "async_scheduling": False,  # the penalty needs the newest token
            "logprobs_mode": "raw_logprobs",
            "logits_processors": [make_penalty_processor()],
            "enable_sleep_mode": has_gpu,
            "enforce_eager": not has_gpu,
            "seed": 0,
        }

    def _cache_bytes(self, has_gpu: bool) -> int:
        if self._sampling.cache_gib > 0 or not has_gpu:
            return int((self._sampling.cache_gib or CPU_CACHE_GIB) * GIB)
        torch.cuda.empty_cache()  # vLLM cannot take what idle roles have left in torch's cache
        item_size = {"fp32": 4, "bf16": 2}[self._dtype]
        weights = self._shape.num_parameters() * item_size // (self._groups.layout.tp * self._groups.layout.pp)
        return int(CACHE_SHARE * max(0, torch.cuda.mem_get_info()[0] - weights))

    def _run(self, requests: dict[int, RolloutRequest], version: int) -> dict[int, Completion]:
        """Takes vLLM's steps until all requests of this replica have ended."""
        from vllm.inputs import TokensPrompt

        engine = self._llm.llm_engine
        tokens: dict[int, list[int]] = {b: [] for b in requests}
        logprobs: dict[int, list[float]] = {b: [] for b in requests}
        done: dict[int, Completion] = {}

        def end(b: int, reason: FinishReason) -> None:
            done[b] = Completion(tuple(tokens[b]), tuple(logprobs[b]), reason, version)

        for b, request in requests.items():
            engine.add_request(str(b), TokensPrompt(prompt_token_ids=list(request.prompt)), self._params(request))
        while engine.has_unfinished_requests():
            aborted = [b for b, request in requests.items() if request.id in self._aborted and b not in done]
            engine.abort_request([str(b) for b in aborted])
            for b in aborted:
                end(b, "abort")
            for result in engine.step():
                b, new = int(result.request_id), result.outputs[0]
                if b in done:
                    continue
                tokens[b] += new.token_ids
                logprobs[b] += [new.logprobs[i][token].logprob for i, token in enumerate(new.token_ids)]
                if new.finish_reason == "stop":
                    end(b, "eos")
                elif _has_stopped(requests[b], tokens[b]):
                    engine.abort_request([] if result.finished else [str(b)])
                    end(b, "stop")
                elif result.finished:
                    end(b, "length")
        return done

    def _params(self, request: RolloutRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        longest = min(request.max_new_tokens, self._context - len(request.prompt))
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            extra_args={"repetition_penalty": sampling.repetition_penalty},
            seed=request.seed,
            max_tokens=longest,
            min_tokens=min(sampling.min_new_tokens, longest),
            stop_token_ids=[self._eos_id] if self._eos_id >= 0 else [],
            ignore_eos=True,  # eos_id is the trainer's, not the folder's
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )


@contextlib.contextmanager
def _rank_in_environment() -> Iterator[None]:
    """vLLM reads its rank there. Without torchrun the world is this process, and nobody has written it."""
    missing = {} if "RANK" in os.environ else {"RANK": "0", "LOCAL_RANK": "0"}
    os.environ.update(missing)
    yield
    for name in missing:
        del os.environ[name]


def _has_stopped(request: RolloutRequest, tokens: list[int]) -> bool:
    """Whether one of the request's stop sequences is the end of the response, and counts."""
    if len(tokens) < request.sampling.min_new_tokens:
        return False
    return any(tuple(tokens[-len(stop) :]) == stop for stop in request.stop_sequences)
