"""Listening tests: naturalness (1 to 5) and similarity (1 to 4) on one static page, and what the answers say.

    test/index.html   what listeners open: sounds, orders and scales are inside; no name of a system is
    test/key.json     which system and utterance a sound is, and what each check expects: not for listeners
    test/answers/     what was collected, a JSON file a listener

Naturalness is the absolute category rating of ITU-T P.800, similarity the scale of the Voice Conversion Challenge 2018
(Lorenzo-Trueba et al., 2018): same or different singer, sure or not.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from featstore import storage
from featstore.errors import BadRequest

from . import page, pairs

Array = np.ndarray

SCALES = {
    "naturalness": ("How natural does this sound?",
                    ("Bad: unnatural", "Poor", "Fair", "Good", "Excellent: natural")),
    "similarity": ("Do the two recordings sound like one singer? The first is the voice that was wanted.",
                   ("Different, absolutely sure", "Different, not sure", "Same, not sure", "Same, absolutely sure")),
}
EVERY = 10          # judgements between two attention checks; one at least in each part
RATE = 16000        # of the tones of a check, Hz
LARGEST = 200 << 20  # bytes of a page: browsers struggle with more
FORMAT = 1


@dataclass(frozen=True)
class Made:
    """What was made: the folder, how many listeners there are orders for, judgements each gives, checks among them."""

    folder: Path
    listeners: int
    judgements: int
    checks: int
    bytes: int


@dataclass(frozen=True)
class Opinion:
    """The mean opinion of a system and half of its interval of 95 %; NaN where one listener or utterance is all."""

    task: str
    system: str
    mean: float
    half: float
    ratings: int
    listeners: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.half:.2f}" if math.isfinite(self.half) else f"{self.mean:.2f}"


@dataclass(frozen=True)
class Collected:
    """What the answers say. excluded: (listener, why); files: those read."""

    opinions: tuple[Opinion, ...]
    listeners: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; None where there is no interval."""
        rows = [{"task": o.task, "system": o.system, "mean": o.mean, "half": o.half if math.isfinite(o.half) else None,
                 "ratings": o.ratings, "listeners": o.listeners, "text": str(o)} for o in self.opinions]
        return {"opinions": rows, "listeners": list(self.listeners),
                "excluded": [{"listener": name, "why": why} for name, why in self.excluded]}


def make(systems: Mapping[str, str | storage.Place], out: Path, *, target: str | storage.Place | None = None,
         tasks: Sequence[str] = (), listeners: int = 24, utterances: int | None = None, seed: int = 0) -> Made:
    """Write a listening test into the folder `out`, which must not be there.

    systems: name -> a folder (or store, or manifest) of recordings; the same utterances in each, called alike.
    target: recordings of the voice that was wanted: one, or one for each utterance, called alike.
    tasks: of SCALES; (): naturalness, and similarity where there is a target.
    listeners: for how many there are orders. Each hears every utterance once, from one system; K listeners in a row,
        of K systems, hear all of them.
    utterances: how many to take at most, drawn by the seed.

    Raises:
        BadRequest: recordings do not match, similarity without target, too much for one page.
    """
    tasks = tuple(tasks) or (("naturalness", "similarity") if target is not None else ("naturalness",))
    _check(systems, out, target, tasks, listeners)
    found = _stimuli(systems, target, utterances, seed)
    sounds: dict[str, str] = {}
    key: dict[str, Any] = {"format": FORMAT, "seed": seed, "systems": sorted(systems), "sounds": {}, "checks": {}}
    for number, row in enumerate(found):
        for system, recording in sorted(row.converted.items()):
            name = _name(seed, system, row.name)
            sounds[name] = _data(recording)
            key["sounds"][name] = {"system": system, "utterance": row.name}
        if target is not None and "similarity" in tasks:
            sounds[_name(seed, "target of", str(number))] = _data(row.reference)
    orders = [[_part(task, found, sorted(systems), listener, seed, key) for task in tasks]
              for listener in range(listeners)]
    sounds |= {_name(seed, "tones", str(count)): _tones(count) for count in sorted(set(key["checks"].values()))}
    key["test"] = _name(seed, json.dumps([key["sounds"], orders, sorted(sounds.values())]), "test")
    test = {"format": FORMAT, "test": key["test"], "sounds": dict(sorted(sounds.items())),
            "scales": {task: SCALES[task] for task in tasks}, "orders": orders}
    text = _page(test)
    if len(text) > LARGEST:
        raise BadRequest(f"the page would be {len(text) / 1e6:.0f} MB, more than browsers take well "
                         f"({LARGEST / 1e6:.0f} MB): take fewer or shorter utterances, such as --utterances "
                         f"{max(1, len(found) * LARGEST // len(text) - 1)}")
    out.mkdir()
    (out / "answers").mkdir()
    storage.put(out / "key.json", json.dumps(key, indent=1, ensure_ascii=False).encode() + b"\n")
    storage.put(out / "index.html", text.encode())
    judged = sum(len(part["trials"]) for part in orders[0])
    checks = sum("check" in trial for part in orders[0] for trial in part["trials"])
    return Made(out, listeners, judged - checks, checks, len(text))


