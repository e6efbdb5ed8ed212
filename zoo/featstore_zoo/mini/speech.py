"""What the box's content encoder learns from: sentences spoken and sung by synthesisers, and real recordings.

`make` writes shards of log mel bands with phones and times. A shard is a safetensors file whose header lists its clips;
each is made from its number alone, so that an interrupted run goes on where it was and gives the same bytes.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import texts
from .sung import FRAME_MS, sing
from .voices import (
    ESPEAK_ENGLISH,
    ESPEAK_OTHERS,
    FESTIVAL,
    FLITE,
    SAMPLE_RATE,
    VARIANTS,
    Speech,
    espeak,
    festival,
    flite,
    heard,
    transcribed,
)

Array = np.ndarray
SENTENCES = 6400        # synthetic ones; the others below are shares of them
SHARD = 100             # sentences to a file
ENGLISH, SUNG, DIPHONE = 0.66, 0.45, 0.5
PIECE_S = 12.0          # real recordings are cut into pieces of at most this
HELD_OUT = ("vctk_p225", "vctk_p226", "vctk_p227", "vctk_p287", "vctk_p287_noisy", "ljspeech", "librivox_sonnets",
            "librivox_austen", "csd_alto1", "csd_alto2", "csd_alto3", "csd_alto4")


@dataclass(frozen=True)
class Clip:
    """One rendition: of which sentence, by whom, and where its frames and phones lie in the shard.

    timed: whether the phones' ends are known; a real transcript has phones without times, or none at all.
    """

    sentence: int
    voice: str
    engine: str
    language: str
    sung: bool
    timed: bool
    frames: int = 0     # of 20 ms
    phones: int = 0


@dataclass(frozen=True)
class Made:
    """A clip with its sound: wave (N,), phones (P,), ends (P,) in samples, f0 (T,) in Hz, 0 unvoiced, -1 unknown."""

    clip: Clip
    speech: Speech
    f0: Array


def make(out: Path, audio: Path | None, sentences: int = SENTENCES, seed: int = 0, workers: int = 2,
         told: Callable[[str], None] = print) -> list[Path]:
    """All shards, those that are there already left alone."""
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[Path, Any]] = [(out / f"made-{first:06}.safetensors", (first, min(first + SHARD, sentences), seed))
                                    for first in range(0, sentences, SHARD)]
    if audio is not None:
        jobs += [(out / f"read-{reader}.safetensors", (audio, reader)) for reader in readers(audio)]
    open_jobs = [(path, job) for path, job in jobs if not path.exists()]
    # A process for each shard: espeak-ng says the same text otherwise after other texts, by some samples.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(workers, maxtasksperchild=1) as pool:
        for number, path in enumerate(pool.imap(_write, open_jobs, chunksize=1), 1):
            told(f"{number} of {len(open_jobs)} shards: {path.name}")
    return [path for path, _ in jobs]


def read(path: Path) -> tuple[list[Clip], dict[str, Array]]:
    """A shard's clips, and its arrays: bands (2T, mels), f0 (T,), phones, ends (in samples), all clips end to end."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        clips = [Clip(**record) for record in json.loads(file.metadata()["clips"])]
        return clips, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def readers(audio: Path, held_out: Sequence[str] = HELD_OUT) -> list[str]:
    """Who reads or sings in a folder with a manifest.csv, without those held out."""
    return sorted({row["speaker"] for row in manifest(audio)} - set(held_out))


def recordings(audio: Path, reader: str) -> Iterator[Speech]:
    """A reader's recordings at 16 kHz, in pieces; with phones and times where English is understood.

    A transcript that cannot be placed in time has its phones without times (`ends` of none); else there are no phones.
    """
    import soundfile as sf
    import soxr

    piece = int(PIECE_S * SAMPLE_RATE)
    none = np.zeros(0, np.int64)
    for row in manifest(audio):
        if row["speaker"] != reader:
            continue
        wave, rate = sf.read(audio / row["path"], dtype="float32", always_2d=True)
        wave = soxr.resample(wave.mean(1), rate, SAMPLE_RATE).astype(np.float32)
        english, text = row.get("language") == "en", row["text"].strip()
        if english and text and len(wave) <= 2 * piece:
            yield heard(wave, text) or Speech(wave, np.array(transcribed(text), np.int64), none)
            continue
        for begin in range(0, len(wave), piece):
            part = wave[begin : begin + piece]
            if len(part) >= SAMPLE_RATE // 2:
                understood = heard(part) if english and row.get("kind") == "speech" else None
                yield understood or Speech(part, none, none)


