"""Which checkpoint a run goes on from: the one that it names, or the newest whose files have their checksums."""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from ppomax.engine.checkpoint_folders import list_checkpoints
from ppomax.engine.checkpoint_manifest import MANIFEST_FILE, find_fault, read_manifest, share_of
from ppomax.engine.checkpoint_state import STATE_FILE, read_state
from ppomax.engine.errors import CheckpointError


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint all of whose files had their checksums; only `verify_checkpoint` makes one. step: made after it."""

    path: Path
    step: int

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Found:
    """checkpoint: None to start from scratch. notes: what the user has to know about the choice."""

    checkpoint: VerifiedCheckpoint | None
    notes: tuple[str, ...] = ()


def verify_checkpoint(path: str | Path) -> VerifiedCheckpoint:
    """Compares every file with its checksum, each on one rank. Collective over all ranks, which all raise the same
    CheckpointError where one does not fit.
    """
    path = Path(path)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        records = read_manifest(path)
        missing = [name for name in (STATE_FILE,) if name not in records]
        faults = [f"{path / MANIFEST_FILE} does not list {name}" for name in missing]
        checked = [find_fault(path, name, records[name]) for name in share_of(records, rank, world_size)]
        faults += [fault for fault in checked if fault is not None]
    except CheckpointError as error:
        faults = [str(error)]
    of_ranks: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(of_ranks, faults)
    found = list(dict.fromkeys(fault for faults in of_ranks for fault in faults))
    if found:
        older = [other.name for other in list_checkpoints(path.parent) if other.name < path.name]
        fix = f"take another checkpoint: older ones are {', '.join(older)}" if older else "there is no older one"
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(found)}; {fix}")
    return VerifiedCheckpoint(path, int(read_state(path)["step"]))


def find_checkpoint(resume: str, folder: str) -> Found:
    """What the setting for resuming names: "never" nothing, "auto" the newest checkpoint of a folder that is whole, a
    path itself. Collective over all ranks.

    Raises CheckpointError where a path is damaged, or all that there is.
    """
    if resume == "never":
        return Found(None)
    if resume != "auto":
        if not (Path(resume) / STATE_FILE).is_file():
            raise CheckpointError(
                f"train.resume = {resume!r}: no state.json there; give a step_N folder, auto or never"
            )
        return Found(verify_checkpoint(resume))
    notes: list[str] = []
    # All ranks try the same ones: rank 0 says which there are.
    names: list[list[str]] = [[path.name for path in reversed(list_checkpoints(folder))]]
    dist.broadcast_object_list(names, src=0)
    for name in names[0]:
        try:
            checkpoint = verify_checkpoint(Path(folder) / name)
        except CheckpointError as error:
            notes.append(f"WARNING: {error}")
            continue
        if notes:
            notes.append(f"WARNING: going on from {checkpoint}, the newest that is whole; later steps are repeated")
        return Found(checkpoint, tuple(notes))
    if names[0]:
        raise CheckpointError(
            f"{folder} has no checkpoint that is whole:\n" + "\n".join(notes) + "\n"
            "Bring one back from a copy, or start anew in another folder"
        )
    return Found(None)
