"""Compiled code that several processes keep in one place: numba's cache on disk, one writer at a time.

numba numbers the variants of a function (one for float32, one for float64 ...) by what its index holds, and writes the
index before the code. Two processes that do so at once can give two variants one number, and from then on every process
runs the code of the wrong one: it crashes, and goes on crashing until the cache is deleted. Three processes that
imported librosa at once, for the first time on a machine, ended so in 2 of 12 trials.
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
    """Makes numba take turns at its cache. Call it before anything is imported that compiles with numba and keeps it.

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
        with _locked(getattr(self, "_cache_path", None), how):
            return method(self, *args)

    return turn


@contextlib.contextmanager
def _locked(folder: str | None, how: int) -> Iterator[None]:
    """Holds the lock of a folder; none where there is no folder yet, or a file system that has no such locks."""
    try:
        held = os.open(folder or "", os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(held, how)
        yield
    finally:
        os.close(held)
