"""Batches as torch tensors, read ahead by worker processes. The only module of featstore that imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from .batches import Batches
from .errors import BadRequest

Tensors = dict[str, torch.Tensor]
StartMethod = Literal["fork", "spawn", "forkserver"]


def loader(batches: Batches, *, workers: int = 0, device: str | torch.device = "cpu", start: int = 0,
           stop: int | None = None, rank: int | None = None, world: int | None = None, prefetch: int = 2,
           start_method: StartMethod | None = None) -> Iterator[Tensors]:
    """Batches `start` to `stop` (None: without an end) as dicts of tensors on `device`, in order, of the stored types.

    workers: processes that read ahead, `prefetch` batches each; 0: read when asked. They write into memory they share
        with this process, so nothing is copied on the way. Leaving the loop ends them.
    rank, world: of each batch, this rank's rows; None: as torch.distributed says where it runs, else all rows.
    start_method: of the processes; None: what Python does here. "spawn" imports the script that is run once more, which
        therefore needs `if __name__ == "__main__":`.

    Raises:
        BadRequest: batches cannot be cut into that many ranks; there is no such device; at once, not in the loop.
    """
    place = torch.device(device)
    if place.type == "cuda" and not torch.cuda.is_available():
        raise BadRequest(f"device={device!s}: torch {torch.__version__} sees no CUDA device here; device='cpu' works")
    if workers < 0 or prefetch < 1:
        raise BadRequest(f"workers={workers}, prefetch={prefetch}: expected 0 or more, and 1 or more")
    if start < 0 or (stop is not None and stop < start):
        raise BadRequest(f"batches {start} to {stop}: expected a start of 0 or more and a stop not before it")
    own, all_ranks = _ranks(rank, world)
    batches.check(own, all_ranks)
    ahead: dict[str, Any] = {"prefetch_factor": prefetch, "multiprocessing_context": start_method} if workers else {}
    steps: Iterable[int] = count(start) if stop is None else range(start, stop)
    loaded = DataLoader(_Reader(batches, own, all_ranks), batch_size=None, sampler=steps, num_workers=workers,
                        collate_fn=_as_it_is, pin_memory=place.type == "cuda",
                        generator=torch.Generator(),  # else it would draw from the generator that models use
                        **ahead)
    return _on(place, loaded)


def _on(place: torch.device, loaded: Iterable[Tensors]) -> Iterator[Tensors]:
    """A generator: when it is closed, or dropped by the loop that was left, the workers end with it."""
    batches = iter(loaded)
    try:
        for batch in batches:
            if place.type == "cpu":
                yield batch
            else:
                yield {name: tensor.to(place, non_blocking=True) for name, tensor in batch.items()}
    finally:
        # torch ends its workers when the iterator is collected, and the traceback of an error may keep it for long
        getattr(batches, "_shutdown_workers", lambda: None)()


class _Reader(Dataset[Tensors]):
    """Batch i of a rank, in memory that other processes can see if this one is a worker."""

    def __init__(self, batches: Batches, rank: int, world: int) -> None:
        self._batches, self._rank, self._world = batches, rank, world

    def __getitem__(self, i: int) -> Tensors:
        room = self._batches.room(i, rank=self._rank, world=self._world)
        found = {name: _tensor(array) for name, array in room.items()}
        self._batches.read(i, rank=self._rank, world=self._world,
                           out={name: tensor.numpy() for name, tensor in found.items()})
        return found


def _tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the shape and type of an array whose values do not matter; shared memory in a worker.

    The way torch's own default_collate makes its tensors there: they go to the main process as a file descriptor.
    """
    tensor = torch.from_numpy(array)
    if get_worker_info() is None:
        return tensor
    shared = torch.UntypedStorage._new_shared(max(1, array.nbytes))
    return torch.empty(0, dtype=tensor.dtype).set_(shared, 0, tensor.shape)  # type: ignore[call-overload]


def _as_it_is(batch: Any) -> Any:
    return batch


def _ranks(rank: int | None, world: int | None) -> tuple[int, int]:
    if rank is not None and world is not None:
        return rank, world
    if rank is not None or world is not None:
        raise BadRequest(f"rank={rank}, world={world}: give both, or neither where torch.distributed is initialised")
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
