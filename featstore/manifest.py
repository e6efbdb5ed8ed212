"""Utterances, and the manifests that list them: CSV, JSONL, lhotse's JSONL, Kaldi's tables."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .audio import why_unreadable
from .errors import BadCorpus, nearest

TEXT_FIELDS = ("speaker", "text", "language", "kind")
TIMES = ("start", "start_s", "end", "end_s", "duration", "duration_s")
RESERVED = frozenset({"path", "audio", "key", *TIMES, *TEXT_FIELDS})


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording, or the cut [start_s, end_s) of one, in seconds; `end_s` None is its end.

    key: unique in its corpus, path-like, NFC, at most 500 bytes of UTF-8.
    audio: path of the file, with "/", relative to the corpus' root where it lies below it, else absolute.
    duration_s: where a manifest knows it.
    extra: further fields, JSON values under names that are not fields here.
    """

    key: str
    audio: str
    start_s: float = 0.0
    end_s: float | None = None
    speaker: str | None = None
    text: str | None = None
    language: str | None = None
    kind: str | None = None
    duration_s: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        """A manifest row: what is set, `audio` under the name "path", the extra fields beside the others."""
        row: dict[str, Any] = {"key": self.key, "path": self.audio}
        for name in ("speaker", "start_s", "end_s", "duration_s", "text", "language", "kind"):
            value = getattr(self, name)
            if value is not None and (name != "start_s" or value):
                row[name] = value
        if self.start_s and self.end_s is None and self.duration_s is not None:
            row["end_s"] = None  # a start and a duration alone would mean an end
        if self.extra:
            if taken := RESERVED & self.extra.keys():
                raise BadCorpus(f"{self.key}: extra fields may not be called {', '.join(sorted(taken))}")
            row |= self.extra
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Utterance:
        """The utterance that `to_json` gave. Raises BadCorpus if a field is missing or makes no sense."""
        return _utterance(dict(row), "utterance")


@dataclass(frozen=True)
class Problem:
    """A file or row that was found and cannot be used, and why. `path` has bytes that are not UTF-8 as \\xNN."""

    path: str
    reason: str


Found = Iterable[Utterance]


