"""Compiled code that several processes keep in one place: numba's cache on disk, one process at a time.

numba numbers the variants of a function (one for float32, one for float64 ...) by what its index holds, and writes the
index before the code; and for a ufunc it keeps code and the way into it apart, under names that differ from process to
process. Two processes that compile at once can leave one's index with the other's code. From then on every process
calls the wrong code, or none: it crashes, and goes on crashing until the cache is deleted. Three processes importing
librosa at once, for the first time on a machine, ended so in 3 of 20 trials.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

MARK = "_one_writer_at_a_time"


def guard() -> None:
    """Makes numba take turns at its index. Call it before anything is compiled by a function of several variants.

    Nothing where numba is not installed, or where it keeps its code in another way than it is known to.
    """
    try:
        from numba.core.caching import IndexDataCacheFile as Kept
    except ImportError:
        return
    if getattr(Kept, MARK, False) or not all(hasattr(Kept, name) for name in ("save", "load")):
        return
    for name, how in (("save", fcntl.LOCK_EX), ("load", fcntl.LOCK_SH)):
        setattr(Kept, name, _in_turn(getattr(Kept, name), how))
    setattr(Kept, MARK, True)


def _in_turn(method: Callable[..., Any], how: int) -> Callable[..., Any]:
    @wraps(method)
    def turn(self: Any, *args: Any) -> Any:
        with locked(getattr(self, "_cache_path", ""), how):
            return method(self, *args)

    return turn


@contextlib.contextmanager
def locked(folder: str, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Holds the lock of a folder; none where there is no such folder, or a file system without locks on folders."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, how)
        yield
    finally:
        os.close(held)
