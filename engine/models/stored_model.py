"""Opens a model wherever it lies: a Hugging Face folder, a converted Megatron checkpoint, or a role of a training
checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from ppomax.engine.checkpoint_state import STATE_FILE, read_state, shape_of_role
from ppomax.engine.errors import CheckpointError
from ppomax.engine.models.distributed_checkpoint import METADATA_FILE, is_distributed_checkpoint
from ppomax.engine.models.hf_config import read_shape
from ppomax.engine.models.hf_match import match_names
from ppomax.engine.models.hf_reader import SafetensorsReader, StoredWeights
from ppomax.engine.models.megatron_reader import SCALAR_HEAD_BESIDE, MegatronReader
from ppomax.engine.models.shape import ModelShape


@dataclass(frozen=True)
class StoredModel:
    """A model that can be read tensor by tensor.

    folder: of the weights. names: of each Hugging Face tensor in `weights`. step: the training checkpoint that it is a
    role of, None for models that are not.
    """

    folder: Path
    shape: ModelShape
    weights: StoredWeights
    names: dict[str, str]
    step: Path | None = None

    @property
    def is_megatron(self) -> bool:
        return isinstance(self.weights, MegatronReader)


def open_model(path: str | Path, role: str | None = None) -> StoredModel:
    """Opens a model and compares its description with its tensors.

    role: which model of a training checkpoint (policy, critic, reward); may be None where there is only one, and must
    be for other folders. Raises CheckpointError.
    """
    folder = Path(path)
    if (folder / STATE_FILE).is_file():
        folder = folder / _role(folder, role)
        role = None
    if role is not None:
        raise CheckpointError(f"{folder} is not a training checkpoint (no {STATE_FILE}): it has no role {role!r}")
    if not is_distributed_checkpoint(folder):
        if (folder.parent / STATE_FILE).is_file():
            raise CheckpointError(f"{folder / METADATA_FILE} is missing; take another checkpoint, or copy it again")
        shape, weights = read_shape(str(folder)), SafetensorsReader(str(folder))
        return StoredModel(
            folder, shape, weights, match_names(shape, weights, str(folder), has_scalar_head=shape.scalar)
        )
    step = folder.parent if (folder.parent / STATE_FILE).is_file() and not (folder / "config.json").exists() else None
    shape = shape_of_role(step, folder.name) if step else read_shape(str(folder))
    return _open_megatron(folder, shape, step)


def _open_megatron(folder: Path, shape: ModelShape, step: Path | None) -> StoredModel:
    reader = MegatronReader(folder, shape)
    if SCALAR_HEAD_BESIDE in reader.checkpoint.tensors and not shape.scalar:
        # What the reward stage exports of a model with both heads.
        reader = MegatronReader(folder, replace(shape, scalar=True, tie_embeddings=False))
    return StoredModel(folder, reader.shape, reader, {name: name for name in reader.sizes}, step)


def _role(step: Path, role: str | None) -> str:
    roles = sorted(read_state(step)["roles"])
    if role is None and len(roles) == 1:
        return roles[0]
    if role is None or role not in roles:
        fault = f"holds no {role}" if role else "holds several models"
        raise CheckpointError(f"checkpoint {step} {fault}; choose with --role: {', '.join(roles)}")
    return role