def shown(path: str) -> str:
    """`path` as text that can be printed: bytes that are not UTF-8 as \\xNN."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which no file name has
        return ascii(path)


def nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def stem_of(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122 (by the hundred thousand, and for text rather than paths)


def below(root: Path, path: str) -> str:
    """An absolute `path` relative to `root` where it lies below it, else as it is."""
    start = f"{str(root).rstrip('/')}/"
    return path[len(start):] if path.startswith(start) and "/../" not in path else path


def _placing(base: Path, root: Path) -> Callable[[str], str]:
    """From a path in a manifest, relative to `base`, to the `audio` of an utterance, relative to `root` if below it."""
    same = base == root

    def place(path: str) -> str:
        if same and not path.startswith(("/", ".")) and "/../" not in path:
            return path
        return below(root, f"{base / path}")

    return place


def _utterance(row: dict[str, Any], at: str, place: Callable[[str], str] = str) -> Utterance:
    """The utterance of a manifest row, which is used up: what is left of it are the extra fields."""
    path, other = row.pop("path", None), row.pop("audio", None)
    audio = path if path not in (None, "") else other
    if not isinstance(audio, str) or not audio or "\0" in audio:
        raise BadCorpus(f"{at}: no path (or audio) of a recording, but {audio!r}")
    audio = place(audio)
    open_end = "end_s" in row or "end" in row
    start = _seconds(row, "start_s", "start", at)
    end = _seconds(row, "end_s", "end", at)
    duration = _seconds(row, "duration_s", "duration", at)
    if end is None and not open_end and start is not None and duration is not None:
        end = start + duration
    if end is not None and end <= (start or 0.0):
        raise BadCorpus(f"{at}: ends at {end} s, before or when it starts ({start or 0.0} s)")
    if duration == 0:
        raise BadCorpus(f"{at}: duration 0")
    key = _word(row, "key", at)
    if key is None:
        key = _word({"utterance": row.get("utterance")}, "utterance", at) or stem_of(audio)
    return Utterance(nfc(key), audio, start or 0.0, end, _word(row, "speaker", at), _word(row, "text", at),
                     _word(row, "language", at), _word(row, "kind", at), duration, row)


def _seconds(row: dict[str, Any], name: str, short: str, at: str) -> float | None:
    value, other = row.pop(name, None), row.pop(short, None)
    if value is None or value == "":
        value = other
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BadCorpus(f"{at}: {short} is {value!r}, not seconds from 0 on")
    return seconds


def _word(row: dict[str, Any], name: str, at: str) -> str | None:
    value = row.pop(name, None)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadCorpus(f"{at}: {name} is {value!r}, not text")


def read_csv(where: Path) -> Found:
    """Rows of a CSV manifest with a line of column names, UTF-8."""
    try:
        with where.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True)
            columns = list(table.fieldnames or ())
            if len(set(columns)) < len(columns):
                raise BadCorpus(f"{where.name}: a column name comes twice: {', '.join(columns)}")
            if not {"path", "audio"} & set(columns):
                raise BadCorpus(f"{where.name} has no column 'path' (or 'audio'); "
                                f"it has: {', '.join(columns) or 'none'}")
            place = _placing(where.parent, where.parent)
            for row in table:
                at = f"{where.name}:{table.line_num}"
                if None in row or None in row.values():
                    found = len(columns) + len(row[None]) if None in row else sum(v is not None for v in row.values())
                    raise BadCorpus(f"{at}: {found} cells, but {len(columns)} columns are named in the first line")
                row.pop("", None)  # the nameless column of row numbers that some programs write
                yield _utterance(row, at, place)
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadCorpus(f"{where.name}: not CSV in UTF-8: {error}") from None
    except OSError as error:
        raise BadCorpus(f"{where.name}: {why_unreadable(error)}") from None


def read_jsonl(where: Path, problems: list[Problem]) -> Found:
    """Rows of a JSONL manifest, ours or lhotse's: the first row tells."""
    is_lhotse: bool | None = None
    is_first = True
    place = _placing(where.parent, where.parent)
    for number, row in _objects(where):
        at = f"{where.name}:{number}"
        if is_lhotse is None:
            is_lhotse = bool({"recording", "sources", "tracks"} & row.keys()) or _is_supervision(row)
        if not is_lhotse:
            yield _utterance(row, at, place)
            continue
        if _is_supervision(row):
            raise BadCorpus(f"{at}: a supervision without its recording; give the cuts or the recordings manifest")
        cut = _lhotse(row, at, problems)
        if cut is not None:
            if is_first:
                place, is_first = _placing(_base(where.parent, cut["path"]), where.parent), False
            yield _utterance(cut, at, place)


