"""Where utterances come from: a folder of recordings, a CSV or JSONL manifest, a Kaldi data folder, a lhotse manifest.

Whatever its form, a corpus is a list of utterances with unique keys, and a list of problems: what was found and cannot
be used. Nothing is decoded here, except to slice. docs/corpora.md has the columns, the rules and the known data sets.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .audio import not_regular, why_unreadable
from .errors import BadAudio, BadCorpus, BadRequest, MissingUtterance, nearest
from .manifest import (
    RESERVED,
    TEXT_FIELDS,
    Found,
    Problem,
    Utterance,
    below,
    is_kaldi,
    nfc,
    read_csv,
    read_jsonl,
    read_kaldi,
    shown,
    stem_of,
)
from .slicing import LEAST_S, SHORTEST_S, rows

MAX_KEY_BYTES = 500
AUDIO_EXTENSIONS = frozenset((
    "wav", "wave", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "aifc", "caf", "au", "snd", "w64", "rf64", "sph",
    "nist", "voc", "m4a", "m4b", "mp4", "aac", "webm", "mka", "wma", "ape", "wv", "tta", "dsf", "amr"))
# Files that are never opened to see whether they are audio after all: they lie beside recordings by the thousand.
OTHER_EXTENSIONS = frozenset((
    "txt", "json", "jsonl", "csv", "tsv", "md", "html", "xml", "yaml", "yml", "toml", "ini", "cfg", "log", "py", "sh",
    "lab", "textgrid", "eaf", "trn", "stm", "ctm", "mid", "midi", "musicxml", "ds", "npy", "npz", "pt", "pth", "h5",
    "hdf5", "ark", "scp", "parquet", "png", "jpg", "jpeg", "gif", "svg", "pdf", "zip", "gz", "bz2", "xz", "tar", "tgz",
    "zst"))
FIELD = re.compile(r"\{([^{}]*)\}")
NAME = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(frozen=True)
class Corpus:
    """Utterances in the order of their keys, and what could not be used. `root` is what audio is relative to."""

    root: Path
    name: str
    utterances: tuple[Utterance, ...]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Utterance:
        """The utterance of that key. Raises MissingUtterance with the nearest keys."""
        try:
            return self._by_key[key]
        except KeyError:
            raise MissingUtterance(f"{self.name} has no utterance {key!r} ({nearest(key, self._by_key)})") from None

    def path(self, utterance: Utterance) -> Path:
        """Where the utterance's recording lies."""
        return self.root / utterance.audio

    @cached_property
    def _by_key(self) -> dict[str, Utterance]:
        return {utterance.key: utterance for utterance in self.utterances}

    def __repr__(self) -> str:
        speakers = {utterance.speaker for utterance in self.utterances} - {None}
        lengths = [utterance.duration_s for utterance in self.utterances]
        known = [length for length in lengths if length is not None]
        hours = f", {sum(known) / 3600:.1f} h" if known and len(known) == len(lengths) else ""
        problems = f"; {len(self.problems)} problems" if self.problems else ""
        return f"<Corpus {self.name}: {len(self):,} utterances, {len(speakers):,} speakers{hours}{problems}>"


def corpus(path: str | os.PathLike[str], *, pattern: str | None = None, speaker: str | None = None,
           key: str | None = None, slice_s: float | None = None) -> Corpus:
    """The utterances of a folder, a Kaldi data folder (it has a wav.scp), a .csv, a .jsonl or a lhotse .jsonl(.gz).

    pattern: fields taken from each recording's relative path without extension, such as "{speaker}/{song}_*": a field
        is the shortest text without "/" that lets the whole match, "*" is any text. Without it the speaker of a
        recording in a folder is the first folder below the root. What a manifest says goes before what a pattern says.
    speaker: of every utterance, whatever else is said; fields are filled in: "{gender}{singer}".
    key: of every utterance, from its fields; {utterance} is its file's name where nothing else is said, {key} the key
        it would have had: "{speaker}/{utterance}".
    slice_s: cut every utterance at silences into rows of 3 s to this many, at least 7; this decodes all recordings.

    Raises:
        BadCorpus: if there is no such corpus, a manifest is malformed (with its file and line), or keys are not unique.
        BadRequest: for a pattern or template that makes no sense, or too short a slice.
    """
    if slice_s is not None and not LEAST_S <= slice_s < math.inf:
        raise BadRequest(f"rows of {slice_s} s: give at least {LEAST_S:g} s, since none may be shorter than "
                         f"{SHORTEST_S:g} s")
    match = None if pattern is None else _matcher(pattern)
    where = Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve would follow links)
    root = where if where.is_dir() else where.parent
    problems: list[Problem] = []
    utterances = _found(where, problems, by_folder=match is None)
    if match is not None:
        utterances = _matched(utterances, match, f"does not match the pattern {pattern!r}", problems)
    if speaker is not None:
        utterances = _filled(utterances, "speaker", speaker)
    if key is not None:
        utterances = _filled(utterances, "key", key)
    found = list(utterances)
    if slice_s is not None:
        _check_unique(found)
        found = _sliced(root, found, float(slice_s), problems)
    found = _usable(found, problems)
    _check_unique(found)
    name = where.name if where.is_dir() else where.name.split(".")[0]
    return Corpus(root, name, tuple(sorted(found, key=lambda utterance: utterance.key)),
                  tuple(sorted(problems, key=lambda problem: (problem.path, problem.reason))))