def williams(count: int) -> list[list[int]]:
    """Orders of `count` things: each stands equally often at each place, and follows each other equally often.

    A balanced Latin square (Williams, 1949): `count` rows, or twice as many where that is odd and above 1.
    """
    first = [(-1) ** (i + 1) * ((i + 1) // 2) % count for i in range(count)]
    rows = [[(value + shift) % count for value in first] for shift in range(count)]
    return rows + [row[::-1] for row in rows] if count % 2 and count > 1 else rows


def read_key(folder: Path) -> dict[str, Any]:
    """key.json of a test. BadRequest where the folder has none."""
    try:
        key = json.loads((folder / "key.json").read_text("utf-8"))
        if key["format"] != FORMAT or not isinstance(key["sounds"], dict) or not isinstance(key["checks"], dict):
            raise ValueError(key["format"])
        return dict(key)
    except (FileNotFoundError, NotADirectoryError):
        raise BadRequest(f"{folder} is no listening test: it has no key.json. Make one: featstore listen make "
                         f"NAME=DIR NAME=DIR -o {folder}") from None
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"{folder / 'key.json'} is not what featstore listen make writes; make the test again from "
                         "the same recordings and seed: it comes out the same") from None


def answer(key: Mapping[str, Any], content: bytes, where: str) -> dict[str, Any]:
    """The answers of one listener, checked. BadRequest says where they are not what the page of this test saves."""
    try:
        found = json.loads(content)
        test, listener, given = found["test"], int(found["listener"]), found["answers"]
        rows = [(str(a["task"]), str(a["sound"]), int(a["value"])) for a in given]
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"{where} is not a file that a page of answers saved") from None
    if test != key["test"]:
        raise BadRequest(f"{where} answers another test ({test}); this one is {key['test']}")
    for task, sound, value in rows:
        if task not in SCALES or not (sound in key["sounds"] or sound in key["checks"]):
            raise BadRequest(f"{where}: {task} of {sound} is not asked in this test")
        if not 1 <= value <= len(SCALES[task][1]):
            raise BadRequest(f"{where}: {task} {value}: expected 1 to {len(SCALES[task][1])}")
    return {"listener": listener, "rows": rows}


def collect(folder: Path, files: Iterable[Path] = ()) -> Collected:
    """The opinions of all listeners who passed every attention check, system by system.

    files: files of answers, or folders of them; none: those in `folder`/answers.

    Raises:
        BadRequest: no test, no answers, or a file that is none; nobody is left.
    """
    key = read_key(folder)
    found = _files(folder, files)
    kept: dict[str, list[tuple[str, str, int]]] = {}
    excluded: list[tuple[str, str]] = []
    for path in found:
        told = answer(key, path.read_bytes(), str(path))
        listener, rows = str(told["listener"]), told["rows"]
        missed = [key["checks"][sound] for _, sound, value in rows
                  if sound in key["checks"] and value != key["checks"][sound]]
        asked = sum(sound in key["checks"] for _, sound, _ in rows)
        if listener in kept or any(name == listener for name, _ in excluded):
            excluded.append((f"{listener} ({path.name})", "answered before: the first file counts"))
        elif missed or not asked:
            excluded.append((listener, f"{len(missed)} of {asked} attention checks missed ({path.name})"))
        else:
            kept[listener] = [row for row in rows if row[1] in key["sounds"]]
    if not kept:
        told_why = "; ".join(f"{name}: {why}" for name, why in excluded)
        raise BadRequest(f"no listener is left of {len(found)}: {told_why}. Ask others, with other numbers")
    return Collected(tuple(_opinions(key, kept)), tuple(kept), tuple(excluded))


