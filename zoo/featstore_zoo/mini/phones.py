"""One inventory of phones for all languages and synthesisers: IPA without length, stress, tone and fine detail."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

SILENCE = "sil"
DIPHTHONGS = ("aɪ", "eɪ", "oʊ", "aʊ", "ɔɪ")
AFFRICATES = ("tʃ", "dʒ", "ts")
VOWELS = ("i", "ɪ", "e", "ɛ", "æ", "a", "ɑ", "ɔ", "o", "ʊ", "u", "ʌ", "ə", "ɜ", "y", "ø", "œ", "ɨ", *DIPHTHONGS)
CONSONANTS = ("p", "b", "t", "d", "k", "ɡ", "m", "n", "ŋ", "ɲ", "f", "v", "θ", "ð", "s", "z", "ʃ", "ʒ", "ɕ", "ç", "x",
              "h", *AFFRICATES, "ɹ", "r", "ɾ", "ʁ", "l", "ʎ", "j", "w")
PHONES = (SILENCE, *VOWELS, *CONSONANTS)
NUMBER = {name: number for number, name in enumerate(PHONES)}
VOWEL_NUMBERS = frozenset(NUMBER[name] for name in VOWELS)

# What other symbols count as: near enough that a listener would write the same, given the choice of the inventory.
ALIASES = {
    "ɚ": "ɜ", "ɝ": "ɜ", "ɐ": "ə", "ᵻ": "ɪ", "ɒ": "ɑ", "ɘ": "ə", "ɵ": "ø", "ɯ": "ɨ", "ʉ": "u", "ʏ": "y", "ɤ": "ʌ",
    "ɞ": "ɜ", "ɶ": "œ", "ɫ": "l", "ɬ": "l", "ɭ": "l", "ʋ": "v", "β": "v", "ɸ": "f", "ɣ": "ɡ", "g": "ɡ", "ɟ": "dʒ",
    "c": "tʃ", "ʝ": "j", "ɥ": "y", "ʂ": "ʃ", "ʐ": "ʒ", "ʑ": "ʒ", "χ": "x", "ɦ": "h", "ħ": "h", "ɧ": "x", "ʀ": "ʁ",
    "ɽ": "ɾ", "ɻ": "ɹ", "ʈ": "t", "ɖ": "d", "ɳ": "n", "ɴ": "ŋ", "ɱ": "m", "q": "k",
    "ai": "aɪ", "aj": "aɪ", "ei": "eɪ", "ej": "eɪ", "ou": "oʊ", "əʊ": "oʊ", "au": "aʊ", "aw": "aʊ", "ɔi": "ɔɪ",
    "oi": "ɔɪ", "ɔø": "ɔɪ", "ɛɪ": "eɪ", "ɛi": "eɪ", "ɑʊ": "aʊ", "ɑu": "aʊ", "ʌʊ": "aʊ", "tɕ": "tʃ", "dʑ": "dʒ",
    "tʂ": "tʃ", "dʐ": "dʒ", "pf": "f", "ʔ": "", "ʲ": "", "ʰ": "", "ʷ": "w",
}
ARPABET = {
    "pau": SILENCE, "aa": "ɑ", "ae": "æ", "ah": "ʌ", "ao": "ɔ", "aw": "aʊ", "ax": "ə", "axr": "ɜ", "ay": "aɪ",
    "b": "b", "ch": "tʃ", "d": "d", "dh": "ð", "eh": "ɛ", "er": "ɜ", "ey": "eɪ", "f": "f", "g": "ɡ", "hh": "h",
    "ih": "ɪ", "iy": "i", "jh": "dʒ", "k": "k", "l": "l", "m": "m", "n": "n", "ng": "ŋ", "ow": "oʊ", "oy": "ɔɪ",
    "p": "p", "r": "ɹ", "s": "s", "sh": "ʃ", "t": "t", "th": "θ", "uh": "ʊ", "uw": "u", "v": "v", "w": "w",
    "y": "j", "z": "z", "zh": "ʒ",
}


@lru_cache(maxsize=4096)
def of_ipa(text: str) -> tuple[int, ...]:
    """Numbers of the phones that an IPA string stands for; what is in no inventory is left out.

    The longest symbols count: "tʃ" is one phone, "ɔːɹ" two.
    """
    plain = "".join(_plain(letter) for letter in unicodedata.normalize("NFC", text))
    found: list[int] = []
    while plain:
        for length in (2, 1):
            name = ALIASES.get(plain[:length], plain[:length])
            if name in NUMBER or not name:
                break
        if name in NUMBER:
            found.append(NUMBER[name])
        plain = plain[length:]
    return tuple(found)


def _plain(letter: str) -> str:
    """A letter without its marks, and nothing of what is no letter."""
    if letter in NUMBER or letter in ALIASES:  # ç among them
        return letter
    return "".join(part for part in unicodedata.normalize("NFD", letter)
                   if unicodedata.category(part) in ("Ll", "Lo", "Lu"))


def of_arpabet(name: str) -> int:
    """The number of one of the names that flite and festival's English voices use."""
    return NUMBER[ARPABET[name]]
