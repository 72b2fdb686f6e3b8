"""Damaged, hostile and mismatched checkpoints are refused: nothing runs, nothing is left behind, nothing is wrong."""

import json
import os
import pickle
import random
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

from ppomax.engine.conversion import hf_to_megatron, megatron_to_hf
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models import distributed_checkpoint
from ppomax.engine.models.distributed_checkpoint import DistributedCheckpoint
from ppomax.engine.models.hf_config import config_json
from ppomax.engine.models.hf_reader import RandomReader
from ppomax.engine.models.megatron_names import Split
from ppomax.engine.models.shape import ModelShape

SHAPE = ModelShape(
    vocab_size=37,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_query_groups=2,
    head_dim=2,
    ffn_hidden_size=12,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
)
NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as "hf" and as "megatron"."""
    root = tmp_path_factory.mktemp("whole")
    (root / "hf").mkdir()
    reader = RandomReader(SHAPE, seed=1, std=0.5)
    weights = {name: reader.read(name).clone() for name in reader.sizes}
    for name in weights:
        if "norm" in name:
            weights[name] += torch.rand(weights[name].shape)
    half = {name: weight for number, (name, weight) in enumerate(weights.items()) if number % 2}
    for file, part in (("a", half), ("b", {name: x for name, x in weights.items() if name not in half})):
        save_file(part, root / "hf" / f"{file}.safetensors")
    index = {name: ("a" if name in half else "b") + ".safetensors" for name in weights}
    (root / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = config_json(SHAPE, dtype="float32", bos_id=1, eos_id=2, pad_id=0)
    (root / "hf/config.json").write_text(json.dumps(config))
    hf_to_megatron(str(root / "hf"), str(root / "megatron"), split=Split(tp=2, pp=2))
    return root


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def contents(folder: Path) -> dict[str, Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def convert(folder: Path, target: Path) -> dict[str, Tensor]:
    """The weights of "hf" or "megatron" after a conversion to Hugging Face."""
    if folder.name == "hf":
        between = target.with_name("between")
        hf_to_megatron(str(folder), str(between), split=Split())
        folder = between
    megatron_to_hf(str(folder), str(target))
    return contents(target)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(folder, folder.parent / "out")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hf", "megatron"]


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "megatron/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_a_whole_checkpoint_converts(copied: Path) -> None:
    wanted = contents(copied / "hf")
    found = convert(copied / "megatron", copied / "out")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def test_a_pickle_gets_no_room_that_its_file_has_not(copied: Path) -> None:
    (copied / "megatron/.metadata").write_bytes(b"\x80\x05\x96" + (2**31).to_bytes(8, "little") + b"x.")
    tracemalloc.start()
    assert_refused(copied / "megatron", r"\.metadata")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Ways to make a reader create the file `marker`."""
    command = f"touch {marker}"
    shell = pickle.dumps(Call(os.system, command))
    old = f"cos\nsystem\n(S'{command}'\ntR.".encode()
    dotted = b"\x80\x04" + b"".join(pickle.dumps(text, 4)[2:-1] for text in ("torch", "serialization.os.system"))
    return {
        "call": shell,
        "call of protocol 0": old,
        "call inside of a list": pickle.dumps([1, Call(os.system, command)]),
        "eval": pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
        "attribute of an allowed module": dotted + b"\x93" + pickle.dumps(command, 4)[2:-1] + b"\x85R.",
        "instance opcode": f"(S'{command}'\nios\nsystem\n.".encode(),
        "import of a module": b"cimportlib\nimport_module\n(S'os'\ntR.",
        "getattr": b"cbuiltins\ngetattr\n(ctorch\nSize\nS'mro'\ntR.",
        "torch.load": pickle.dumps(Call(torch.load, str(marker))),
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"Pos.system\n.",
    }


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["one", "several", "set"])
def test_keys_that_take_for_ever_to_hash_are_refused(kind: str, copied: Path, tmp_path: Path) -> None:
    """A tuple of itself twice, 40 deep, is small in a pickle and hashed 2^40 times."""
    bomb = b")q\x00" + b"h\x00h\x00\x86q\x00" * 40
    body = {"one": b"}" + bomb + b"Ns", "several": b"}(" + bomb + b"Nu", "set": b"\x8f(" + bomb + b"\x90"}[kind]
    (copied / "megatron/.metadata").write_bytes(b"\x80\x04" + body + b".")
    with pytest.raises(CheckpointError, match=r"a key of type tuple|not a readable"):
        megatron_to_hf(str(copied / "megatron"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", hostile_pickles(Path("x")))
def test_a_hostile_metadata_file_is_refused_and_runs_nothing(kind: str, copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copied / "megatron/.metadata").write_bytes(hostile_pickles(marker)[kind])
    assert_refused(copied / "megatron", r"\.metadata")
    assert not marker.exists()


@pytest.mark.parametrize("kind", hostile_pickles(Path("x")))
def test_a_hostile_chunk_is_refused_and_runs_nothing(kind: str, copied: Path, tmp_path: Path) -> None:
    """The pickle in place of a tensor's, in a zip file with right checksums, and as the chunk itself."""
    marker = tmp_path / "ran"
    code = hostile_pickles(marker)[kind]
    for whole_chunk in (False, True):
        path = copied / "megatron/hostile.distcp"
        if whole_chunk:
            path.write_bytes(code + bytes(32))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", code)
                archive.writestr("archive/byteorder", "little")
                archive.writestr("archive/data/0", b"\0" * 32)

        def point_at_it(metadata: Any) -> None:
            index = next(index for index in metadata.storage_data if index.fqn == NORM)
            length = (copied / "megatron/hostile.distcp").stat().st_size
            place = replace(metadata.storage_data[index], relative_path="hostile.distcp", offset=0, length=length)
            metadata.storage_data[index] = place

        rewrite(copied, point_at_it)
        assert_refused(copied / "megatron", "hostile.distcp is damaged")
        assert not marker.exists()


def test_attributes_that_a_pickle_sets_do_not_outlive_it(whole: Path, tmp_path: Path) -> None:
    """A pickle may set attributes of what it names: here of the class Metadata."""
    code = b"\x80\x04" + b"".join(
        pickle.dumps(text, 4)[2:-1] for text in ("torch.distributed.checkpoint.metadata", "Metadata")
    )
    code += b"\x93" + pickle.dumps((None, {"__setstate__": 1}), 4)[2:-1] + b"b."
    folder = Path(shutil.copytree(whole / "megatron", tmp_path / "megatron"))
    (folder / ".metadata").write_bytes(code)
    with pytest.raises(CheckpointError, match="metadata"):
        DistributedCheckpoint(folder)
    DistributedCheckpoint(whole / "megatron")


def move_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].chunks[0] = ChunkStorageMetadata(torch.Size([5, 0]), torch.Size([1, 8]))


def drop_chunk(metadata: Any) -> None:
    chunk = metadata.state_dict_metadata[NORM].chunks.pop()
    del metadata.storage_data[MetadataIndex(NORM, chunk.offsets)]


def overlap_chunks(metadata: Any) -> None:
    key = "decoder.layers.mlp.linear_fc1.weight"
    chunk = next(chunk for chunk in metadata.state_dict_metadata[key].chunks if chunk.offsets == (0, 6, 0))
    metadata.storage_data[MetadataIndex(key, (0, 5, 0))] = metadata.storage_data.pop(MetadataIndex(key, chunk.offsets))
    chunk.offsets = torch.Size((0, 5, 0))


def repeat_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].chunks[1] = metadata.state_dict_metadata[NORM].chunks[0]


