"""Which model a Hugging Face folder holds: a checksum of its weights, wherever they lie, and its shape."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from ppomax.engine.checkpoint_manifest import FileRecord, share_of
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_reader import SafetensorsReader
from ppomax.engine.parallel.collectives import raise_on_all


@dataclass(frozen=True)
class ModelIdentity:
    """folder: where it was found, for messages alone. sha256: of names, types, sizes and bytes of all tensors, however
    they are spread over files. shape: what config.json says of the model.
    """

    folder: str
    sha256: str
    shape: dict[str, Any]


def identify(folder: str) -> ModelIdentity:
    """Reads every weight once, each on one rank. Collective over all ranks; raises CheckpointError."""
    with raise_on_all(CheckpointError, f"cannot read the model {folder}"):
        reader = SafetensorsReader(folder)
        sizes = {name: torch.Size(size).numel() * reader.dtypes[name].itemsize for name, size in reader.sizes.items()}
        records = {name: FileRecord(num_bytes, "") for name, num_bytes in sizes.items()}
        mine = {name: reader.digest(name) for name in share_of(records, dist.get_rank(), dist.get_world_size())}
        # Through JSON, as it comes back from a checkpoint.
        shape = json.loads(json.dumps(asdict(read_shape(folder))))
    of_ranks: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    digests = sorted((name, digest) for part in of_ranks for name, digest in part.items())
    return ModelIdentity(folder, hashlib.sha256(json.dumps(digests).encode()).hexdigest(), shape)
