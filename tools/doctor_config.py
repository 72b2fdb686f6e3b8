"""What `ppomax doctor` checks of a configuration on these ranks: files, layout, plan, and the folder it writes into."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppomax.engine.config import RunConfig
from ppomax.engine.config_checks import check_paths, roles_in_use
from ppomax.engine.config_file import load_config
from ppomax.engine.data.tokenizer import load_tokenizer
from ppomax.engine.dry_run import check_models
from ppomax.engine.errors import CheckpointError, PpomaxError
from ppomax.engine.parallel.layout import check_layout
from ppomax.engine.plan.plan import Plan
from ppomax.engine.plan.run import plan_run
from ppomax.engine.plan.summary import summary_lines
from ppomax.tools.doctor_findings import GIB, Finding

TEST_BYTES = 2**26
TOKEN = ".ppomax-doctor"
ADAM_BYTES = 12
"""Per parameter in a checkpoint besides the weights: main weight and two moments in fp32."""
LEAST_INODES = 10_000


def check_config(
    path: str | None, overrides: Sequence[str], command: str, world_size: int
) -> tuple[list[Finding], RunConfig | None, int]:
    """Findings, the configuration where it can be read, and the bytes that it needs for checkpoints."""
    findings: list[Finding] = []
    try:
        config = load_config(path, list(overrides), command=command)
    except PpomaxError as error:
        return [_failed("configuration", error)], None, 0
    try:
        check_layout(config, world_size, roles_in_use(config, command))
        findings.append(Finding("layout", "OK", f"{command} on {world_size} ranks"))
        check_paths(config, command)
        models = check_models(config, command)
        findings.append(Finding("models", "OK", "; ".join(models) or "random weights"))
        tokenizer = config.model.tokenizer or config.model.policy or config.model.reward
        plan = plan_run(config, command, world_size, vocab_size=lambda: load_tokenizer(tokenizer).vocab_size)
    except PpomaxError as error:
        return [*findings, _failed("configuration", error)], config, 0
    findings.append(Finding("plan", "OK", summary_lines(plan)[-1]))
    seconds = config.parallel.timeout_seconds
    is_short = seconds < 120
    fix = "the first step, with compilation and connecting, can take longer: set parallel.timeout_seconds=600"
    text = f"a collective fails after parallel.timeout_seconds = {seconds} s"
    findings.append(Finding("time limit", "WARN" if is_short else "OK", text, fix if is_short else ""))
    records = Path(config.train.output) / "metrics.jsonl"
    if records.exists() and records.stat().st_size > 0 and config.train.resume == "never":
        fix = 'set train.resume = "auto" to go on with it, or give another folder'
        findings.append(Finding("train.output", "FAIL", f"{config.train.output} already holds a run", fix))
    return findings, config, needed_bytes(plan, config)


def needed_bytes(plan: Plan, config: RunConfig) -> int:
    """Checkpoints that are kept, the one that is being written, and the Hugging Face folders at the end."""
    itemsize = 2 if config.model.dtype == "bf16" else 4
    numel = sum(role.shape.num_parameters() for role in plan.roles if role.trained)
    kept = config.checkpoint.keep + 1 if config.checkpoint.every > 0 else 0
    return numel * (itemsize * (kept + 1) + ADAM_BYTES * kept)


def try_folder(output: str, rank: int) -> dict[str, Any]:
    """On the first rank of a host: free space where `output` is or would be, and what writing there is like.

    Rank 0 leaves a file with its host's name, which the others look for (see_folder): one folder, or many of one name.
    """
    folder = _existing(Path(output))
    found: dict[str, Any] = {"folder": str(folder), "failed": ""}
    try:
        stats = os.statvfs(folder)
        # f_files is 0 where a file system has no fixed number.
        found |= {"free": shutil.disk_usage(folder).free, "inodes": stats.f_favail if stats.f_files else -1}
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{TOKEN}-") as file:
            block = os.urandom(2**20)
            started = time.perf_counter()
            for _ in range(TEST_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            found["rate"] = TEST_BYTES / (time.perf_counter() - started)
        if rank == 0:
            (folder / f"{TOKEN}-{os.getpid()}").write_text(socket.gethostname())
            found["token"] = f"{TOKEN}-{os.getpid()}"
    except OSError as error:
        found["failed"] = str(error)
    return found


def judge_folder(
    told: Sequence[dict[str, Any] | None], saw: Sequence[bool | None], places: Sequence[str], needed: int
) -> list[Finding]:
    """told: of try_folder, by rank, None where another rank of the host looks. saw: whether rank 0's file was there."""
    findings = []
    for rank, one in enumerate(told):
        if one is None:
            continue
        place = f"{places[rank]}: {one['folder']}"
        if one["failed"]:
            text = f"{place} cannot be written: {one['failed']}"
            findings.append(Finding("output folder", "FAIL", text, "set train.output to a folder of this user"))
            continue
        need = f"; checkpoints and exports need {needed / GIB:.1f} GiB" if needed else ""
        text = f"{place}: {one['free'] / GIB:.1f} GiB free, writes {one['rate'] / 1e6:.0f} MB/s{need}"
        if one["free"] < needed:
            fix = "lower checkpoint.keep, free some space, or set train.output to a larger file system"
            findings.append(Finding("output folder", "FAIL", text, fix, CheckpointError))
        elif 0 <= one["inodes"] < LEAST_INODES:
            text = f"{place}: {one['inodes']} files can still be made (inodes)"
            findings.append(Finding("output folder", "WARN", text, "remove small files there"))
        else:
            findings.append(Finding("output folder", "OK", text))
    alone = [places[rank] for rank, one in enumerate(saw) if one is False]
    if alone:
        text = f"{', '.join(dict.fromkeys(alone))} does not see what rank 0 writes into it"
        fix = "put train.output on a file system that all hosts share: a checkpoint has parts of every rank"
        findings.append(Finding("output folder", "FAIL", text, fix))
    return findings


def see_folder(output: str, token: str) -> bool:
    """Whether rank 0's file is there. A network file system may show it late."""
    for _ in range(20):
        if (_existing(Path(output)) / token).exists():
            return True
        time.sleep(0.1)
    return False


def remove_token(output: str, token: str) -> None:
    (_existing(Path(output)) / token).unlink(missing_ok=True)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _failed(check: str, error: PpomaxError) -> Finding:
    return Finding(check, "FAIL", str(error), "see the message", type(error))
