"""What a stage needs of its configuration beyond what each section allows: combinations, folders and files."""

from importlib.util import find_spec
from pathlib import Path

from ppomax.engine.config import RunConfig
from ppomax.engine.config_models import RoleLayout
from ppomax.engine.errors import CheckpointError, DataError

MODELS_READ: dict[str, tuple[str, ...]] = {
    "sft": ("policy",),
    "reward": ("policy",),
    "critic": ("policy", "reward", "process", "critic", "reference"),
    "ppo": ("policy", "reward", "process", "critic", "reference"),
    "evaluate": ("policy", "reward", "process", "reference"),
    "generate": ("policy",),
    "score": ("reward",),
}
"""The folders of [model] that a stage reads, those of `generate` and `chat`, and that of commands which score."""

REWARDED = ("critic", "ppo", "evaluate")
"""The stages that reward responses."""


def models_needed(config: RunConfig, command: str) -> tuple[str, ...]:
    """The folders without which the stage cannot run; the others have a default."""
    if command not in REWARDED:
        return ()
    rewards = {"reward": "model", "process": "process"}
    return ("policy", *(role for role, kind in rewards.items() if config.has_reward(kind)))


def roles_in_use(config: RunConfig, command: str) -> tuple[str, ...]:
    """The roles that a stage runs: those whose layouts matter."""
    if command in ("sft", "generate"):
        return ("policy",)
    if command in ("reward", "score"):
        return ("reward",)
    reference, policy = config.model.reference, config.model.policy
    has_reference = {"critic": reference not in ("", policy), "evaluate": reference != ""}.get(command, True)
    return (
        "policy",
        *(("critic",) if command != "evaluate" else ()),
        *(("reference",) if has_reference else ()),
        *(("reward",) if config.has_reward("model") or config.has_reward("process") else ()),
    )


