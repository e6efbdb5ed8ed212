"""The store: utterances and features by name, read as a snapshot, written by any number of writers at once."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import storage
from .errors import (
    BadRequest,
    MissingFeature,
    MissingUtterance,
    NotAStore,
    nearest,
)
from .index import Collection, Index, drop_replaced
from .int8 import Quantiser, is_int8
from .row import Row
from .segment import Segment, group
from .spec import NAME, Spec
from .storage import Place

if TYPE_CHECKING:
    from featstore_align.conversion import Exact, Timing

    from .splits import Split
    from .view import View
    from .writer import Writer

FORMAT = 1
COMMIT_S = 60.0
MAKING_S = 2.0  # how long an empty folder may be a store that another process is making
_PIECE_BYTES = 8 << 20  # of utterances' records read at once
_SPEAKERS_OF = 20_000   # utterances whose speakers a repr counts


@dataclass(frozen=True)
class StoredUtterance:
    """What the store knows of one recording, or a cut of one. `source` names the audio its features stem from.

    audio: path of the file, relative to `root` (the corpus it was read from) or absolute.
    flags: what may be wrong with the recording: see `audio.Reader`.
    """

    key: str
    audio: str | None = None
    root: str | None = None
    start_s: float = 0.0
    end_s: float | None = None
    speaker: str | None = None
    text: str | None = None
    language: str | None = None
    kind: str | None = None
    duration_s: float = 0.0
    sample_rate: int | None = None
    channels: int | None = None
    flags: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def from_json(cls, record: Mapping[str, Any], source: str) -> StoredUtterance:
        known = {name: record[name] for name in cls.__dataclass_fields__ if name in record}
        return cls(**known | {"flags": tuple(record.get("flags", ())), "source": source})


@dataclass(frozen=True)
class Why:
    """Why a stored feature is or is not up to date.

    state: fresh, stale, missing, imported or unknown (no audio at hand to compare with).
    differs: field -> (what is stored, what is asked for); {} when fresh.
    reason: one sentence.
    """

    utterance: str
    feature: str
    state: str
    differs: dict[str, tuple[Any, Any]]
    reason: str


class Feature(Mapping[str, Row]):
    """One identity of a feature: what made it, and the rows of the utterances that have it, by key."""

    def __init__(self, store: Store, name: str, identity: str) -> None:
        self.name, self._store, self.short = name, store, identity
        self._collection = Collection(store.path / "features" / name / identity, mapped=store.mapped)

    @cached_property
    def spec(self) -> Spec:
        """The full record of what made it."""
        facts = storage.read_document(self._collection.folder / "zarr.json")["attributes"]["featstore"]
        return Spec.from_json(facts["spec"])

    @property
    def identity(self) -> str:
        """64 hexadecimal digits; the first 16 name its folder."""
        return self.spec.identity

    @property
    def label(self) -> str:
        """The identity as people see it: nine digits, or where it was imported from."""
        return f"imported:{self.spec.settings['digest'][:9]}" if self.imported else self.short[:9]

    @property
    def imported(self) -> bool:
        return self.spec.made_by == "imported"

    @property
    def frame_rate(self) -> Fraction | None:
        return self.spec.frame_rate

    @property
    def kind(self) -> str:
        return self.spec.kind

    @property
    def dim(self) -> int:
        return self.spec.dim or 0

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """The shape of one frame."""
        return (self.dim,) if self.dim else ()

    @cached_property
    def dtype(self) -> np.dtype:
        """Of what is read. An int8 feature gives values of the type that it was made from."""
        return self.stored_dtype if self.quantiser is None else self.quantiser.dtype

    @cached_property
    def stored_dtype(self) -> np.dtype:
        """Of what is on disk."""
        return np.dtype(self.spec.dtype)

    @cached_property
    def quantiser(self) -> Quantiser | None:
        """How int8 becomes values, where `pack` made it."""
        return Quantiser.load(self.folder, self.spec) if is_int8(self.spec) else None

    def decoded(self, stored: np.ndarray) -> np.ndarray:
        """What frames that were read from the disk stand for."""
        if self.quantiser is None:
            return stored
        out = np.empty(stored.shape, self.dtype)
        self.quantiser.decode(stored, out)
        return out

    @cached_property
    def index(self) -> Index:
        self._collection, index = self._collection.indexed(self._store.made_from_current_audio)
        self._store.check_there(index)
        return index

    @property
    def folder(self) -> Place:
        return self._collection.folder

    @property
    def nbytes(self) -> int:
        """Bytes of frames on disk, superseded rows included; what is linked counts once."""
        sizes: dict[str, int] = {}
        linked: set[str] = set()
        for segment in self.segments:
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                sizes[segment.id] = segment.stored
                linked.update(segment.facts.get("links", ()))
        return sum(size for name, size in sizes.items() if name not in linked)

    @property
    def codec(self) -> str:
        """How its rows are stored: raw, zstd or pcodec; several, where segments differ, with + between them."""
        return "+".join(sorted({s.codec for s in drop_replaced(self.segments) if s.facts["frames"]})) or "raw"

    @property
    def segments(self) -> Sequence[Segment]:
        """All committed segments, those replaced by another included."""
        return self._collection.segments

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.find(key) is not None

    def __iter__(self) -> Iterator[str]:
        try:
            return self.index.live_keys()
        except FileNotFoundError:
            return self._list_again().live_keys()

    def __getitem__(self, key: str) -> Row:
        index = self.index
        record = index.find(key)
        if record is None:
            raise MissingFeature(self._missing(key))
        return Row(self, key, record, index.segments)

    def look_again(self, key: str, gone: Segment) -> Row:
        """A key's row among the segments there are now, from which this feature's other rows come too from now on.

        gone: the segment that was found removed. Where the rows come from others already, these are not listed anew:
        of the rows of a batch only the first one that is missed costs an index.
        """
        if any(segment is gone for segment in self.index.segments):
            self._list_again()
        index = self.index
        record = index.find(key)
        if record is None:
            raise MissingFeature(f"{key}: {self.name} was removed since the store was opened; open it again")
        return Row(self, key, record, index.segments)

    def _list_again(self) -> Index:
        self._collection = self._collection.again()
        self.__dict__.pop("index", None)
        return self.index

    def _missing(self, key: str) -> str:
        utterances = self._store.utterances
        if key not in utterances:
            return f"{self._store.path} has no utterance {key!r} ({nearest(key, utterances)})"
        return (f"{key} has no {self.name} in {self._store.path}; {len(self):,} of {len(utterances):,} utterances have "
                f"it. Try: featstore extract CORPUS {self._store.path} -f {self.name}")

    def __repr__(self) -> str:
        rate = f"{float(self.frame_rate):g} Hz" if self.frame_rate else "one per utterance"
        return f"<{self.name}@{self.label}: {self.kind}, {rate}, dim {self.dim}, {self.dtype}, {len(self)} utterances>"


class Utterances(Mapping[str, StoredUtterance]):
    """The utterances of a store by key, in the order of their keys."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._collection = Collection(store.path / "utterances")

    @cached_property
    def index(self) -> Index:
        self._collection, index = self._collection.indexed()
        self._store.check_there(index)
        return index

    @cached_property
    def _keys(self) -> list[str]:
        try:
            return sorted(self.index.live_keys())
        except FileNotFoundError:
            return sorted(self._look_again().live_keys())

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.index.find(key) is not None

    def __getitem__(self, key: str) -> StoredUtterance:
        record = self.index.find(key)
        if record is None:
            raise MissingUtterance(f"{self._store.path} has no utterance {key!r} ({nearest(key, self)})")
        try:
            return self._parse(record)
        except FileNotFoundError:
            found = self._look_again().find(key)
            if found is None:
                raise MissingUtterance(f"{key} was removed since the store was opened; open it again") from None
            return self._parse(found)

    def get(self, key: str, default: Any = None) -> Any:
        """The utterance, or `default`; unlike a failed look-up it does not search for the nearest spelling."""
        return self[key] if key in self else default  # noqa: SIM401 (this is get)

    @property
    def hours(self) -> float:
        """Duration of all utterances together."""
        return float(self.index.records["seconds"][self.index.live].sum()) / 3600

    def speakers(self) -> set[str]:
        """The names of all speakers. Reads every record: seconds for a million utterances."""
        try:
            return self._speakers()
        except FileNotFoundError:
            self._look_again()
            return self._speakers()

    def _speakers(self) -> set[str]:
        return {facts["speaker"] for facts, _ in self.facts() if facts.get("speaker") is not None}

    def read_all(self) -> Iterator[StoredUtterance]:
        """Every utterance, in the order in which they lie on disk: several times faster than one by one."""
        for facts, source in self.facts():
            yield StoredUtterance.from_json(facts, source.hex())

    def facts(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The fields of every utterance as they are stored, and the digest of its audio; as `read_all`, and lighter."""
        """The record and the source of each, read in pieces that lie together."""
        index, live = self.index, np.flatnonzero(self.index.live)
        segment, offset, length = (index.records[name][live].astype(np.int64) for name in
                                   ("segment", "offset", "length"))
        order = np.lexsort((offset, segment))
        segment, offset, length = segment[order], offset[order], length[order]
        apart = (segment[1:] != segment[:-1]) | (offset[1:] // _PIECE_BYTES != offset[:-1] // _PIECE_BYTES)
        for first, stop in pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(live)] if len(live) else []):
            held, part, start = index.segments[int(segment[first])], slice(first, stop), int(offset[first])
            data = held.layout.empty(int(offset[stop - 1] + length[stop - 1]) - start)
            held.read(start, data)
            text, sources = data.tobytes(), index.records["source"][live[order[part]]]
            for at, count, source in zip((offset[part] - start).tolist(), length[part].tolist(), sources, strict=True):
                yield json.loads(text[at:at + count]), source.tobytes()

    def _look_again(self) -> Index:
        self._collection, index = self._collection.again().indexed()
        self.__dict__["index"] = index
        return index

    def _parse(self, record: np.void) -> StoredUtterance:
        segment = self.index.segments[int(record["segment"])]
        data = b"".join(block.tobytes() for block in segment.blocks(record))
        return StoredUtterance.from_json(json.loads(data), record["source"].tobytes().hex())


class Store:
    """A feature store, read as the snapshot taken when it was opened (and again when a writer of this handle closes).

    `store[utterance, feature]` is a `Row`; `store.utterances` and `store.features` are mappings.
    """

    def __init__(self, path: str | Place, *, mapped: bool = False) -> None:
        self.path = storage.place(path)
        self.mapped = mapped and not isinstance(self.path, storage.ObjectPath)
        _check_root(self.path)
        self.refresh()

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Place]]:
        return (partial(Store, mapped=True) if self.mapped else Store), (self.path,)

    def refresh(self) -> None:
        """Take a new snapshot: see what was committed since."""
        names = feature_names(self.path)
        if not names:
            _check_root(self.path)
        served = dict(zip(names, storage.concurrently(self.path, lambda name: read_served(self.path, name), names),
                          strict=True))
        found = [(name, identity) for name, identity in served.items() if identity]
        features = storage.concurrently(self.path, lambda item: Feature(self, *item), found)
        self.features: dict[str, Feature] = {feature.name: feature for feature in features}
        self.utterances = Utterances(self)  # last, as writers commit them first: no feature without its utterance
        self.forget_splits()

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The splits by name; `featstore.split` makes them."""
        from .splits import read_splits  # for training alone

        return read_splits(self.path)

    def check_there(self, index: Index) -> None:
        """NotAStore where an index is empty because the store itself is no longer at its path."""
        if not len(index.records) and isinstance(self.path, Path) and not (self.path / "zarr.json").exists():
            raise NotAStore(f"{self.path} is gone: it was moved or removed since it was opened, or, if that path is "
                            f"relative, the working directory changed (now {Path.cwd()}). Open it again where it is")

    def forget_splits(self) -> None:
        """Look for splits again when they are asked for."""
        self.__dict__.pop("splits", None)

    def feature(self, name: str) -> Feature:
        """The feature of a name, or of NAME@IDENTITY-PREFIX."""
        if name in self.features:
            return self.features[name]
        name, _, prefix = name.partition("@")
        if not prefix:
            if name not in self.features:
                raise MissingFeature(f"{self.path} has no feature {name!r} ({nearest(name, self.features)}). "
                                     f"Try: featstore extract CORPUS {self.path} -f {name}")
            return self.features[name]
        found = [identity for identity in self.identities(name) if identity.startswith(prefix[:16])]
        if len(found) != 1:
            raise MissingFeature(f"{self.path}: {name}@{prefix} names {len(found)} identities of {name} "
                                 f"({nearest(prefix, self.identities(name))})")
        served = self.features.get(name)
        return served if served is not None and served.short == found[0] else Feature(self, name, found[0])

    def identities(self, name: str) -> list[str]:
        """The identities kept of a name (16 digits each), the served one included."""
        if not NAME.fullmatch(name):
            return []
        return [entry for entry in storage.names(self.path / "features" / name) if _IDENTITY.fullmatch(entry)]

    def __getitem__(self, item: tuple[str, str]) -> Row:
        if not isinstance(item, tuple) or len(item) != 2:
            raise BadRequest(f"store[{item!r}]: expected store[utterance, feature], "
                             "such as store['alto1/nino_dios', 'f0']")
        return self.feature(item[1])[item[0]]

    def view(self, features: Sequence[str], *, like: str | None = None, rate: Exact | None = None,
             timing: Timing = "edges", utterances: Sequence[str] | None = None, split: str | None = None) -> View:
        """Features on one frame grid: that of the feature `like`, or `rate` frames per second (an exact number).

        timing: "edges" (ReTrans as published) or "centres" (which also removes the lag between encoders).
        utterances: those of the view; None: all, which must have all features.
        split: "main/train": of these only the ones in a part of a split.

        Raises:
            MissingFeature: names the features that are missing, and for how many utterances.
            StaleFeature: features of one utterance were made from different audio.
            BadRequest: the grid makes no sense for a feature: a frame would be no whole number of samples; or there is
                no such split or part, or nothing in it.
        """
        from .view import View  # it needs numpy's align alone, which a store that is only written does not

        if split is not None:
            from .splits import members

            utterances = members(self, split, self.utterances if utterances is None else utterances)
        if isinstance(self.path, storage.ObjectPath):  # what the view needs of each feature, asked for at once
            wanted = [self.features[name] for name in dict.fromkeys([*features, like]) if name in self.features]
            storage.concurrently(self.path, lambda feature: (feature.spec, feature.index), wanted)
        return View(self, features, like=like, rate=rate, timing=timing, utterances=utterances)

    def writer(self, *, commit_every_s: float = COMMIT_S, provenance: Mapping[str, str] | None = None) -> Writer:
        """A writer; one per process. Several writers, on several machines, may be open at once."""
        from .writer import Writer  # it needs Store

        return Writer(self, commit_every_s=commit_every_s, provenance=provenance)

    def why(self, utterance: str, feature: str, spec: Spec | None = None, source: bytes | None = None) -> Why:
        """Why a feature of an utterance is or is not up to date.

        spec: what is asked for now (None: what is stored).
        source: the source digest of the audio as it is now (None: as the store last saw it).
        """
        held = self.feature(feature)
        known = self.utterances.index.find(utterance)
        if known is None:
            raise MissingUtterance(f"{self.path} has no utterance {utterance!r} "
                                   f"({nearest(utterance, self.utterances)})")
        differs = held.spec.differs(spec) if spec is not None and not held.imported else {}
        record = held.index.find(utterance)
        now = (source or known["source"].tobytes()).hex()
        if record is None:
            return Why(utterance, feature, "missing", differs, f"{utterance} has no {feature} yet")
        if held.imported:
            return Why(utterance, feature, "imported", {}, f"{feature} was imported ({held.label}); "
                       "nothing here can tell whether it is up to date")
        made = record["source"].tobytes().hex()
        if made != now:
            differs["audio"] = (made[:12], now[:12])
        if not differs:
            return Why(utterance, feature, "fresh", {}, "settings, weights, version and audio are as stored")
        fields = ", ".join(f"{name}={old!r} (now {new!r})" for name, (old, new) in differs.items())
        return Why(utterance, feature, "stale", differs, f"made with {fields}")

    def made_from_current_audio(self, records: np.ndarray) -> np.ndarray:
        """Which of a feature's records stem from the audio their utterance has now."""
        index = self.utterances.index
        if not len(index.records):
            return np.zeros(len(records), bool)
        at = index.positions(np.stack([records["hash"], records["tag"]], axis=1))
        return (at >= 0) & (index.records["source"][at] == records["source"]).all(axis=1)

    def __repr__(self) -> str:
        count = len(self.utterances)
        speakers = len(self.utterances.speakers()) if count <= _SPEAKERS_OF else 0  # a repr may not take seconds
        people = f", {speakers} speaker{'s' * (speakers != 1)}" if speakers else ""
        names = " ".join(self.features) or "no features"
        hours = self.utterances.hours
        length = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        return f"<Store {self.path.name}: {count:,} utterance{'s' * (count != 1)}{people}, {length}; {names}>"


def create(path: str | Place) -> Store:
    """A new, empty store in a folder or under a URL. Refuses an existing path."""
    root = storage.place(path)
    if root.exists():
        raise NotAStore(f"{root} exists already; open it with featstore.open, or choose another path")
    if isinstance(root, Path):
        if not root.parent.is_dir():
            raise NotAStore(f"the folder {root.parent} does not exist; make it first")
        with storage.disk_room(root):
            root.mkdir()
    for folder in (root, root / "utterances", root / "utterances" / "segments", root / "features"):
        make_group(root, folder)
    storage.sync_folder(root.parent)
    return Store(root)


def open(path: str | Place, *, mapped: bool = False) -> Store:
    """A store as it is now, in a folder or under a URL such as s3://bucket/songs.zarr.

    NotAStore says what is there instead, or that its format is newer.

    mapped: read the frames through maps of their files, which is faster for data that fits in memory and slower for
    data that does not: what is not there yet comes page by page. Same bytes either way; a URL is never mapped.
    """
    return Store(path, mapped=mapped)


def open_or_create(path: str | Place) -> Store:
    """The store at `path`, made if there is none: of several processes that ask at once, one makes it."""
    root = storage.place(path)
    if not root.exists():
        with contextlib.suppress(NotAStore, FileExistsError):
            return create(root)
        if isinstance(root, Path) and not root.parent.is_dir():
            return create(root)  # which says so
    deadline = time.monotonic() + MAKING_S
    while _being_made(root) and time.monotonic() < deadline:
        time.sleep(0.02)
    return Store(root)


def _being_made(root: Place) -> bool:
    """Whether another process may have made the folder just now, and is about to put the document into it."""
    return isinstance(root, Path) and root.is_dir() and all(
        path.name.startswith(".zarr.json.") for path in root.iterdir())


def serve(root: Place, name: str, identity: str | None) -> None:
    """Let a name stand for an identity (None: for nothing), atomically; the last of several wins."""
    while not claim(root, name, identity, instead_of=read_served(root, name)):
        pass


def claim(root: Place, name: str, identity: str | None, *, instead_of: str | None) -> bool:
    """Let a name stand for an identity if it stands for `instead_of` now; False if somebody else was first."""
    home = root / "features" / name / "served"
    steps = _steps(home)
    found = _identity(steps)
    if found == identity:
        return True
    if found != instead_of:
        return False
    step = home / f"{max((int(step.name) for step in steps), default=0) + 1:08d}"
    make_group(root, home)
    storage.make_folders(root, step)
    return storage.create_document(step / "zarr.json", group({"identity": identity}))


def read_served(root: Place, name: str) -> str | None:
    """The identity (16 digits) a name stands for now, or None."""
    return _identity(_steps(root / "features" / name / "served"))


def _identity(steps: Sequence[Place]) -> str | None:
    return storage.read_document(steps[-1] / "zarr.json")["attributes"]["featstore"]["identity"] if steps else None


def _steps(home: Place) -> list[Place]:
    """The steps of a name's history that are there. An object's step is its document: no folder is made before it."""
    steps = [home / name for name in storage.names(home) if re.fullmatch("[0-9]{8}", name)]
    return [step for step in steps if not isinstance(step, Path) or (step / "zarr.json").exists()]


def mismatch(root: Place, old: Feature, spec: Spec) -> str:
    """The message for a name that stands for other settings: what differs, and the two ways out."""
    differs = old.spec.differs(spec)
    chosen = {field: values for field, values in differs.items() if field not in _FOLLOWS} or differs
    if old.imported:
        held, asked = f"an imported {old.name!r} ({old.label})", "an extracted one"
    else:
        held = f"{old.name!r} with " + ", ".join(f"{field}={brief(was)}" for field, (was, _) in chosen.items())
        asked = ", ".join(f"{field}={brief(now)}" for field, (_, now) in chosen.items())
    return (f"{root} has {held}; you ask for {asked}. Nothing was changed.\n"
            f"  keep both:  give it another name, such as -f {old.name}-2={spec.made_by}...\n"
            f"  replace:    add --replace ({len(old):,} utterances; the old one is served until the new one is "
            "complete)")


def brief(value: Any) -> Any:
    """A field of a spec for a message: digests are cut to what tells them apart."""
    return f"{value[:19]}..." if isinstance(value, str) and re.fullmatch("sha256:[0-9a-f]{64}", value) else value


_FOLLOWS = ("centre_s", "frame_rate", "window", "dim")  # from what was chosen; said only where nothing else differs
_IDENTITY = re.compile(r"[0-9a-f]{16}")


def _check_root(root: Place) -> None:
    try:
        record = storage.read_document(root / "zarr.json")
    except FileNotFoundError:
        what = "does not exist" if not root.exists() else "is not a store: it has no zarr.json"
        raise NotAStore(f"{root} {what}. Make one: featstore extract CORPUS {root} -f log-mel -f f0") from None
    except NotADirectoryError:
        raise NotAStore(f"{root} is a file, expected the folder of a store") from None
    facts = record.get("attributes", {}).get("featstore", {})
    found = facts.get("format")
    if not isinstance(found, int):
        raise NotAStore(f"{root} is a Zarr group, but not a store of featstore (its attributes give no format version)")
    if found > FORMAT:
        raise NotAStore(f"{root} has store format {found}; this featstore reads up to {FORMAT}. "
                        "Update it: pip install --upgrade featstore")


def feature_names(root: Place) -> list[str]:
    return [name for name in storage.names(root / "features") if NAME.fullmatch(name)]


def make_group(root: Place, folder: Place) -> None:
    storage.make_folders(root, folder)
    storage.create_document(folder / "zarr.json", group({"format": FORMAT} if folder == root else {}))
