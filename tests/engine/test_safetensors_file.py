"""safetensors files: the same bytes as the library's, and only whole ones."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ppomax.engine.errors import CheckpointError
from ppomax.engine.models import safetensors_file
from ppomax.engine.models.safetensors_file import SafetensorsWriter, read_header, read_rows

TENSORS = {
    "odd": torch.arange(3).bfloat16(),
    "matrix": torch.arange(35.0).view(7, 5),
    "wide": torch.arange(6.0, dtype=torch.float64).view(2, 3),
    "half": torch.arange(5).half(),
    "cube": torch.arange(24.0).view(2, 3, 4),
}


def write(path: Path, header: Any, num_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))


def entry(start: int, stop: int, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **fields}


def test_the_library_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {name: (x.dtype, tuple(x.shape)) for name, x in TENSORS.items()})
    for name in reversed(TENSORS):
        assert not writer.is_complete
        writer.add(name, TENSORS[name])
    assert writer.is_complete
    writer.close()
    found = load_file(tmp_path / "x")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], x) and found[name].dtype == x.dtype for name, x in TENSORS.items())


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(3).bfloat16()], ids=["size", "dtype"])
def test_a_tensor_that_was_not_announced_is_refused(tensor: Tensor, tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (3,))})
    with pytest.raises(ValueError, match="was not announced"):
        writer.add("a", tensor)


@pytest.mark.parametrize("piece_bytes", [1, 45, 10**6])
def test_parts_of_what_the_library_writes_are_its_slices(
    piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", piece_bytes)
    save_file(TENSORS, tmp_path / "x")
    with (tmp_path / "x").open("rb", buffering=0) as file:
        spans = read_header(file, tmp_path / "x")
        for rows, columns in ((slice(2, 6), slice(1, 3)), (slice(None), slice(None)), (slice(6, 7), slice(4, 5))):
            found = read_rows(file, spans["matrix"], rows, columns)
            assert torch.equal(found, TENSORS["matrix"][rows, columns])
        assert torch.equal(read_rows(file, spans["odd"], slice(1, 3), slice(None)), TENSORS["odd"][1:3])


@pytest.mark.parametrize(
    ("header", "num_bytes", "fault"),
    [
        ({"a": entry(0, 8), "b": entry(8, 16)}, 15, "the file has"),
        ({"a": entry(0, 8), "b": entry(8, 16)}, 17, "the file has"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "end to end"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "end to end"),
        ({"a": entry(4, 12)}, 12, "end to end"),
        (b'{"a": %(x)s, "a": %(x)s}' % {b"x": json.dumps(entry(0, 8)).encode()}, 8, "names a tensor twice"),
        ({"a": entry(0, 8, shape=[3])}, 8, "has 8 bytes"),
        ({"a": entry(0, 8, shape=[2, -1])}, 8, "not whole numbers"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "not whole numbers"),
        ({"a": entry(0, 8, dtype="F4")}, 8, "unknown dtype F4"),
        ({"a": {"shape": [2]}}, 8, "data_offsets"),
        ([], 8, "not a whole"),
        (b"{", 8, "not a whole"),
        (b"[" * 100_000, 8, "not a whole"),
        (b"\xff\xfe", 8, "not a whole"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(
    header: Any, num_bytes: int, fault: str, tmp_path: Path
) -> None:
    write(tmp_path / "x", header, num_bytes)
    with (tmp_path / "x").open("rb", buffering=0) as file, pytest.raises(CheckpointError, match=fault) as error:
        read_header(file, tmp_path / "x")
    assert f"{tmp_path / 'x'} is not a whole safetensors file" in str(error.value)


def test_the_announced_length_of_a_header_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with (tmp_path / "x").open("rb", buffering=0) as file, pytest.raises(CheckpointError, match="announce a header of"):
        read_header(file, tmp_path / "x")
