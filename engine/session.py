"""What every stage needs before its own work: device, process groups, tokenizer, template, log; and a clean end."""

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.checkpoint import load_checkpoint
from ppomax.engine.checkpoint_folders import Retention, step_folder
from ppomax.engine.checkpoint_saver import Saver
from ppomax.engine.checkpoint_verify import VerifiedCheckpoint, find_checkpoint, verify_checkpoint
from ppomax.engine.checkpoint_writers import InlineWriter, ProcessWriter
from ppomax.engine.config import RunConfig
from ppomax.engine.data.chat import Template, make_template
from ppomax.engine.data.datasets import PromptRow
from ppomax.engine.data.tokenizer import Tokenizer, load_tokenizer
from ppomax.engine.errors import CheckpointError, ConfigError, DivergedError, DoesNotFitError, RunStopped
from ppomax.engine.metrics import RunLog
from ppomax.engine.models.hf_checkpoint import save_hf
from ppomax.engine.models.hf_export import export_weights
from ppomax.engine.models.identity import ModelIdentity
from ppomax.engine.models.process_model import delimiter_to_keep
from ppomax.engine.models.roles import Role, as_scalar, role_groups
from ppomax.engine.models.shape import ModelShape
from ppomax.engine.models.transformer import DTYPES
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.parallel.device import start, stop
from ppomax.engine.parallel.environment import settings
from ppomax.engine.parallel.groups import RoleGroups
from ppomax.engine.parallel.stop_signal import StopSignal
from ppomax.engine.parallel.watchdog import Watchdog
from ppomax.engine.plan.run import MemoryMeter, plan_run
from ppomax.engine.plan.summary import measured_lines, plan_record, summary_lines
from ppomax.engine.ppo.evaluation import EVALUATION_STEP
from ppomax.engine.ppo.types import Rollout
from ppomax.engine.resume_checks import check_resume, frozen_models, pinned
from ppomax.engine.rollout.backend import RolloutRequest, as_rollout
from ppomax.engine.rollout.candidates import best_of
from ppomax.engine.rollout.generate import generate, request_seeds
from ppomax.engine.rollout.vllm_backend import VllmBackend
from ppomax.engine.rollout.watch import MakeWatch
from ppomax.engine.run_records import last_rollback
from ppomax.engine.steps import StepCounter, require_finite_weights
from ppomax.engine.trace import Trace

TRAINING_STAGES = ("sft", "reward", "critic", "ppo")
BEST = {
    "sft": ("loss", True),
    "reward": ("accuracy", False),
    "critic": ("", False),
    "ppo": ("reward", False),
    "evaluate": ("", False),
}
"""By which metric of held-out evaluations checkpoint.keep_best chooses, and whether lower is better."""
SAMPLING_STAGES = ("critic", "ppo", "evaluate")


@dataclass(frozen=True)
class Session:
    """One stage on this rank. resume: the checkpoint to go on from, if any. frozen: the models that are not trained, as
    checkpoints pin them. saver: writes checkpoints. vllm: with sampling.backend = "vllm". trace: with monitor.trace.
    stop: what signals asked for; `end_step` looks.
    """

    config: RunConfig
    device: torch.device
    groups: dict[str, RoleGroups]
    tokenizer: Tokenizer
    template: Template
    log: RunLog
    resume: VerifiedCheckpoint | None
    frozen: dict[str, ModelIdentity]
    saver: Saver
    vllm: VllmBackend | None
    trace: Trace | None
    stop: StopSignal

    @property
    def world_size(self) -> int:
        return dist.get_world_size()