def _objects(where: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, gzipped or not, with their line numbers."""
    number, decode = 0, json.JSONDecoder(parse_constant=_refuse_constant).decode
    try:
        with (gzip.open if where.suffix == ".gz" else open)(where, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    row = decode(line)
                    if not isinstance(row, dict):
                        raise BadCorpus(f"{where.name}:{number}: {type(row).__name__} instead of an object")
                    yield number, row
    except (ValueError, RecursionError, EOFError, zlib.error) as error:
        if isinstance(error, BadCorpus):
            raise
        raise BadCorpus(f"{where.name}:{number}: not JSON in UTF-8: {error}") from None
    except OSError as error:
        raise BadCorpus(f"{where.name}: {why_unreadable(error)}") from None


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def _base(folder: Path, first: str) -> Path:
    """What relative paths of a Kaldi or lhotse corpus are relative to: its folder, as everywhere here, unless its first
    recording lies only where those toolkits look, relative to the working directory."""
    here = Path.cwd()
    return here if not (folder / first).exists() and (here / first).exists() else folder


def _is_supervision(row: dict[str, Any]) -> bool:
    return "recording_id" in row and "recording" not in row and "path" not in row and "audio" not in row


def _lhotse(row: dict[str, Any], at: str, problems: list[Problem]) -> dict[str, Any] | None:
    """A row of ours for a lhotse recording or cut; None, and a problem, where it is more than a cut of a mono file."""
    name = str(row.get("id") or at)
    recording = row if "sources" in row else row.get("recording")
    reason = _lhotse_trouble(row, recording)
    if reason is not None or not isinstance(recording, dict):
        problems.append(Problem(name, reason or "no recording"))
        return None
    found: dict[str, Any] = {"key": name, "path": recording["sources"][0]["source"]}
    if row is recording:
        return found | {"duration": recording.get("duration"), "end": None}
    start, duration = row.get("start", 0), row.get("duration")
    whole = start == 0 and duration == recording.get("duration")
    end = None if whole or not isinstance(start, int | float) or not isinstance(duration, int | float) \
        else round(start + duration, 9)
    said = [item for item in row.get("supervisions") or () if isinstance(item, dict)]
    for field_name in ("speaker", "language"):
        values = {item.get(field_name) for item in said} - {None}
        if len(values) == 1:
            found[field_name] = values.pop()
    text = " ".join(item["text"] for item in said if item.get("text"))
    custom = {key: value for key, value in (row.get("custom") or {}).items()
              if isinstance(value, str | int | float) and key not in RESERVED}
    return custom | found | {"text": text, "start": start, "end": end, "duration": duration}


def _lhotse_trouble(row: dict[str, Any], recording: Any) -> str | None:
    if "tracks" in row:
        return "a mixture of cuts: save its audio as a file first"
    if not isinstance(recording, dict):
        return "no recording"
    sources: list[dict[str, Any]] = recording.get("sources") or []
    if len(sources) != 1 or sources[0].get("type") != "file" or not isinstance(sources[0].get("source"), str):
        kinds = ", ".join(str(source.get("type")) for source in sources) or "none"
        return f"its audio is not one file (sources: {kinds}); commands and addresses are never run or fetched"
    if recording.get("transforms"):
        return "its audio is transformed on the fly: save it as a file first"
    if "sources" not in row and len(sources[0].get("channels") or [0]) > 1:
        return "a cut of one channel of several: save that channel as a file first"
    return None


def is_kaldi(folder: Path) -> bool:
    return (folder / "wav.scp").is_file()


def read_kaldi(folder: Path, problems: list[Problem]) -> Found:
    """Utterances of a Kaldi data folder: wav.scp, and segments, utt2spk, text and utt2lang where they are."""
    recordings = {name: path for name, path, _ in _table(folder / "wav.scp")}
    refused = {name for name, path in recordings.items() if path.endswith("|") or path.startswith("|") or path == "-"
               or re.search(r"\.ark:\d+$", path)}
    problems.extend(Problem(name, f"wav.scp: {recordings[name]!r} is a command or archive; only paths of files are "
                                  "read, and nothing is run") for name in sorted(refused))
    first = next((path for name, path in recordings.items() if name not in refused), "")
    place = _placing(_base(folder, first), folder)
    speakers, texts, languages = (
        {name: value for name, value, _ in _table(folder / file, may_be_empty=file == "text")}
        if (folder / file).is_file() else {} for file in ("utt2spk", "text", "utt2lang"))
    for name, recording, start, end in _segments(folder, recordings):
        if recording in refused:
            if name != recording:
                problems.append(Problem(name, f"its recording {recording} is a command or archive"))
            continue
        yield Utterance(nfc(name), place(recordings[recording]), start, end, speakers.get(name),
                        texts.get(name) or None, languages.get(name))


def _segments(folder: Path, recordings: Mapping[str, str]) -> Iterator[tuple[str, str, float, float | None]]:
    """Utterance, recording, start and end; without a file of segments, every recording is one."""
    if not (folder / "segments").is_file():
        yield from ((name, name, 0.0, None) for name in recordings)
        return
    for name, line, at in _table(folder / "segments"):
        cells = line.split()
        if len(cells) != 3:
            raise BadCorpus(f"{at}: {len(cells) + 1} words, but UTTERANCE RECORDING START END are expected")
        recording, start, end = cells
        if recording not in recordings:
            raise BadCorpus(f"{at}: recording {recording!r} is not in wav.scp ({nearest(recording, recordings)})")
        row = {"path": recording, "start": start, "end": None if end in ("-1", "-1.0") else end}  # -1: to its end
        cut = _utterance(row, at)
        yield name, recording, cut.start_s, cut.end_s


def _table(path: Path, may_be_empty: bool = False) -> Iterator[tuple[str, str, str]]:
    """First word, rest of the line, and file:line, of a Kaldi table; a first word that comes again is an error."""
    seen: set[str] = set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                at = f"{path.name}:{number}"
                cells = line.strip().split(maxsplit=1)
                if not cells:
                    continue
                if len(cells) < 2 and not may_be_empty:
                    raise BadCorpus(f"{at}: {cells[0]!r} stands alone")
                if cells[0] in seen:
                    raise BadCorpus(f"{at}: {cells[0]!r} comes again")
                seen.add(cells[0])
                yield cells[0], cells[1] if len(cells) > 1 else "", at
    except UnicodeDecodeError as error:
        raise BadCorpus(f"{path.name}: not UTF-8: {error}") from None
    except OSError as error:
        raise BadCorpus(f"{path.name}: {why_unreadable(error)}") from None