def opinion(values: Array, listeners: Array, utterances: Array) -> tuple[float, float]:
    """The mean of ratings (n,), and half of its interval of 95 %.

    Ratings of one listener are alike, and so are those of one utterance: the variance is that of means over both ways
    of grouping (Cameron, Gelbach and Miller, 2011, equation 2.13), never below that of independent ratings, and
    Student's t has as many degrees of freedom as the smaller number of groups less one.
    """
    from scipy.stats import t

    mean, groups = float(values.mean()), (len(np.unique(listeners)), len(np.unique(utterances)))
    if min(groups) < 2:
        return mean, math.nan
    off = values - mean
    apart = _clustered(off, np.arange(len(off)))
    both = _clustered(off, np.unique(np.stack([listeners, utterances]), axis=1, return_inverse=True)[1].reshape(-1))
    variance = _clustered(off, listeners) + _clustered(off, utterances) - both
    return mean, float(t.ppf(0.975, min(groups) - 1) * math.sqrt(max(variance, apart)))


def _clustered(off: Array, groups: Array) -> float:
    """The variance of a mean whose deviations (n,) are alike within groups."""
    number = np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(number, off)
    return float((sums**2).sum() / len(off) ** 2 * len(sums) / max(len(sums) - 1, 1))


def _opinions(key: Mapping[str, Any], kept: Mapping[str, list[tuple[str, str, int]]]) -> Iterable[Opinion]:
    by: dict[tuple[str, str], list[tuple[int, str, str]]] = defaultdict(list)
    for listener, rows in kept.items():
        for task, sound, value in rows:
            facts = key["sounds"][sound]
            by[task, facts["system"]].append((value, listener, facts["utterance"]))
    for (task, system), rated in sorted(by.items(), key=lambda item: (list(SCALES).index(item[0][0]), item[0][1])):
        values, listeners, utterances = (np.array(column) for column in zip(*rated, strict=True))
        mean, half = opinion(values.astype(float), np.unique(listeners, return_inverse=True)[1],
                             np.unique(utterances, return_inverse=True)[1])
        yield Opinion(task, system, mean, half, len(rated), len(set(listeners.tolist())))


def _files(folder: Path, files: Iterable[Path]) -> list[Path]:
    given = list(files) or [folder / "answers"]
    found = [path for place in given for path in (sorted(place.glob("*.json")) if place.is_dir() else [place])]
    if not found:
        raise BadRequest(f"no answers in {', '.join(map(str, given))}: put there what listeners saved "
                         "(answers-*.json), or name the files; with --serve a server collects them")
    return found


def _check(systems: Mapping[str, Any], out: Path, target: object, tasks: Sequence[str], listeners: int) -> None:
    if len(systems) < 1:
        raise BadRequest("nothing to listen to: give a folder for each system, NAME=DIR")
    if "similarity" in tasks and target is None:
        raise BadRequest("similarity is to a voice: give its recordings, --target DIR")
    if unknown := [task for task in tasks if task not in SCALES]:
        raise BadRequest(f"no task {unknown[0]!r}: expected {' or '.join(SCALES)}")
    if listeners < 1:
        raise BadRequest(f"{listeners} listeners: expected at least 1")
    if out.exists():
        raise BadRequest(f"{out} is there already: a test that somebody may have answered is not written over")
    if not out.absolute().parent.is_dir():
        raise BadRequest(f"the folder {out.parent} does not exist; make it first")