@contextlib.contextmanager
def open_session(config: RunConfig, command: str, *, tokenizer_source: str) -> Iterator[Session]:
    """Plans and starts a stage, and leaves the process group at its end. tokenizer_source: the model folder that has
    the tokenizer. Raises DoesNotFitError, before anything is allocated, where the plan exceeds the GPU's memory.
    """
    path = config.model.tokenizer or tokenizer_source
    if not path:
        raise ConfigError("no tokenizer: set model.tokenizer to a tokenizer folder or file")
    tokenizer = load_tokenizer(path)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    plan = plan_run(config, command, world_size, vocab_size=lambda: tokenizer.vocab_size)
    device = start(config.parallel.timeout_seconds, agreed=settings(config))
    stop_signal, stopped = StopSignal(config.train.stop_seconds), None
    watchdog = Watchdog(config.parallel.timeout_seconds)
    saver: Saver | None = None
    try:
        meter = MemoryMeter(device)
        groups = role_groups(config)
        template = make_template(config.data, tokenizer)
        found = find_checkpoint(config.train.resume, checkpoint_folder(config))
        resume = found.checkpoint
        frozen = frozen_models(config, command)
        notes = check_resume(resume, config, frozen) if resume else []
        with raise_on_all(ConfigError, f"train.output {config.train.output} cannot be written"):
            log = RunLog(
                config,
                command,
                is_writer=dist.get_rank() == 0,
                resumed=resume is not None,
                resumed_step=resume.step if resume else None,
            )
        for line in (*found.notes, *notes, *summary_lines(plan)):
            log.say(line)
        saver = Saver(
            checkpoint_folder(config),
            ProcessWriter() if config.checkpoint.asynchronous else InlineWriter(),
            Retention(
                config.checkpoint.keep, config.checkpoint.keep_every, config.checkpoint.keep_best, *BEST[command]
            ),
            resumed=resume,
            timeout_seconds=config.parallel.timeout_seconds,
        )
        log.write_json("plan.json", plan_record(plan, None, what=meter.what))
        vllm = _vllm(config, groups["policy"], tokenizer) if command in SAMPLING_STAGES else None
        trace = None
        if config.monitor.trace:
            trace = Trace(Path(config.train.output) / "traces" / f"rank_{dist.get_rank()}.json", dist.get_rank())
        # A stage that saves nothing is ended by the signal itself.
        with stop_signal if command in TRAINING_STAGES else contextlib.nullcontext():
            try:
                yield Session(
                    config, device, groups, tokenizer, template, log, resume, frozen, saver, vllm, trace, stop_signal
                )
            except RunStopped as reason:
                stopped = reason
        saver.finish()
        saver.close()
        log.close()
        if vllm is not None:
            vllm.close()
        peaks = meter.peaks()
        for line in measured_lines(plan, peaks, what=meter.what):
            log.say(line)
        log.write_json("plan.json", plan_record(plan, peaks, what=meter.what))
    except BaseException as error:
        watchdog.explain(error)
        if saver is not None:
            if isinstance(error, DivergedError):  # on all ranks
                saver.last_good()
            saver.close()
        # Peers may wait in a collective: leaving the group could wait for them in turn. The process ends, and torchrun
        # ends the others.
        if dist.get_world_size() == 1:
            stop()
        if isinstance(error, torch.OutOfMemoryError):
            raise DoesNotFitError(
                f"rank {os.environ.get('RANK', '0')} ran out of memory: {error}\n{summary_lines(plan)[-1]}; lower "
                "train.tokens_per_microbatch or sampling.cache_gib, set model.recompute=full, or raise tp or pp "
                "(`ppomax plan` tries changes)"
            ) from error
        raise
    watchdog.stop()
    stop()
    if stopped is not None:
        raise stopped


def _vllm(config: RunConfig, groups: RoleGroups, tokenizer: Tokenizer) -> VllmBackend | None:
    """vLLM for the policy, not started yet, where sampling.backend asks for it."""
    if config.sampling.backend != "vllm":
        return None
    return VllmBackend(
        config.model.policy,
        groups,
        dtype=config.model.dtype,
        sampling=config.sampling,
        eos_id=tokenizer.eos_id,
        max_length=config.data.max_length,
    )