def grow_chunk(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].chunks[0].sizes = torch.Size([1, 10**15])


def share_bytes(metadata: Any) -> None:
    first, second = (index for index in metadata.storage_data if index.fqn == NORM)
    metadata.storage_data[second] = metadata.storage_data[first]


def swap_bytes_of_other_sizes(metadata: Any) -> None:
    first = next(index for index in metadata.storage_data if index.fqn == NORM)
    second = next(index for index in metadata.storage_data if index.fqn == "decoder.layers.mlp.linear_fc2.weight")
    places = metadata.storage_data
    places[first], places[second] = places[second], places[first]


def leave_the_folder(metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="../" + place.relative_path)


def end_beyond_the_file(metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, length=10**12)


def start_before_the_file(metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, offset=-1)


def rename_tensor(metadata: Any) -> None:
    metadata.state_dict_metadata["other"] = metadata.state_dict_metadata.pop(NORM)


def add_pickled_object(metadata: Any) -> None:
    metadata.state_dict_metadata["other"] = BytesStorageMetadata()


def change_type(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].properties.dtype = torch.int32


def lose_everything(metadata: Any) -> None:
    metadata.state_dict_metadata, metadata.storage_data = {}, {}


def have_no_places(metadata: Any) -> None:
    metadata.storage_data = None


