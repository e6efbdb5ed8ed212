"""singers.json of a run: whose voices it was trained on, their rows in its table, where they sing.

    {"alice": {"row": 0, "median_hz": 262.1, "low_hz": 180.0, "high_hz": 420.0, "utterances": 12}}

A singer is a speaker of the store by name. A run begun with the weights of another keeps its singers as they are, and
new ones come behind them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featstore import Store
from featstore.errors import BadRequest, CannotLoad

FILE = "singers.json"
LOW, HIGH = 5, 95  # percentiles: the ends of a range that breaks and octave errors of the tracker do not move


@dataclass(frozen=True)
class Singer:
    """A voice that a run knows.

    row: in the model's table of singers.
    median_hz, low_hz, high_hz: of f0 over the voiced frames it was trained on, median, 5th and 95th percentile; None
        where there were none, or the model hears no f0.
    utterances: it was trained on.
    embedding: (D,), the mean of theirs, where the model knows voices by an embedding.
    """

    row: int
    median_hz: float | None
    low_hz: float | None
    high_hz: float | None
    utterances: int
    embedding: tuple[float, ...] | None = None


def read(root: Path) -> dict[str, Singer]:
    """The singers of a run folder by name, in the order of their rows; none where it has no such file.

    Raises:
        CannotLoad: the file is damaged, or of another version.
    """
    path = root / FILE
    if not path.exists():
        return {}
    try:
        found = {name: Singer(**values) for name, values in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CannotLoad(f"{path} cannot be read ({error}): it is damaged, or of another version of "
                         "featstore") from error
    return {name: dataclasses.replace(one, embedding=None if one.embedding is None else tuple(one.embedding))
            for name, one in sorted(found.items(), key=lambda item: item[1].row)}


def packed(singers: Mapping[str, Singer]) -> bytes:
    """What stands in singers.json."""
    rows = {name: {field: value for field, value in dataclasses.asdict(one).items()
                   if field != "embedding" or value is not None} for name, one in singers.items()}
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def by_singer(store: Store, keys: Iterable[str], *, needed: bool) -> dict[str, list[str]]:
    """Singer -> those of the utterances that are theirs, singers in order of name.

    needed: whether each utterance must have one; BadRequest says which has none.
    """
    speakers = {facts["key"]: facts.get("speaker") for facts, _ in store.utterances.facts()}  # one pass over them
    found: dict[str, list[str]] = {}
    unknown = []
    for key in keys:
        speaker = speakers.get(key)
        if speaker:
            found.setdefault(speaker, []).append(key)
        else:
            unknown.append(key)
    if unknown and needed:
        raise BadRequest(f"{len(unknown):,} utterances of {store.path} have no speaker, such as {unknown[0]}: name "
                         "them when the corpus is scanned (featstore scan --speaker, --pattern), take an embedding "
                         "(--speaker NAME), or know no voice (--speaker none)")
    return dict(sorted(found.items()))


def next_row(singers: Mapping[str, Singer]) -> int:
    """The first row behind those that are taken."""
    return 1 + max((singer.row for singer in singers.values()), default=-1)


def described(store: Store, owned: Mapping[str, list[str]], *, f0: str | None, embedding: str | None,
              before: Mapping[str, Singer]) -> dict[str, Singer]:
    """The singers of a training, from `by_singer` of it; those that were known `before` stay just as they are.

    f0, embedding: the features that say where they sing and who they are, or None.
    """
    first = next_row(before)
    new = [name for name in owned if name not in before]
    return dict(before) | {name: _described(store, owned[name], row, f0, embedding)
                           for row, name in enumerate(new, first)}


def _described(store: Store, keys: list[str], row: int, f0: str | None, embedding: str | None) -> Singer:
    low, median, high = _range(store, keys, f0) if f0 is not None else (None, None, None)
    voice = None
    if embedding is not None:
        mean = np.mean([store[key, embedding].as_float() for key in keys], axis=0, dtype=np.float64)
        voice = tuple(round(float(value), 7) for value in mean.reshape(-1))
    return Singer(row, median, low, high, len(keys), voice)


def _range(store: Store, keys: list[str], f0: str) -> tuple[float | None, float | None, float | None]:
    """Low, median and high f0 in Hz of one singer's voiced frames, as many in memory as the singer has."""
    tracks = [store[key, f0].as_float() for key in keys]
    voiced = np.concatenate([track[track > 0] for track in tracks])
    if not len(voiced):
        return None, None, None
    low, median, high = (round(float(value), 2) for value in np.percentile(voiced, [LOW, 50, HIGH]))
    return low, median, high
