"""Time-sharing of device memory: what a role does not use at the moment waits in host memory.

A `RoleMemory` knows the storages of one role, by kind: weights, gradients, optimizer state (main weights and moments).
Users hold the kinds that they need and release them; what `parallel.ROLE.offload` names and nobody holds lies on the
host. Whole storages move and keep their identity: the many views that Megatron, the optimizer and the layers have of
them stay valid. On the host each kind has one buffer, pinned on CUDA, which is allocated once.

On CUDA copies run on a stream of the role's own: what is held or prefetched early arrives while something else
computes. On a CPU they happen at once; the storage is released all the same.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, UntypedStorage

from ppomax.engine.errors import DoesNotFitError

Kind = Literal["weights", "gradients", "optimizer"]
Offload = Literal["none", "optimizer", "all"]

MOVED: Mapping[Offload, tuple[Kind, ...]] = {
    "none": (),
    "optimizer": ("optimizer",),
    "all": ("weights", "gradients", "optimizer"),
}
ALIGNMENT = 256
"""Bytes: where the copy of a storage begins in the host buffer."""


class RoleMemory:
    """The device memory of one role. Its methods ignore kinds that stay on the device.

    Reading or writing what is not held is a fault of the caller that ends the process: its storage is empty.
    """

    def __init__(self, tensors: Mapping[Kind, Iterable[Tensor]], offload: Offload, device: torch.device) -> None:
        """tensors: all that the role has of each kind; several may share a storage. Nothing moves before a release."""
        self._kinds = {kind: _Storages(tensors[kind], device) for kind in MOVED[offload]}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and self._kinds else None

    def hold(self, *kinds: Kind) -> None:
        """Starts to bring these kinds to the device, where they stay until `release`. `wait` must follow before use.

        Gradients come back as memory without content. Who holds the optimizer state is taken to change the weights.
        """
        for kind in kinds:
            if kind in self._kinds:
                self._kinds[kind].num_users += 1
                self._bring(self._kinds[kind])
        if "optimizer" in kinds:
            for storages in self._kinds.values():
                storages.is_changed = True

    def prefetch(self, *kinds: Kind) -> None:
        """Starts to bring these kinds to the device for a `hold` that follows. What nobody holds by the next `release`
        goes again.
        """
        for kind in kinds:
            if kind in self._kinds:
                self._bring(self._kinds[kind])

    def wait(self) -> None:
        """Work launched on the current stream from now on finds what is held or prefetched in its place."""
        for storages in self._kinds.values():
            if storages.is_here and storages.arrived is not None:
                current = torch.cuda.current_stream()
                current.wait_event(storages.arrived)
                for x in storages.bytes():
                    x.record_stream(current)

    def release(self, *kinds: Kind) -> None:
        """Ends a `hold`. What nobody holds any more leaves the device, behind the work launched so far."""
        for kind in kinds:
            if kind in self._kinds:
                self._kinds[kind].num_users -= 1
        for kind, storages in self._kinds.items():
            if storages.num_users == 0 and storages.is_here:
                self._send(storages, has_content=kind != "gradients")

    @contextlib.contextmanager
    def resident(self, *kinds: Kind) -> Iterator[None]:
        """Within it these kinds are on the device, for the stream that is current."""
        self.hold(*kinds)
        self.wait()
        try:
            yield
        finally:
            self.release(*kinds)

    def _bring(self, storages: "_Storages") -> None:
        if storages.is_here:
            return
        storages.is_here = True
        storages.allocate()
        if storages.host is not None:
            with self._copying():
                for x, copy in zip(storages.bytes(), storages.host, strict=True):
                    x.copy_(copy, non_blocking=True)
                    self._in_use(x)
        if self._stream is not None:
            storages.arrived = self._stream.record_event()

    def _send(self, storages: "_Storages", *, has_content: bool) -> None:
        storages.is_here = False
        if has_content and storages.host is None:
            storages.host, storages.is_changed = storages.host_buffer(), True
        if storages.host is not None and storages.is_changed:
            with self._copying():
                for x, copy in zip(storages.bytes(), storages.host, strict=True):
                    copy.copy_(x, non_blocking=True)
                    self._in_use(x)
        storages.is_changed = False
        storages.free()

    def _copying(self) -> contextlib.AbstractContextManager:
        """The role's own stream, after all that the current one was given so far."""
        if self._stream is None:
            return contextlib.nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _in_use(self, x: Tensor) -> None:
        """Its memory is not given to others before the role's stream has passed this point."""
        if self._stream is not None:
            x.record_stream(self._stream)


class _Storages:
    """The storages of one kind.

    host: a copy of each, views of one buffer; None before the first is made. is_changed: the host's copies are not
    those of the device any more. arrived: on CUDA, when what was brought last
    is there.
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        found = [tensor.untyped_storage() for tensor in tensors]
        self._storages: list[UntypedStorage] = list({x.data_ptr(): x for x in found}.values())
        self._sizes = [storage.nbytes() for storage in self._storages]
        self._device = device
        self.host: list[Tensor] | None = None
        self.is_here, self.is_changed, self.num_users = True, True, 0
        self.arrived: torch.cuda.Event | None = None

    def bytes(self) -> list[Tensor]:
        """[n] uint8 views of the storages as they are now."""
        return [torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage) for storage in self._storages]

    def allocate(self) -> None:
        for storage, size in zip(self._storages, self._sizes, strict=True):
            storage.resize_(size)

    def free(self) -> None:
        for storage in self._storages:
            storage.resize_(0)

    def host_buffer(self) -> list[Tensor]:
        """Host memory for a copy of each storage, [n] uint8. Raises DoesNotFitError where it cannot be pinned."""
        room = [-(-size // ALIGNMENT) * ALIGNMENT for size in self._sizes]
        buffer = torch.empty(sum(room), dtype=torch.uint8, device="cpu")
        if self._device.type == "cuda":
            # Pinned memory of torch's own comes in powers of two: up to half of it would be lost.
            runtime = torch.cuda.cudart()
            error = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0))
            if error != 0:
                raise DoesNotFitError(
                    f"{buffer.numel() / 2**30:.1f} GiB of host memory for parallel.offload cannot be pinned (CUDA "
                    f"error {error}); let this process lock more memory (ulimit -l, the container's limit), or set "
                    'parallel.offload = "optimizer" or "none" for some roles'
                )
            weakref.finalize(self, runtime.cudaHostUnregister, buffer.data_ptr())
        return [part[:size] for part, size in zip(buffer.split(room), self._sizes, strict=True)]