def grow_tensor(metadata: Any) -> None:
    stored, places = metadata.state_dict_metadata[NORM], metadata.storage_data
    first, *others = (index for index in places if index.fqn == NORM)
    for index in others:
        del places[index]
    stored.size = torch.Size([10**15, 8])
    stored.chunks[:] = [ChunkStorageMetadata(torch.Size(first.offset), stored.size)]


def wrap_around(metadata: Any) -> None:
    grow_tensor(metadata)
    stored = metadata.state_dict_metadata[NORM]
    stored.size = stored.chunks[0].sizes = torch.Size([2**32, 2**32])


def name_no_file_can_have(metadata: Any) -> None:
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="\0.distcp")


def nest_sizes(metadata: Any) -> None:
    nested: tuple[Any, ...] = ()
    for _ in range(18):
        nested = (nested, nested)
    metadata.state_dict_metadata[NORM].size = nested


CHANGES: dict[Callable[[Any], None], str] = {
    move_chunk: "is damaged",
    drop_chunk: f"the chunks of {NORM} do not cover it",
    overlap_chunks: r"overlap at \[0, 5, 0\]",
    repeat_chunk: "is damaged",
    grow_chunk: "is damaged .*outside of its shape",
    share_bytes: "cannot hold a chunk of its own",
    swap_bytes_of_other_sizes: "expected torch.float32",
    leave_the_folder: "lies in a file called '../__",
    end_beyond_the_file: "cannot hold a chunk of its own",
    start_before_the_file: "are not whole numbers",
    rename_tensor: "is damaged",
    add_pickled_object: "refused: it names .*BytesStorageMetadata",
    change_type: "it holds torch.float32",
    lose_everything: "has 0 layers, not 2",
    have_no_places: "is damaged",
    grow_tensor: r"chunk of shape \[1000000000000000, 8\] in",
    wrap_around: r"chunk of shape \[4294967296, 4294967296\] in",
    name_no_file_can_have: "there is no such file",
    nest_sizes: r"is damaged \(.{,1000} are not whole numbers\)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_metadata_that_does_not_fit_is_refused(change: Callable[[Any], None], copied: Path) -> None:
    rewrite(copied, change)
    assert_refused(copied / "megatron", CHANGES[change])


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "metadata.json", "config.json"])
def test_a_missing_file_is_named(file: str, copied: Path) -> None:
    (copied / "megatron" / file).unlink()
    assert_refused(copied / "megatron", "metadata.json|weights" if file == ".metadata" else file)


