"""manifest.json of a checkpoint: size and SHA-256 of every other file, so that damage is found before anything is read.

It detects corruption, not malice: who can change a file can change its checksum too.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ppomax.engine.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FIX = "take another step_N folder"


@dataclass(frozen=True)
class FileRecord:
    """size: bytes. sha256: hexadecimal."""

    size: int
    sha256: str


def record_of(path: Path) -> FileRecord:
    """Size and checksum of a file; reads all of it."""
    with path.open("rb") as file:
        return FileRecord(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files of a folder but its manifest, relative to it, in order."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            yield name


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """records: by name relative to the folder."""
    (folder / MANIFEST_FILE).write_bytes(_text(records))


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint; raises CheckpointError unless the manifest is exactly what `write_manifest` wrote."""
    path = folder / MANIFEST_FILE
    try:
        content = path.read_bytes()
        records = {name: FileRecord(**record) for name, record in json.loads(content)["files"].items()}
        is_whole = content == _text(records)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing: the checkpoint is not complete, or it was written before there were checksums; {FIX}"
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {FIX}") from error
    if not is_whole:
        raise CheckpointError(f"{path} is damaged: it does not have the checksum that it holds of itself; {FIX}")
    return records


def find_fault(folder: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint: it names the file, what was expected and what was found."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{path}: expected {expected.size} bytes, found {size}"
        found = record_of(path)
    except FileNotFoundError:
        return f"{path}: expected {expected.size} bytes, found no such file"
    except OSError as error:
        return f"{path}: expected {expected.size} bytes, which cannot be read ({error.strerror})"
    if found != expected:
        return f"{path}: expected SHA-256 {expected.sha256}, found {found.sha256}"
    return None


def share_of(records: Mapping[str, FileRecord], part: int, num_parts: int) -> Sequence[str]:
    """The files that one of num_parts readers checks: the largest files are dealt first, each to who has least."""
    load = [0] * num_parts
    mine = []
    for name in sorted(records, key=lambda name: (-records[name].size, name)):
        reader = load.index(min(load))
        load[reader] += records[name].size + 1
        if reader == part:
            mine.append(name)
    return mine


def _text(records: Mapping[str, FileRecord]) -> bytes:
    files = {name: asdict(records[name]) for name in sorted(records)}
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return (json.dumps({"files": files, "sha256_of_files": own}, indent=1) + "\n").encode()
