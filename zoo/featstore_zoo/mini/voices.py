"""Speech with known phones and times: from synthesisers that every Debian has, and recordings that a recogniser heard.

espeak-ng, flite and festival give a waveform at 16 kHz and its phones; the texts and what is spoken are new, and free
to use. PocketSphinx, whose English model comes with it, finds words and times in recordings of readers.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import soxr

from featstore_extractors.imports import required

from .phones import NUMBER, SILENCE, VOWEL_NUMBERS, of_arpabet, of_ipa

Array = np.ndarray
SAMPLE_RATE = 16000
QUIET = 1e-3  # a recording without any sample beyond it is silence
FLITE = ("kal16", "awb", "rms", "slt")
FESTIVAL = ("ked_diphone", "cmu_us_slt_arctic_hts")
ESPEAK_ENGLISH = ("gmw/en-US", "gmw/en-US", "gmw/en-US", "gmw/en", "gmw/en", "gmw/en-GB-x-rp", "gmw/en-GB-scotland",
                  "gmw/en-GB-x-gbclan", "gmw/en-GB-x-gbcwmd", "gmw/en-US-nyc", "gmw/en-029")
ESPEAK_OTHERS = {"de": "gmw/de", "fr": "roa/fr", "es": "roa/es", "it": "roa/it", "pt": "roa/pt-BR", "pl": "zlw/pl",
                 "sv": "gmq/sv", "nl": "gmw/nl", "cmn": "sit/cmn-Latn-pinyin", "ja": "jpx/ja"}
VARIANTS = (
    "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "adam", "Alex", "Alicia",
    "Andrea", "Andy", "Annie", "antonio", "aunty", "belinda", "benjamin", "boris", "caleb", "david", "Denis",
    "Diogo", "ed", "edward", "Gene", "Gene2", "grandma", "grandpa", "Henrique", "Hugo", "iven", "iven2", "iven3",
    "Jacky", "john", "kaukovalta", "klatt", "klatt2", "klatt3", "klatt4", "klatt5", "Lee", "linda", "marcelo",
    "Marco", "Mario", "max", "Michael", "michel", "miguel", "Mike", "Nguyen", "norbert", "pablo", "paul", "pedro",
    "quincy", "rob", "robert", "sandro", "shelby", "steph", "steph2", "steph3", "travis", "victor", "zac", "anika",
)


@dataclass(frozen=True)
class Speech:
    """A waveform (N,) at 16 kHz in [-1, 1]; phones: their numbers (P,); ends: the sample where each ends (P,)."""

    wave: Array
    phones: Array
    ends: Array


class _Identity(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("uid", ctypes.c_uint), ("text_position", ctypes.c_int),
                ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
                ("user_data", ctypes.c_void_p), ("id", _Identity))


class Espeak:
    """espeak-ng by its library, which tells when each phoneme begins. One per process."""

    END, PHONEME = 0, 7
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise FileNotFoundError(f"espeak-ng's library is not here ({error}): apt-get install espeak-ng") from None
        self.blocks: list[Array] = []
        self.events: list[tuple[int, str]] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self.callback = kind(self._take)
        synchronous, phoneme_events, ipa = 2, 1, 2
        self.rate = self.library.espeak_Initialize(synchronous, 0, None, phoneme_events | ipa)
        self.library.espeak_SetSynthCallback(self.callback)

    def say(self, voice: str, text: str, rate: int = 175, pitch: int = 50, spread: int = 50) -> Speech:
        """rate: words per minute; pitch and its spread: 0 to 99. ValueError for a voice that there is not."""
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice}")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, spread)):
            self.library.espeak_SetParameter(parameter, value, 0)
        self.blocks, self.events = [], []
        raw, utf8, characters = text.encode(), 1, 1
        self.library.espeak_Synth(raw, len(raw) + 1, 0, characters, 0, utf8, None, None)
        self.library.espeak_Synchronize()
        if not self.blocks:
            raise ValueError(f"espeak-ng says nothing for {text!r}")
        wave = np.concatenate(self.blocks)
        starts = [sample for sample, _ in self.events] + [len(wave)]
        phones, ends = [NUMBER[SILENCE]], [starts[0]]
        for (_, ipa), start, end in zip(self.events, starts, starts[1:], strict=False):
            numbers = of_ipa(ipa) or (NUMBER[SILENCE],)
            shares = np.cumsum([2 if number in VOWEL_NUMBERS else 1 for number in numbers])
            phones += numbers
            ends += (start + (end - start) * shares / shares[-1]).tolist()
        scale = SAMPLE_RATE / self.rate
        return _tidy(soxr.resample(wave.astype(np.float32) / 32768, self.rate, SAMPLE_RATE), phones,
                     np.array(ends) * scale)

    def _take(self, samples: Any, count: int, events: Any) -> int:
        if samples and count:
            self.blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        number = 0
        while events[number].type != self.END:
            if events[number].type == self.PHONEME:
                self.events.append((events[number].sample, events[number].id.string.decode("utf-8", "ignore")))
            number += 1
        return 0


@lru_cache(maxsize=1)
def espeak() -> Espeak:
    return Espeak()


def transcribed(text: str, voice: str = "gmw/en-US") -> list[int]:
    """The phones of a text without its silences, by espeak-ng's rules of spelling."""
    said = espeak().say(voice, text.lower())  # what stands in capitals would be spelled
    return [int(number) for number in said.phones if number != NUMBER[SILENCE]]