def checkpoint_folder(config: RunConfig) -> str:
    return str(Path(config.train.output) / "checkpoints")


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens after `step`."""
    return every > 0 and step % every == 0


def restore(session: Session, roles: Mapping[str, Role]) -> dict[str, Any]:
    """Fills the trained roles from the checkpoint to go on from; returns its state. Collective over all ranks."""
    assert session.resume is not None
    content, changes = load_checkpoint(session.resume, roles)
    for change in changes:
        session.log.say(change)
    return content["state"]


def go_back(session: Session, step: int, roles: Mapping[str, Role]) -> tuple[VerifiedCheckpoint, dict[str, Any]]:
    """Fills the trained roles from the run's own checkpoint of an earlier step; returns it and its state. Later ones
    are set aside: no resume goes on from them. Collective over all ranks; raises CheckpointError.
    """
    session.saver.finish()
    checkpoint = verify_checkpoint(step_folder(checkpoint_folder(session.config), step))
    content, _ = load_checkpoint(checkpoint, roles)
    session.saver.go_back(checkpoint)
    return checkpoint, content["state"]


def rollback_to(session: Session, step: int) -> dict[str, Any] | None:
    """The record of the rollback with which the run in this folder came to a step last; None where it came by training.
    Collective over all ranks.
    """
    found: list[Any] = [None]
    with raise_on_all(CheckpointError, f"{session.log.folder}/metrics.jsonl cannot be read"):
        if session.log.is_writer:
            found = [last_rollback(session.log.folder / "metrics.jsonl", step)]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def end_step(
    session: Session, step: int, roles: Mapping[str, Role], state: Mapping[str, Any], counter: StepCounter
) -> None:
    """The end of a step of a stage: goes on with a checkpoint that is being written, begins one after every
    checkpoint.every steps, and where a signal asked any rank to stop; there it waits for it and raises RunStopped.
    Collective over all ranks.

    state: what a resumed run needs besides the roles, as JSON can hold it.
    """
    saver = session.saver
    asked = session.stop.agreed()
    saver.poll()
    if asked or is_due(session.config.checkpoint.every, step):
        require_finite_weights(roles.values(), counter)
        content = {"state": dict(state), "evaluation": session.log.evaluated.get(step)}
        beside = partial(_export_beside, session, roles) if session.config.checkpoint.hf else None
        saver.save(step, roles, {**content, **pinned(session.config, session.frozen)}, export=beside)
    if asked or not session.config.checkpoint.asynchronous:
        saver.finish()
    if asked:
        raise RunStopped(
            f"stopped after step {step}, as {signal.Signals(asked).name} asked: wrote {saver.published}; the same "
            "command with train.resume=auto goes on from it"
        )


def sample(
    session: Session,
    policy: Role,
    rows: Sequence[PromptRow],
    step: int,
    *,
    samples: int = 1,
    watch: MakeWatch | None = None,
) -> Rollout:
    """Responses to each prompt, with the run's sampling settings; their noise is fixed by train.seed and the step.

    watch: looks on while the embedded generator samples.
    """
    config, tokenizer = session.config, session.tokenizer
    prompts = [row.tokens for row in rows]
    seeds = torch.stack([request_seeds(config.train.seed, step, len(rows), sample=s) for s in range(samples)], dim=1)
    seeds = seeds.flatten()
    if session.vllm is not None:
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        return _sample_in_vllm(session, session.vllm, policy, repeated, seeds, step)
    return generate(
        policy,
        prompts,
        config.sampling,
        seeds=seeds,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        max_length=config.data.max_length,
        samples=samples,
        watch=watch,
    )


def sample_held_out(session: Session, policy: Role, rows: Sequence[PromptRow]) -> Rollout:
    """One response to each held-out prompt, the best of monitor.eval_best_of; every evaluation of a run draws the same
    noise.
    """
    samples = session.config.monitor.eval_best_of
    rollout = sample(session, policy, rows, EVALUATION_STEP, samples=samples)
    return best_of(rollout, samples, length_penalty=session.config.sampling.length_penalty)


def _sample_in_vllm(
    session: Session, vllm: VllmBackend, policy: Role, prompts: Sequence[Sequence[int]], seeds: Tensor, step: int
) -> Rollout:
    """vLLM takes over the policy's weights for each rollout and leaves the memory to training after it."""
    sampling = session.config.sampling
    requests = [
        RolloutRequest(b, tuple(prompt), sampling, seed, sampling.max_new_tokens)
        for b, (prompt, seed) in enumerate(zip(prompts, seeds.tolist(), strict=True))
    ]
    vllm.setup()
    vllm.wake()
    dtype = DTYPES[session.config.model.dtype]
    with policy.memory.resident("weights"):
        vllm.load(export_weights(policy.chunks, policy.shape, policy.groups, dtype, everywhere=True), step)
    completions = vllm.generate(requests)
    vllm.sleep(2)
    return as_rollout(requests, completions, pad_id=session.tokenizer.pad_id, device=policy.device)


def export(session: Session, role: Role, name: str, *, shape: ModelShape | None = None) -> str:
    """Writes a role as a Hugging Face folder train.output/`name`. Collective over all ranks of the run."""
    folder = str(Path(session.config.train.output) / name)
    _export_to(session, role, shape or role.shape, folder)
    session.log.say(f"wrote {folder}")
    return folder


def _export_beside(session: Session, roles: Mapping[str, Role], folder: Path) -> None:
    """Writes hf/ROLE into the folder of a checkpoint, as the stage exports them at its end."""
    for name, role in roles.items():
        shape = role.shape if name == "policy" else as_scalar(role.shape)
        _export_to(session, role, shape, str(folder / "hf" / name))


def _export_to(session: Session, role: Role, shape: ModelShape, folder: str) -> None:
    with role.memory.resident("weights"):
        save_hf(
            role.chunks,
            shape,
            role.groups,
            folder,
            dtype=DTYPES[session.config.model.dtype],
            tokenizer=session.tokenizer,
            step_delimiter=delimiter_to_keep(session.config, role.name),
        )