def impossible_combinations(config: RunConfig, command: str) -> list[str]:
    """One text per fault: what does not go together, or is missing, in this stage."""
    data, model, ppo, sampling, train = config.data, config.model, config.ppo, config.sampling, config.train
    samples = command in ("critic", "ppo", "evaluate", "generate")
    evaluates = command == "evaluate" or (command not in ("critic", "score") and config.monitor.eval_every > 0)
    roles = roles_in_use(config, command)
    placed = [f"parallel.{role}" for role in roles if not getattr(config.parallel, role).is_everywhere]
    epochs = {"sft": config.sft.epochs, "reward": config.reward.epochs}.get(command, 0.0)
    checks = {
        f"model.{role} is empty; set it to the Hugging Face folder of the {role} model": not getattr(model, role)
        for role in models_needed(config, command)
    }
    services = [source for source in config.ppo.rewards if source.kind == "http"]
    goes_back = "rollback" in (config.monitor.action, *config.monitor.actions.model_dump().values())
    checks |= {
        "monitor.action or one of monitor.actions is rollback, but checkpoint.every is 0: there is nothing to go back "
        "to; set checkpoint.every": command == "ppo" and goes_back and config.checkpoint.every == 0,
        "checkpoint.keep_best keeps checkpoints by their held-out evaluation, but monitor.eval_every is 0; set it to a "
        "divisor of checkpoint.every, or checkpoint.keep_best = 0": (
            command in ("sft", "reward", "ppo") and config.checkpoint.keep_best > 0 and config.monitor.eval_every == 0
        ),
        "checkpoint.keep_best keeps checkpoints by their held-out evaluation, which critic has not; set it to 0": (
            command == "critic" and config.checkpoint.keep_best > 0
        ),
        "model.tokenizer is empty and no model folder is given; set model.tokenizer to a tokenizer's folder or file": (
            not (model.tokenizer or model.policy or model.reward or model.critic)
        ),
        f"data.train is empty: {command} has nothing to learn from; set data.train to a file or a list of files": (
            command not in ("evaluate", "generate", "score") and not data.train
        ),
        "data.eval is empty, but held-out rows are to be evaluated; set data.eval (or monitor.eval_every = 0)": (
            evaluates and not data.eval
        ),
        "model.reward is empty and the critic starts from it; set model.critic to a scalar model's folder, or "
        'ppo.critic_init = "sft"': (
            command in ("critic", "ppo")
            and not (model.critic or model.reward or config.has_reward("model"))
            and ppo.critic_init == "reward"
        ),
        **{
            f"ppo.rewards: {source.label} may take {source.timeout_seconds * (source.retries + 1):g} s for one request "
            "with its retries, in which the other ranks give up (parallel.timeout_seconds); lower timeout_seconds or "
            "retries, or raise the other": (
                command in REWARDED and source.timeout_seconds * (source.retries + 1) >= config.parallel.timeout_seconds
            )
            for source in services
        },
        f"reward.min_pairs {config.reward.min_pairs} is larger than reward.max_pairs {config.reward.max_pairs}; "
        "set reward.max_pairs to at least reward.min_pairs": config.reward.min_pairs > config.reward.max_pairs,
        f"train.steps and {command}.epochs are both 0: there is nothing to do; set one of them": (
            command in ("sft", "reward") and train.steps == 0 and epochs == 0
        ),
        f"train.steps is 0: {command} needs its number of iterations; set train.steps": (
            command in ("critic", "ppo") and train.steps == 0
        ),
        f"sampling.max_new_tokens {sampling.max_new_tokens} leaves no room for a prompt in data.max_length "
        f"{data.max_length} tokens; lower the one or raise the other": (
            samples and sampling.max_new_tokens >= data.max_length
        ),
        'sampling.backend is "vllm", but vllm is not installed; install ppomax[vllm] in an environment of its own, or '
        'set sampling.backend = "embedded"': samples and sampling.backend == "vllm" and find_spec("vllm") is None,
        'monitor.rollouts_format is "parquet", but pyarrow is not installed; install it, or set '
        'monitor.rollouts_format = "jsonl"': (
            command == "ppo" and config.monitor.rollouts_format == "parquet" and find_spec("pyarrow") is None
        ),
        'sampling.backend is "vllm", which serves critic, ppo and evaluate; set sampling.backend = "embedded"': (
            command == "generate" and sampling.backend == "vllm"
        ),
        "ppo.over_sampling_size and ppo.overlap_scoring serve ppo alone; set them to 0 in this stage": (
            command == "critic" and ppo.over_sampling_size + ppo.overlap_scoring > 0
        ),
        "ppo.over_sampling_size and ppo.overlap_scoring act inside the embedded generator; set sampling.backend = "
        '"embedded", or both to 0': (
            command == "ppo" and ppo.over_sampling_size + ppo.overlap_scoring > 0 and sampling.backend == "vllm"
        ),
        "ppo.overlap_scoring scores between the steps of generation, on the ranks that sample, but "
        f"{', '.join(placed)} has ranks of its own; set ppo.overlap_scoring = 0, or no first_rank and num_ranks": (
            command == "ppo" and ppo.overlap_scoring > 0 and bool(placed)
        ),
        'sampling.backend is "vllm", whose processes must be all ranks of the run; leave parallel.policy without '
        'first_rank and num_ranks, or set sampling.backend = "embedded"': (
            samples and sampling.backend == "vllm" and "parallel.policy" in placed
        ),
        f"ppo.ptx_coef is {ppo.ptx_coef} but data.ptx is empty; set data.ptx to dialogues, or ppo.ptx_coef = 0": (
            command == "ppo" and ppo.ptx_coef > 0 and not data.ptx
        ),
        "ppo.kl_coef is 0, which the adaptive controller can only multiply; set a positive ppo.kl_coef to start from": (
            ppo.kl_controller == "adaptive" and ppo.kl_coef == 0
        ),
        'ppo.kl_estimator "full" compares whole distributions on one rank; set parallel.reference equal to '
        "parallel.policy": (
            command in ("critic", "ppo")
            and "reference" in roles
            and ppo.kl_estimator == "full"
            and split(config.parallel.reference) != split(config.parallel.policy)
        ),
        f"model.init.max_position_embeddings {model.init.max_position_embeddings} is shorter than data.max_length "
        f"{data.max_length}; raise the one or lower the other": (
            not (samples or command == "score" or model.policy) and model.init.max_position_embeddings < data.max_length
        ),
    }
    return [fault for fault, holds in checks.items() if holds]


def split(layout: RoleLayout) -> dict[str, object]:
    """How a layout spreads a model over ranks, wherever it keeps what waits."""
    return layout.model_dump(exclude={"offload"})


def check_paths(config: RunConfig, command: str) -> None:
    """Raises CheckpointError or DataError that lists the model folders and data files of the stage that are missing."""
    model, data, resume = config.model, config.data, config.train.resume
    folders = {f"model.{role}": getattr(model, role) for role in MODELS_READ[command]}
    models = [f"{key} = {path!r}: no such folder" for key, path in folders.items() if path and not Path(path).is_dir()]
    if model.tokenizer and not Path(model.tokenizer).exists():
        models.append(f"model.tokenizer = {model.tokenizer!r}: no such file or folder")
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        models.append(f"train.resume = {resume!r}: no such folder (it takes 'auto', 'never' or a checkpoint)")
    sources = {"train": data.train, "eval": data.eval, "ptx": data.ptx if command == "ppo" else ()}
    files = [
        f"data.{key}: {source.path!r}: no such file"
        for key, rows in sources.items()
        for source in rows
        if not source.path.startswith("datasets:") and not Path(source.path).exists()
    ]
    faults = "\n".join([*models, *files, f"Paths are relative to the current folder, {Path.cwd()}"])
    if models:
        raise CheckpointError(faults)
    if files:
        raise DataError(faults)