def write(corpus: Corpus, path: str | os.PathLike[str]) -> None:
    """Write a JSONL manifest, which `corpus(path)` reads back; it appears at once or not at all.

    Paths become relative to the manifest's folder where the recordings lie below it, and absolute elsewhere.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100
    if target.suffix != ".jsonl":
        raise BadRequest(f"{target.name}: a manifest is written as .jsonl")
    moved = corpus.root != target.parent
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            for utterance in corpus:
                row = utterance.to_json()
                if moved:
                    row["path"] = below(target.parent, str(corpus.path(utterance)))
                file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:  # a UnicodeEncodeError is a ValueError
        raise BadCorpus(f"{row['key']!a}: cannot be written as JSON: {error}") from None


def _found(where: Path, problems: list[Problem], by_folder: bool) -> Found:
    """What lies at `where`, read as what it is; with `by_folder`, the speaker in a folder is the first one below it."""
    if where.is_dir():
        return read_kaldi(where, problems) if is_kaldi(where) else _folder(where, problems, by_folder)
    if not where.exists():
        reason = "link to nothing" if where.is_symlink() else "no such file or folder"
        raise BadCorpus(f"{shown(str(where))}: {reason}")
    if where.name.endswith(".csv"):
        return read_csv(where)
    if where.name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(where, problems)
    raise BadCorpus(f"{shown(where.name)} is not a corpus: give a folder, a .csv or .jsonl manifest, a Kaldi data "
                    "folder or a lhotse .jsonl(.gz)")


def _matched(utterances: Found, match: re.Pattern[str], reason: str, problems: list[Problem]) -> Found:
    for utterance in utterances:
        found = match.fullmatch(nfc(stem_of(utterance.audio)))
        if found is None:
            problems.append(Problem(utterance.audio, reason))
            continue
        given = {name: value for name, value in found.groupdict().items()
                 if getattr(utterance, name, None) is None and name not in utterance.extra}
        known: dict[str, Any] = {name: given.pop(name) for name in TEXT_FIELDS if name in given}
        yield replace(utterance, **known, extra={**utterance.extra, **given})


def _matcher(pattern: str) -> re.Pattern[str]:
    """The regular expression that a pattern of fields and "*" stands for; a field that comes again is the same text."""
    expression, at, seen = "", 0, set()
    for piece in re.finditer(r"\{([^{}]*)\}|\*", pattern):
        expression += re.escape(nfc(pattern[at:piece.start()]))
        at, name = piece.end(), piece[1]
        if name is None:
            expression += ".*?"
        elif not NAME.fullmatch(name) or name in RESERVED - set(TEXT_FIELDS):
            raise BadRequest(f"pattern {pattern!r}: {{{name}}} cannot be a field; use speaker, song, utterance, "
                             "language, kind, text or a name of your own in lower case")
        else:
            expression += f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            seen.add(name)
    rest = pattern[at:]
    if "{" in rest or "}" in rest or not seen:
        raise BadRequest(f"pattern {pattern!r}: write fields as {{speaker}}, at least one of them")
    return re.compile(expression + re.escape(nfc(rest)), re.DOTALL)


def _filled(utterances: Found, field_name: str, template: str) -> Found:
    """Each utterance with its key or speaker made from its other fields."""
    names = FIELD.findall(template)
    odd = re.search(r"[{}]", FIELD.sub("", template)) or not all(NAME.fullmatch(name) for name in names)
    if odd or (field_name == "key" and not names):
        raise BadRequest(f"{field_name} {template!r}: write fields as in '{{speaker}}/{{utterance}}'")
    for utterance in utterances:
        given = {"utterance": os.path.basename(stem_of(utterance.audio)), **utterance.extra,  # noqa: PTH119
                 "key": utterance.key, **{name: getattr(utterance, name) for name in TEXT_FIELDS}}
        known = {name: str(value) for name, value in given.items() if value not in (None, "")}
        if missing := [name for name in names if name not in known]:
            raise BadCorpus(f"{shown(utterance.audio)} has no {missing[0]!r} for the {field_name} {template!r} "
                            f"({nearest(missing[0], known)})")
        made: dict[str, Any] = {field_name: nfc(template.format_map(known))}
        yield replace(utterance, **made)


def _usable(utterances: list[Utterance], problems: list[Problem]) -> list[Utterance]:
    """Those whose key can be stored; the others become problems."""
    usable = []
    for utterance in utterances:
        key = utterance.key
        if not key.isascii():
            try:
                size = len(key.encode())
            except UnicodeEncodeError:
                problems.append(Problem(ascii(utterance.audio), "its key is not Unicode text"))
                continue
        else:
            size = len(key)
        if not 0 < size <= MAX_KEY_BYTES:
            problems.append(Problem(utterance.audio, f"its key has {size} bytes, 1 to {MAX_KEY_BYTES} are possible; "
                                                     "--key makes others"))
        else:
            usable.append(utterance)
    return usable


def _check_unique(utterances: list[Utterance]) -> None:
    first: dict[str, Utterance] = {}
    twice = [utterance for utterance in utterances if first.setdefault(utterance.key, utterance) is not utterance]
    if not twice:
        return
    other, this = first[twice[0].key], twice[0]
    raise BadCorpus(f"key {this.key!r} is not unique: {shown(other.audio)} and {shown(this.audio)} both have it, and "
                    f"{len(twice)} rows repeat a key in all. Make keys that differ, for instance "
                    "featstore scan CORPUS -o corpus.jsonl "
                    "--key '{speaker}/{utterance}'")


def _folder(root: Path, problems: list[Problem], by_folder: bool) -> Found:
    """Recordings below `root`, by extension or first bytes.

    Folders that are links come after all others, and none is entered twice: a folder that is linked as well keeps its
    own name, and one that contains itself ends. The type of an entry comes with its name; only links cost a `stat`.
    """
    waiting, links, seen = [""], [], set()  # type: list[str], list[str], set[tuple[int, int]]
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
            waiting.append(links.pop())
        folder = waiting.pop()
        try:
            status = (root / folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as entries:
                names = _sorted_out(entries, folder, waiting, links, problems)
        except OSError as error:
            problems.append(Problem(shown(folder or str(root)), why_unreadable(error)))
            continue
        speaker = nfc(folder.partition("/")[0]) or None if by_folder else None
        yield from _recordings(folder, names, speaker, problems)


def _sorted_out(entries: Iterable[os.DirEntry[str]], folder: str, waiting: list[str], links: list[str],
                problems: list[Problem]) -> list[str]:
    """The names of recordings among `entries`; folders go to `waiting`, links to folders to `links`."""
    names = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder + entry.name
        try:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(f"{path}/")
                continue
            regular = entry.is_file(follow_symlinks=False)
            if not regular and entry.is_symlink():
                mode = entry.stat().st_mode
                if stat.S_ISDIR(mode):
                    links.append(f"{path}/")
                    continue
                regular = stat.S_ISREG(mode)
            extension = os.path.splitext(entry.name)[1][1:].lower()  # noqa: PTH122
            if not regular and extension in AUDIO_EXTENSIONS:
                problems.append(Problem(shown(path), not_regular(entry.stat().st_mode)))
            elif regular and (extension in AUDIO_EXTENSIONS
                              or (extension not in OTHER_EXTENSIONS and _begins_as_audio(entry.path))):
                names.append(entry.name)
        except OSError as error:
            if os.path.splitext(entry.name)[1][1:].lower() not in OTHER_EXTENSIONS:  # noqa: PTH122
                problems.append(Problem(shown(path), why_unreadable(error, is_link=True)))
    return names


def _recordings(folder: str, names: list[str], speaker: str | None, problems: list[Problem]) -> Found:
    """Utterances of the recordings `names` in `folder`; those of one stem keep their extensions in their keys."""
    stems = [nfc(stem_of(name)) for name in names]
    counts = Counter(stems) if len(set(stems)) < len(stems) else {}
    for name, stem in zip(names, stems, strict=True):
        audio = folder + name
        if not audio.isascii():
            try:
                audio.encode()
            except UnicodeEncodeError:
                problems.append(Problem(shown(audio), "its name is not UTF-8, so it can have no key: rename it"))
                continue
        key = nfc(folder) + (nfc(name) if counts.get(stem, 1) > 1 else stem)
        yield Utterance(key, audio, speaker=speaker)


def _begins_as_audio(path: str) -> bool:
    """Whether a regular file of unknown extension begins as recordings do; what cannot be read does not."""
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            head = file.read(12)
    except OSError:
        return False
    if head[:4] in (b"RIFF", b"RF64", b"FORM"):
        return head[8:12] in (b"WAVE", b"AIFF", b"AIFC")
    return head.startswith((b"fLaC", b"OggS", b"ID3", b"caff"))


def _sliced(root: Path, utterances: list[Utterance], longest_s: float, problems: list[Problem]) -> list[Utterance]:
    """Every utterance cut into rows; one whose recording cannot be read becomes a problem."""
    found: list[Utterance] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(rows, root / utterance.audio, utterance.start_s, utterance.end_s, longest_s)
                for utterance in utterances]
        try:
            for utterance, job in zip(utterances, jobs, strict=True):
                try:
                    found += _as_rows(utterance, job.result())
                except BadAudio as error:
                    problems.append(Problem(utterance.audio, str(error)))
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _as_rows(utterance: Utterance, cuts: list[tuple[float, float]]) -> Iterator[Utterance]:
    """Rows KEY/0001, KEY/0002 ...; the text stays only with an utterance that was not divided."""
    for number, (start_s, end_s) in enumerate(cuts, 1):
        yield replace(utterance, key=f"{utterance.key}/{number:04d}", start_s=start_s, end_s=end_s,
                      duration_s=round(end_s - start_s, 9), text=utterance.text if len(cuts) == 1 else None)
