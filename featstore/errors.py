"""What can go wrong, as types: every message says what was found, what was expected and what to do."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class FeatstoreError(Exception):
    """Anything featstore refuses to do. Each subclass also refines the builtin a caller would expect."""

    def __str__(self) -> str:  # KeyError would print the repr of its message
        return str(self.args[0]) if self.args else ""


class MissingFeature(FeatstoreError, KeyError):
    """A store has no feature of that name (or identity), or an utterance lacks it."""


class MissingUtterance(FeatstoreError, KeyError):
    """A store or corpus has no utterance of that key."""


class StaleFeature(FeatstoreError, ValueError):
    """Features of one utterance stem from different audio."""


class IdentityMismatch(FeatstoreError, ValueError):
    """A name already stands for other settings, weights or another version."""


class LengthMismatch(FeatstoreError, ValueError):
    """A feature is longer or shorter than its audio allows."""


class ContractMismatch(FeatstoreError, ValueError):
    """Two mel contracts differ in a field that matters."""


class BadAudio(FeatstoreError, ValueError):
    """A file is not audio, or holds none that can be used."""


class BadCorpus(FeatstoreError, ValueError):
    """A manifest or folder cannot be read as a corpus: duplicate keys, missing columns, undecodable names."""


class BadRequest(FeatstoreError, ValueError):
    """A request, recipe or option that cannot be understood."""


class MissingWeights(FeatstoreError, FileNotFoundError):
    """Pretrained weights are not on this machine."""


class MissingPackage(FeatstoreError, ImportError):
    """An optional package is needed and not installed."""


class CannotLoad(FeatstoreError, RuntimeError):
    """An extractor cannot be loaded: a package or weights are missing, or its settings do not fit."""


class NotAStore(FeatstoreError, ValueError):
    """A path holds no feature store, or one of a newer format."""


class CorruptSegment(FeatstoreError, ValueError):
    """Stored bytes are missing, truncated or changed."""


class RemoteError(FeatstoreError, OSError):
    """An object store or web server cannot be reached, refuses, or fails."""


class ConditionalPutIgnored(UserWarning):
    """An object store ignores If-None-Match: two writers may both be told that they were first to name a feature."""


class PositionMismatch(FeatstoreError, ValueError):
    """A position in a sequence of batches was saved with other data or other settings."""


class DiskFull(FeatstoreError, OSError):
    """The disk does not have, or did not have, the room that is needed."""


_RANKED = 500


def nearest(word: str, known: Iterable[str], limit: int = 8) -> str:
    """What there is, nearest spelling first, for the end of a message: `it has: f0, log-mel, ...`."""
    import difflib  # 30 ms that only a mistake costs

    names = list(known)
    if not names:
        return "it has none"
    count = len(names)
    if count > _RANKED:  # comparing a million keys with care takes a minute
        names = heapq.nlargest(_RANKED, names, key=lambda name: _shared_start(word, name))
    ranked = sorted(names, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())
    more = f", and {count - limit:,} more" if count > limit else ""
    return "it has: " + ", ".join(ranked[:limit]) + more


def _shared_start(one: str, other: str) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count