def manifest(audio: Path) -> list[dict[str, str]]:
    """The rows of a folder's manifest.csv: speaker, utterance, path, text."""
    with (audio / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(job: tuple[Path, Any]) -> Path:
    import torch
    from safetensors.numpy import save_file

    from featstore_extractors.convnext import Bands

    torch.set_num_threads(1)
    path, asked = job
    made = list(_read_reader(*asked) if isinstance(asked[0], Path) else _made(*asked))
    bands, clips = Bands(), []
    parts: dict[str, list[Array]] = {"bands": [], "f0": [], "phones": [], "ends": []}
    for one in made:
        with torch.inference_mode():
            rows = bands(torch.from_numpy(one.speech.wave)[None])[0].numpy().astype(np.float16)
        frames = len(rows) // 2
        clips.append(asdict(replace(one.clip, frames=frames, phones=len(one.speech.phones))))
        for name, part in (("bands", rows), ("f0", one.f0[:frames].astype(np.float16)),
                           ("phones", one.speech.phones.astype(np.int16)), ("ends", one.speech.ends.astype(np.int32))):
            parts[name].append(part)
    new = path.with_suffix(".tmp")
    save_file({name: np.concatenate(part) for name, part in parts.items()}, new, {"clips": json.dumps(clips)})
    new.replace(path)
    return path


# Synthetic.


def _made(first: int, last: int, seed: int) -> Iterator[Made]:
    for sentence in range(first, last):
        yield from _renditions(sentence, np.random.default_rng((seed, sentence)))


def _renditions(sentence: int, rng: np.random.Generator) -> Iterator[Made]:
    """Two voices say a sentence; one of them may sing it too. Both are of one engine, so that phones correspond."""
    language = "en" if rng.random() < ENGLISH else str(rng.choice(list(ESPEAK_OTHERS)))
    text = texts.sentence(language, rng)
    recorded = language == "en" and rng.random() < DIPHONE
    voices = _recorded_voices(rng) if recorded else _formant_voices(language, rng)
    spoken = [(name, engine, speech) for name, engine, speech in voices(text) if len(speech.wave) > SAMPLE_RATE // 2]
    for name, engine, speech in spoken:
        clip = Clip(sentence, name, engine, language, sung=False, timed=True)
        yield Made(clip, speech, np.full(len(speech.wave) // 320, -1.0))
    if spoken and rng.random() < SUNG:
        name, engine, speech = spoken[int(rng.integers(len(spoken)))]
        song, melody = sing(speech, rng)
        clip = Clip(sentence, name, engine, language, sung=True, timed=True)
        yield Made(clip, song, _at_frames(melody, len(song.wave) // 320))


Voices = Callable[[str], Iterator[tuple[str, str, Speech]]]


def _recorded_voices(rng: np.random.Generator) -> Voices:
    chosen = rng.permutation([*FLITE, *FLITE, *FESTIVAL])[:2]
    stretches = rng.uniform(0.75, 1.35, 2)

    def say(text: str) -> Iterator[tuple[str, str, Speech]]:
        for voice, stretch in zip(chosen, stretches, strict=True):
            engine = flite if voice in FLITE else festival
            yield str(voice), engine.__name__, engine(str(voice), text, float(stretch))

    return say


def _formant_voices(language: str, rng: np.random.Generator) -> Voices:
    base = str(rng.choice(ESPEAK_ENGLISH)) if language == "en" else ESPEAK_OTHERS[language]
    chosen = rng.choice(VARIANTS, 2, replace=False)
    rates, pitches, spreads = rng.integers(110, 230, 2), rng.integers(15, 90, 2), rng.integers(10, 90, 2)

    def say(text: str) -> Iterator[tuple[str, str, Speech]]:
        for variant, rate, pitch, spread in zip(chosen, rates, pitches, spreads, strict=True):
            yield str(variant), "espeak", espeak().say(f"{base}+{variant}", text, int(rate), int(pitch), int(spread))

    return say


def _at_frames(melody: Array, frames: int) -> Array:
    """f0 per 5 ms -> at the centres of frames of 20 ms."""
    centres = ((np.arange(frames) + 0.5) * 20 / FRAME_MS).astype(int)
    return np.asarray(melody[np.minimum(centres, len(melody) - 1)])


# Real.


def _read_reader(audio: Path, reader: str) -> Iterator[Made]:
    import pyworld

    for speech in recordings(audio, reader):
        wave = speech.wave.astype(np.float64)
        f0, times = pyworld.dio(wave, SAMPLE_RATE, frame_period=FRAME_MS)
        f0 = pyworld.stonemask(wave, f0, times, SAMPLE_RATE)
        clip = Clip(-1, reader, "real", "", sung=False, timed=len(speech.ends) > 0)
        ends = speech.ends if clip.timed else np.full(len(speech.phones), len(wave), np.int64)
        yield Made(clip, Speech(speech.wave, speech.phones, ends), _at_frames(f0, len(wave) // 320))