@lru_cache(maxsize=1)
def _recogniser() -> Any:
    return required("pocketsphinx", "evaluate").Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")


def heard(wave: Array, text: str = "") -> Speech | None:
    """English speech (N,) at 16 kHz with phones and times, by PocketSphinx; None where it understands nothing.

    text: what is said; without it the recogniser's own best guess counts, in which about every fourth word is wrong,
    but most of a wrong word's sounds are right. Phones are those of `transcribed` wherever both agree on their number.
    """
    decoder = _recogniser()
    peak = float(np.abs(wave).max())
    if peak < QUIET:
        return None
    samples = (wave * (0.5 / peak) * 32767).astype(np.int16).tobytes()

    def listen() -> None:
        decoder.start_utt()
        decoder.process_raw(samples, full_utt=True)
        decoder.end_utt()

    words = "".join(letter if letter.isalpha() or letter == "'" else " " for letter in text.lower()).split()
    if not words:
        decoder.activate_search()
        listen()
        words = decoder.hyp().hypstr.split() if decoder.hyp() else []
    if not words or any(decoder.lookup_word(word) is None for word in words):
        return None
    try:
        decoder.set_align_text(" ".join(words))
        listen()
        decoder.set_alignment()
        listen()
        segments = [segment for word in decoder.get_alignment() or () for segment in word]
    except RuntimeError:  # no path through the recording says these words
        return None
    names = [segment.name.lower() for segment in segments]
    phones = [of_arpabet("pau" if name in ("sil", "+spn+", "+nsn+") else name) for name in names]
    ends = np.array([(segment.start + segment.duration) * SAMPLE_RATE // 100 for segment in segments])
    return _tidy(wave, _agreed(phones, transcribed(" ".join(words))), ends) if segments else None


def _agreed(phones: list[int], rules: list[int]) -> list[int]:
    """`phones` with those of `rules` in place of as many others at the same place: dictionaries write ə and ʌ alike."""
    places = [place for place, phone in enumerate(phones) if phone != NUMBER[SILENCE]]
    own, found = [phones[place] for place in places], list(phones)
    for kind, first, last, begin, end in SequenceMatcher(None, own, rules, autojunk=False).get_opcodes():
        if kind == "replace" and last - first == end - begin:
            for place, phone in zip(places[first:last], rules[begin:end], strict=True):
                found[place] = phone
    return found


def flite(voice: str, text: str, stretch: float = 1.0) -> Speech:
    """stretch: durations beside the voice's own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.wav"
        asked = ["-voice", voice, "--setf", f"duration_stretch={stretch:.3f}", "-psdur", "-t", text, "-o", str(path)]
        told = subprocess.run([_program("flite"), *asked], check=True, capture_output=True, text=True).stdout
        pairs = [item.rsplit(":", 1) for item in told.split()]
        return _of_file(path, [name for name, _ in pairs], [float(end) for _, end in pairs])


def festival(voice: str, text: str, stretch: float = 1.0) -> Speech:
    """stretch: durations beside the voice's own; statistical voices have none but their own."""
    with tempfile.TemporaryDirectory() as folder:
        wave, segments = Path(folder) / "a.wav", Path(folder) / "a.seg"
        said = "".join(letter for letter in text if letter not in '"\\')
        script = (f"(begin (voice_{voice})(Parameter.set 'Duration_Stretch {stretch:.3f})"
                  f'(set! u (utt.synth (Utterance Text "{said}")))'
                  f'(utt.save.wave u "{wave}")(utt.save.segs u "{segments}"))')
        subprocess.run([_program("festival"), "--batch", script], check=True, capture_output=True)
        rows = [line.split() for line in segments.read_text("latin-1").splitlines()]
        rows = [row for row in rows if len(row) == 3]  # `end colour name`; a header stands above
        return _of_file(wave, [name for _, _, name in rows], [float(end) for end, _, _ in rows])


def _of_file(path: Path, names: list[str], ends_s: list[float]) -> Speech:
    wave, rate = sf.read(path, dtype="float32")
    phones = [of_arpabet({"#": "pau", "h#": "pau", "brth": "pau"}.get(name, name)) for name in names]
    return _tidy(soxr.resample(wave, rate, SAMPLE_RATE), phones, np.array(ends_s) * SAMPLE_RATE)


def _tidy(wave: Array, phones: list[int], ends: Array) -> Speech:
    """Phones of no length left out, neighbouring silences joined, and the last one up to the end."""
    ends = np.minimum(np.round(ends).astype(np.int64), len(wave))
    kept: list[int] = []
    until: list[int] = []
    for phone, end in zip([*phones, NUMBER[SILENCE]], [*ends.tolist(), len(wave)], strict=True):
        if end <= (until[-1] if until else 0):
            continue
        if kept and phone == kept[-1] == NUMBER[SILENCE]:
            until[-1] = end
        else:
            kept.append(phone)
            until.append(end)
    peak = max(float(np.abs(wave).max()), 1e-4)
    return Speech((wave * (0.5 / peak)).astype(np.float32), np.array(kept, np.int64), np.array(until, np.int64))


@cache
def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not on PATH: apt-get install {name}")
    return found
