"""Saves checkpoints of a run, beside the training or in its place.

A save copies what is trained out of the way of the next step (or writes it at once), hands it to this rank's writer and
returns. `poll`, between steps, asks whether all writers are done; then rank 0 adds what is not a tensor, and its
writer publishes the folder (`checkpoint_folders.py`). A fault of any rank is one on all of them; what was published
before stays as it is.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ppomax.engine.checkpoint import plan_role
from ppomax.engine.checkpoint_chunks import Written
from ppomax.engine.checkpoint_folders import (
    Publication,
    Retention,
    list_checkpoints,
    partial_of,
    point_to,
    remove_leftovers,
    set_aside,
    step_folder,
    step_of,
)
from ppomax.engine.checkpoint_state import FORMAT, STATE_FILE
from ppomax.engine.checkpoint_verify import VerifiedCheckpoint
from ppomax.engine.errors import CheckpointError, PpomaxError
from ppomax.engine.models.roles import Role
from ppomax.engine.models.save_plan import SavePlanOfRole
from ppomax.engine.parallel.collectives import raise_on_all
from ppomax.engine.parallel.device import this_device


class Writer(Protocol):
    """Writes files of one rank. Faults are kept for `answer`: other ranks go on with their part of a collective."""

    def add(self, path: Path, tensors: tuple[Tensor, ...]) -> None:
        """A file of the next `start`. The tensors may change afterwards."""

    def start(self) -> None:
        """Begins to write what was added; `answer` gives what was written, by path."""

    def publish(self, publication: Publication) -> None:
        """Begins to publish; `answer` gives an empty result."""

    def answer(self, timeout: float) -> "dict[Path, Written] | Exception | None":
        """What came of the last `start` or `publish`; None where it is still running after timeout seconds."""

    def close(self) -> None:
        """Ends it; what is not finished is dropped."""


@dataclass
class _Save:
    """A save under way. plans: by role. is_written: whether only its publication is left."""

    step: int
    final: Path
    partial: Path
    plans: dict[str, SavePlanOfRole]
    content: dict[str, Any]
    is_written: bool = False


class Saver:
    """Every rank of the run has one and must call its methods in the same order. published: the newest checkpoint of
    this run that is on the disk.
    """

    def __init__(
        self,
        folder: str,
        writer: Writer,
        retention: Retention,
        *,
        resumed: VerifiedCheckpoint | None,
        timeout_seconds: float,
    ) -> None:
        """resumed: what the run goes on from, never removed. timeout_seconds: how long to wait for a writer."""
        self.folder, self.published = Path(folder), resumed.path if resumed else None
        self._writer, self._retention, self._timeout = writer, retention, timeout_seconds
        self._protected = (resumed.path,) if resumed else ()
        start = resumed.step if resumed else -1
        # The run leaves them: they are damaged, or another one was named. Its first own checkpoint sets them aside.
        self._superseded = tuple(path for path in list_checkpoints(folder) if step_of(path) > start)
        self._kept: tuple[Path, ...] = ()
        self._plans: dict[str, SavePlanOfRole] = {}
        self._under_way: _Save | None = None

    def save(
        self,
        step: int,
        roles: Mapping[str, Role],
        content: Mapping[str, Any],
        *,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        """Begins a checkpoint of the trained roles; waits for the one before it. Collective over all ranks.

        content: what state.json holds besides roles and step: JSON, of rank 0. export: adds files to the
        folder, before this returns.
        """
        self.finish()
        final = step_folder(self.folder, step)
        partial = partial_of(final)
        with raise_on_all(CheckpointError, f"cannot write the checkpoint {final}"):
            if dist.get_rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self.folder)
                for name in roles:
                    (partial / name).mkdir(parents=True)
        if export is not None:
            try:
                export(partial)
            except PpomaxError:
                if dist.get_rank() == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        for name, role in roles.items():
            with role.memory.resident("weights", "optimizer"):
                plan = self._plans[name] = plan_role(role, partial / name, self._plans.get(name))
                if plan.tensors:
                    self._writer.add(partial / name / plan.file, plan.tensors)
        self._writer.start()
        shapes = {name: asdict(role.shape) for name, role in sorted(roles.items())}
        whole = {"format": FORMAT, "step": step, "roles": shapes, **content}
        self._under_way = _Save(step, final, partial, {name: self._plans[name] for name in roles}, whole)

    def poll(self) -> None:
        """Between steps: goes on with a save where all ranks can. Collective over all ranks; raises CheckpointError."""
        if self._under_way is not None:
            self._advance(self._under_way, timeout=0.0)

    def finish(self) -> None:
        """Waits until the save under way is published. Collective over all ranks; raises CheckpointError."""
        while self._under_way is not None:
            self._advance(self._under_way, timeout=self._timeout)

    def last_good(self) -> str:
        """The newest checkpoint, once the save under way has ended in one way or the other: where a run that diverged
        can go on; "none" where there is none. Collective over all ranks.
        """
        with contextlib.suppress(CheckpointError):  # the run ends for a better reason
            self.finish()
        return str(self.published or "none")

    def protect(self, step: int | None) -> None:
        """Keeps the run's own checkpoint of a step, and no longer that of an earlier call."""
        self._kept = () if step is None else (step_folder(self.folder, step),)

    def go_back(self, checkpoint: VerifiedCheckpoint) -> None:
        """The run goes on from this checkpoint of its own: later ones are set aside. No save may be under way.
        Collective over all ranks; raises CheckpointError.
        """
        with raise_on_all(CheckpointError, f"cannot set aside what is later than {checkpoint}"):
            if dist.get_rank() == 0:
                for path in list_checkpoints(self.folder):
                    if step_of(path) > checkpoint.step:
                        set_aside(path)
                point_to(checkpoint.path)
        self.published = checkpoint.path

    def close(self) -> None:
        """Ends the writer. No collective: a save that is still under way is dropped."""
        self._writer.close()

    def _advance(self, save: _Save, *, timeout: float) -> None:
        answer = self._writer.answer(timeout)
        if answer is None and timeout > 0:
            answer = TimeoutError(f"the writer of rank {dist.get_rank()} did not finish within {timeout:.0f} s")
        flags = torch.tensor([float(answer is None), float(isinstance(answer, Exception))], device=this_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        is_running, has_failed = flags.tolist()
        if has_failed:
            self._fail(save, answer if isinstance(answer, Exception) else None)
        if is_running:
            # An answer that is here already is asked for again.
            return
        if save.is_written:
            self.published, self._superseded, self._under_way = save.final, (), None
            return
        assert isinstance(answer, dict)
        self._gather(save, answer)
        save.is_written = True

    def _gather(self, save: _Save, written: dict[Path, Written]) -> None:
        """Brings together on rank 0 what all ranks wrote, and starts the publication there."""
        results = {}
        for name, plan in save.plans.items():
            file = written.get(save.partial / name / plan.file)
            results[name] = plan.results(file.extents) if file is not None else []
        records = {path.relative_to(save.partial).as_posix(): file.record for path, file in written.items()}
        is_first = dist.get_rank() == 0
        of_ranks: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object((results, records), of_ranks)
        with raise_on_all(CheckpointError, f"cannot write the checkpoint {save.final}"):
            if of_ranks is not None:
                for name, plan in save.plans.items():
                    plan.finish([results[name] for results, _ in of_ranks])
                (save.partial / STATE_FILE).write_text(json.dumps(save.content, indent=1))
                known = {path: record for _, records in of_ranks for path, record in records.items()}
                self._writer.publish(
                    Publication(
                        save.partial,
                        save.final,
                        known,
                        self._retention,
                        self._superseded,
                        (*self._protected, *self._kept),
                    )
                )

    def _fail(self, save: _Save, fault: Exception | None) -> None:
        """Raises what failed, the same on all ranks."""
        self._under_way = None
        texts: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, None if fault is None else f"rank {dist.get_rank()}: {fault}")
        if dist.get_rank() == 0:
            shutil.rmtree(save.partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write the checkpoint {save.final}: {'; '.join(text for text in texts if text)}; check the free "
            f"space and the permissions of {self.folder}, then resume from {self.published or 'the start'}"
        )
