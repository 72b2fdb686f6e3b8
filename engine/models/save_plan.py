"""What Megatron's distributed checkpoint of a model holds, planned for all ranks; who writes it is left to the caller.

`dist_checkpointing.save` forks writers in every save, and its asynchronous callers do not run on a CPU, put the live
weights themselves into shared memory there, and keep server processes. The plan, the metadata and the format are
Megatron's and torch's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult


@dataclass(frozen=True)
class SavePlanOfRole:
    """file: what this rank writes; it holds `tensors` in their order. metadata: of all ranks; on rank 0 alone.

    common: what is not split. tensors: views of what is trained, where it lies: with the values of the moment.
    """

    folder: Path
    file: str
    items: tuple[WriteItem, ...]
    tensors: tuple[Tensor, ...]
    common: dict[str, Any]
    metadata: Metadata | None

    def again(self, folder: Path, common: Mapping[str, Any]) -> "SavePlanOfRole":
        """The next save of the same tensors. common: what of it has changed."""
        return replace(self, folder=folder, common={**self.common, **common})

    def results(self, extents: Sequence[tuple[int, int]]) -> list[WriteResult]:
        """Where the tensors lie, for `.metadata`. extents: first byte and number of bytes of each in the file."""
        return [
            WriteResult(item.index, length, _StorageInfo(self.file, start, length))
            for item, (start, length) in zip(self.items, extents, strict=True)
        ]

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Writes all that is not a tensor. results: of all ranks. On rank 0 alone."""
        assert self.metadata is not None
        torch.save(self.common, self.folder / "common.pt")
        FileSystemWriterAsync(self.folder).finish(self.metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


def plan_save(state: dict[str, Any], folder: Path, content_metadata: dict[str, Any]) -> SavePlanOfRole:
    """Plans the save of a sharded state, and checks that all ranks together hold each tensor once. Collective over all
    ranks of the run.

    state: of this rank; what is not split must be the same on all ranks.
    """
    sharded, common = save_preprocess({**state, _CONTENT_METADATA_KEY: content_metadata})
    sharded, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    storage = _Storage(folder, thread_count=1)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    (_, metadata, _), *_ = save_state_dict_async_plan(
        mcore_to_pyt_state_dict(sharded, False), storage, None, 0, planner=planner
    )
    return SavePlanOfRole(folder, storage.file, storage.items, storage.tensors, common, metadata)


class _Storage(FileSystemWriterAsync):
    """Keeps the plan where Megatron's class would copy the tensors."""

    file: str
    items: tuple[WriteItem, ...]
    tensors: tuple[Tensor, ...]

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        # torch would load anything but tensors as a pickle, without its guard.
        assert all(item.type != WriteItemType.BYTE_IO for item in plan.items)
        self.file = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        self.items = tuple(plan.items)
        self.tensors = tuple(cast(Tensor, planner.resolve_data(item)).detach() for item in plan.items)