def _stimuli(systems: Mapping[str, str | storage.Place], target: str | storage.Place | None, most: int | None,
             seed: int) -> list[pairs.Pair]:
    """Utterances with a recording of each system; the reference of each is the voice that was wanted."""
    found = {name: pairs.recordings(place) for name, place in systems.items()}
    first = next(iter(found))
    wanted = _wanted(target) if target is not None else {}
    also = {**found, "the target": wanted} if len(wanted) > 1 else found
    rows = pairs.pair(found[first], also)
    only = next(iter(wanted.values()), None)
    chosen = np.random.default_rng(seed).permutation(len(rows))[:most]
    return [pairs.Pair(row.name, row.converted.get("the target", only or row.reference),
                       {name: row.converted[name] for name in systems}) for row in (rows[i] for i in chosen)]


def _wanted(target: str | storage.Place) -> dict[str, pairs.Recording]:
    """The recordings of a folder, store or manifest; or the file that `target` is."""
    place = storage.place(target)
    if isinstance(place, Path) and place.is_file() and place.suffix not in (".csv", ".jsonl", ".gz"):
        return {place.stem: pairs.Recording(place.stem, place)}
    return pairs.recordings(place)


def _part(task: str, found: Sequence[pairs.Pair], systems: Sequence[str], listener: int, seed: int,
          key: dict[str, Any]) -> dict[str, Any]:
    """What a listener hears of one task, in order, and the checks among it.

    In blocks of as many utterances as there are systems: systems in the order of a row of the balanced square, each
    with the utterance that is its turn with this listener. Which block comes when is drawn.
    """
    count, square = len(systems), williams(len(systems))
    drawn = np.random.default_rng([seed, listener, list(SCALES).index(task)])
    blocks = [range(start, min(start + count, len(found))) for start in range(0, len(found), count)]
    trials: list[dict[str, Any]] = []
    for place, block in enumerate(drawn.permutation(len(blocks)).tolist()):
        for system in square[(listener + place) % len(square)]:
            slot = (system - listener) % count
            if slot < len(blocks[block]):
                number = blocks[block][slot]
                heard = [_name(seed, systems[system], found[number].name)]
                wanted = [_name(seed, "target of", str(number))] if task == "similarity" else []
                trials.append({"sounds": [*wanted, *heard]})
    for position in _positions(len(trials), drawn):
        expected = int(drawn.integers(1, len(SCALES[task][1]) + 1))
        tones = _name(seed, "tones", str(expected))
        key["checks"][tones] = expected
        trials.insert(position, {"sounds": [tones], "check": True})
    return {"task": task, "trials": trials}


def _positions(trials: int, drawn: np.random.Generator) -> list[int]:
    """Where checks are put in, the last one first: one in each stretch of EVERY judgements, never at the beginning."""
    stretches = [range(start, min(start + EVERY, trials)) for start in range(0, trials, EVERY)]
    return [int(drawn.integers(stretch.start + 1, stretch.stop + 1)) for stretch in reversed(stretches)]


def _name(seed: int, *words: str) -> str:
    """A name that says nothing: of a sound, of a test."""
    return blake2b(json.dumps([seed, *words]).encode(), digest_size=8).hexdigest()


def _tones(count: int) -> str:
    """`count` tones of 0.25 s with 0.2 s between them, as a check is heard."""
    time = np.arange(RATE // 4) / RATE
    tone = 0.1 * np.sin(2 * np.pi * 440 * time) * np.minimum(1, 40 * np.minimum(time, time[-1] - time))
    rest = np.zeros(RATE // 5)
    return page.sound(np.concatenate([rest, *(np.concatenate([tone, rest]) for _ in range(count))]), RATE)


def _data(recording: pairs.Recording) -> str:
    rate = recording.sample_rate
    return page.sound(recording.read(rate), rate)


def _page(test: Mapping[str, Any]) -> str:
    text = json.dumps(test, ensure_ascii=False).replace("<", "\\u003c")  # nothing in it ends the script
    return str(page.render("listen.html", test=page.markup(text), css=page.own("page.css")))
