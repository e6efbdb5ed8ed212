"""Sentences without meaning in many languages: words from Debian's lists, and the commonest English ones among them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

Array = np.ndarray
WORDS = Path("/usr/share/dict")
DICTIONARIES = {"en": ("american-english", "wamerican"), "de": ("ngerman", "wngerman"), "fr": ("french", "wfrench"),
                "es": ("spanish", "wspanish"), "it": ("italian", "witalian"), "pt": ("portuguese", "wportuguese"),
                "pl": ("polish", "wpolish"), "sv": ("swedish", "wswedish"), "nl": ("dutch", "wdutch")}
OFTEN = """
the of and to a in that it is was he for on with as you had his be at by not this are but from have they which she or
all there would their we him been has when who will more no if out so said what up its about into than them can only
other new some could time these two may then do first any my now such like our over man me even most made after also
did many before must through years where much your way well down should because each just those people how too little
state good very make world still own see men work long get here between both life being under never day same another
know while last might us great old year off come since against go came right used take three house use again place
want where yes oh please think through voice singing music
"""
INITIALS = "b p m f d t n l g k h j q x zh ch sh r z c s"  # of Mandarin's syllables, in pinyin
FINALS = "a ai an ang ao e ei en eng i ian iao ie in ing iong iu o ong ou u ua uai uan ui un uo"
KANA = ("かきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわ"
        "がぎぐげござじずぜぞだでどばびぶべぼぱぴぷぺぽあいうえおん")


def sentence(language: str, rng: np.random.Generator) -> str:
    """5 to 10 words of a language, or syllables of Mandarin or Japanese."""
    count = int(rng.integers(5, 11))
    if language == "cmn":
        return " ".join(_syllable(rng) for _ in range(count))
    if language == "ja":
        return " ".join("".join(rng.choice(list(KANA), int(rng.integers(2, 5)))) for _ in range(count // 2 + 1))
    words = [str(word) for word in rng.choice(_words(language), count)]
    if language == "en":
        words = [str(rng.choice(OFTEN.split())) if rng.random() < 0.55 else word for word in words]
    if rng.random() < 0.4:
        words[count // 2] += ","
    return " ".join(words) + "."


def _syllable(rng: np.random.Generator) -> str:
    return f"{rng.choice(INITIALS.split())}{rng.choice(FINALS.split())}{rng.integers(1, 5)}"


@cache
def _words(language: str) -> Array:
    name, package = DICTIONARIES[language]
    path = WORDS / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not here: apt-get install {package}")
    lines = path.read_text("utf-8", errors="replace").splitlines()
    return np.array([word for word in lines if 2 <= len(word) <= 12 and word.isalpha()])
