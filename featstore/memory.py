"""How many worker processes the memory holds, with how many threads, and which encoders together."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .work import Pass

SHARE = 0.7         # of the memory that is free: the rest is for what else runs and for cached files
# A worker process with torch and transformers imported has 370 MiB, and its peak is 2.0 to 2.4 times the weights above
# that (HuBERT base, Whisper small, WeNet; 30 s of audio): they are there twice while they are loaded.
WORKER = 600 << 20
OVERHEAD = 2.2


@dataclass(frozen=True)
class Round:
    """Features that are made in one run over the corpus, by how many worker processes of how many threads."""

    names: tuple[str, ...]
    workers: int
    threads: int


def rounds(weights: Mapping[Pass, int], cores: int, free: int, asked: int | None, tasks: int) -> list[Round]:
    """One round if a worker process can hold all weights together, else several; light features go with the first.

    weights: names that share them -> about their bytes; 0 for features without.
    free: bytes of memory.
    asked: worker processes that the user wants, 0 for none beside this one; None for one per core, if so many fit.
    tasks: utterances with something to do.

    A worker has one thread unless weights leave room for fewer workers than there are cores.
    """
    usable = int(SHARE * free)
    heavy = [names for names, size in weights.items() if size]
    groups = [[names for names, size in weights.items() if not size] + heavy[:1]]
    for names in heavy[1:]:
        together = sum(weights[other] for other in (*groups[-1], names))
        if max(asked or 1, 1) * need(together) > usable:
            groups.append([])
        groups[-1].append(names)
    return [_round(group, sum(weights[names] for names in group), max(1, min(cores, tasks)), cores, usable, asked)
            for group in groups]


def _round(group: Sequence[Pass], size: int, most: int, cores: int, usable: int, asked: int | None) -> Round:
    workers = asked if asked is not None else most
    if size and asked is None:
        workers = max(1, min(most, usable // need(size)))
    threads = max(1, cores // max(1, min(workers, most))) if size else 1
    return Round(tuple(name for names in group for name in names), workers, threads)


def need(weights: int) -> int:
    """Bytes that a worker process takes with so many of weights."""
    return WORKER + int(OVERHEAD * weights)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free() -> int:
    """Bytes of memory that may still be taken: what the machine has free, or less where a container's limit is less."""
    return min([_machine(), *_containers(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _machine() -> int:
    with contextlib.suppress(ImportError):
        return int(importlib.import_module("psutil").virtual_memory().available)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # of which others have their part


def _containers(own: Path, root: Path) -> Iterator[int]:
    """What the control groups of this process, and those they are in, have left (cgroup v2, and v1's memory group)."""
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            top = root / controllers
            folder = top / place.lstrip("/")
            for group in (folder, *folder.parents[:len(folder.parts) - len(top.parts)]):
                yield from _left(group)


def _left(group: Path) -> Iterator[int]:
    for limit, used, reclaimable in (("memory.max", "memory.current", "inactive_file"),
                                     ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no limit
            left = int((group / limit).read_text()) - int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield max(0, left + int(stat.get(reclaimable, 0)))  # cached files give way