def test_a_description_of_another_model_is_refused(copied: Path) -> None:
    config = json.loads((copied / "megatron/config.json").read_text())
    for fields, message in (
        ({"vocab_size": 41}, r"embedding.word_embeddings.weight has shape \[38, 8\], not \[41, 8\]"),
        ({"vocab_size": 33}, r"embedding.word_embeddings.weight has shape \[38, 8\], not \[33, 8\]"),
        ({"num_hidden_layers": 3}, "has 2 layers, not 3"),
        ({"num_hidden_layers": 10**12}, "has 2 layers, not 1000000000000"),
        ({"model_type": "qwen2"}, "it lacks decoder.layers.self_attention.linear_qkv.bias"),
        ({"tie_word_embeddings": True}, "output_layer.weight, for which there is no place"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
    ):
        (copied / "megatron/config.json").write_text(json.dumps(config | fields))
        assert_refused(copied / "megatron", message)


def test_a_flipped_bit_of_a_weight_fails_its_checksum(copied: Path) -> None:
    checkpoint = DistributedCheckpoint(copied / "megatron")
    chunk = checkpoint.tensors[NORM].chunks[1]
    path = copied / "megatron" / chunk.file
    content = bytearray(path.read_bytes())
    values = checkpoint.read(NORM, 1).numpy().tobytes()
    content[content.index(values) + 9] ^= 1
    path.write_bytes(content)
    assert_refused(copied / "megatron", f"{chunk.file} is damaged.*the checksum of its numbers is wrong")


def test_a_compressed_chunk_is_refused_before_it_is_unpacked(copied: Path) -> None:
    path = copied / "megatron/packed.distcp"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
        archive.writestr("archive/byteorder", "little")

    def point_at_it(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == NORM)
        place = replace(metadata.storage_data[index], relative_path=path.name, offset=0, length=path.stat().st_size)
        metadata.storage_data[index] = place

    rewrite(copied, point_at_it)
    assert_refused(copied / "megatron", "packed.distcp is damaged.*it is compressed")


def test_metadata_of_an_absurd_size_is_not_read(copied: Path) -> None:
    os.truncate(copied / "megatron/.metadata", 2**41)
    assert_refused(copied / "megatron", "has 2199023255552 bytes, expected at most")


def test_a_file_that_shrinks_while_it_is_read_is_refused(copied: Path) -> None:
    checkpoint = DistributedCheckpoint(copied / "megatron")
    checkpoint.read(NORM, 1)
    os.truncate(copied / "megatron" / checkpoint.tensors[NORM].chunks[1].file, 10)
    with pytest.raises(CheckpointError, match="the file ends at byte"):
        checkpoint.read(NORM, 1)


@pytest.mark.parametrize("piece_bytes", [1, 40, 10**6])
def test_parts_of_tensors_are_what_slicing_the_whole_gives(
    piece_bytes: int, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed_checkpoint, "PIECE_BYTES", piece_bytes)
    checkpoint = DistributedCheckpoint(whole / "megatron")
    for key in ("decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"):
        full = checkpoint.read(key, 1)
        for rows, columns in ((slice(3, 7), slice(2, 7)), (slice(0, 1), slice(None)), (slice(None), slice(5, 6))):
            assert torch.equal(checkpoint.read(key, 1, rows, columns), full[rows, columns])


def damage(path: Path, draw: random.Random, fault: str, last: int) -> None:
    content = bytearray(path.read_bytes())
    last = min(last, len(content))
    if fault == "flip":
        content[draw.randrange(last)] ^= draw.choice((1, 2, 4, 8, 16, 32, 64, 128, draw.randrange(1, 256)))
    elif fault == "cut":
        del content[draw.randrange(last) :]
    else:
        start = draw.randrange(last)
        content[start : start + draw.randrange(1, 30)] = draw.randbytes(draw.randrange(30))
    path.write_bytes(content)


@pytest.mark.parametrize("round_", [*range(12), *(pytest.param(n, marks=pytest.mark.slow) for n in range(12, 300))])
def test_random_damage_is_refused_or_does_no_harm(round_: int, whole: Path, tmp_path: Path) -> None:
    """Where a checksum, a size or a name can show damage, it is an error; elsewhere the weights are right.

    safetensors has no checksums: of its files the header is damaged, not the numbers. What config.json says of
    activations, rotary frequencies and ids nothing else can confirm: such damage may pass, but without a traceback.
    """
    draw = random.Random(round_)
    wanted = contents(whole / "hf")
    for _ in range(40):
        shutil.rmtree(tmp_path)
        shutil.copytree(whole, tmp_path)
        folder = tmp_path / draw.choice(("hf", "megatron", "megatron"))
        path = draw.choice([path for path in sorted(folder.iterdir()) if path.name != "generation_config.json"])
        fault = draw.choice(("flip", "cut", "replace"))
        last = 10**9
        if path.suffix == ".safetensors":
            last = 8 + int.from_bytes(path.read_bytes()[:8], "little") if fault != "cut" else last
        damage(path, draw, fault, last)
        try:
            found = convert(folder, tmp_path / "out")
        except CheckpointError:
            left = {entry.name for entry in tmp_path.iterdir()}
            assert left <= {"hf", "megatron", "between"}, (path, fault, left)
            continue
        assert found.keys() == wanted.keys() or path.name == "config.json", (path, fault)
        assert all(torch.equal(found[name], wanted[name]) for name in found), (path, fault)
