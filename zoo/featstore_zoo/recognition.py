"""What is said or sung, as text: recognisers, loaded once, and the errors of one text against another.

Whisper through transformers, from a folder or hub id, or pocketsphinx, which is English and offline, and of singing
understands little: a check that words are there at all. Texts are compared without case, punctuation and contractions.
"""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from featstore.errors import BadRequest, MissingPackage, MissingWeights
from featstore_extractors import weights
from featstore_extractors.imports import required, without_broken_torchaudio
from featstore_extractors.whisper import Whisper as Encoder

from .metrics import QUIET, Undefined

Array = np.ndarray

SAMPLE_RATE = 16000
UNSPACED = ("zh", "ja", "th", "lo", "my", "km", "yue")  # languages whose words are not separated by spaces
WINDOW_S = 30.0  # what Whisper hears at once
POCKETSPHINX = "pocketsphinx"


class Errors(NamedTuple):
    """A rate of errors, and the characters or words of the reference that it is a share of."""

    rate: float
    of: int


class Recogniser(Protocol):
    """Waveform (N,) at 16 kHz -> text. language: a code such as "en", where it is known."""

    name: str

    def __call__(self, wave: Array, language: str | None = None) -> str: ...


def recogniser(asked: str, device: str = "cpu") -> Recogniser:
    """The recogniser of a request: pocketsphinx, whisper:large-v3, a folder, or a hub id, which may be fetched.

    Raises:
        MissingPackage, MissingWeights: it cannot be had here.
        BadRequest: there is no such size of Whisper.
    """
    if asked == POCKETSPHINX:
        return Sphinx()
    name, colon, size = asked.partition(":")
    if name == "whisper" and size not in Encoder.PRESETS:
        raise BadRequest(f"no recogniser {asked!r}: there are pocketsphinx, a folder or hub id of a Whisper, and "
                         + ", ".join(f"whisper:{known}" for known in Encoder.PRESETS))
    return Whisper(Encoder.PRESETS[size]["weights"] if name == "whisper" and colon else asked, device)


class Sphinx:
    """CMU Sphinx with the English model that comes in its package."""

    name = POCKETSPHINX

    def __init__(self) -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise MissingPackage("this recogniser needs the package pocketsphinx: pip install 'featstore[evaluate]'"
                                 ) from None
        self._decoder = pocketsphinx.Decoder(samprate=SAMPLE_RATE, loglevel="FATAL")

    def __call__(self, wave: Array, language: str | None = None) -> str:
        if language not in (None, "en"):
            raise BadRequest(f"pocketsphinx knows English only, and a recording is marked {language!r}: give a Whisper")
        samples = (np.clip(wave, -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return found.hypstr if found is not None else ""


class Whisper:
    """Whisper (Radford et al., arXiv 2212.04356) with greedy decoding, in pieces of 30 s."""

    def __init__(self, wanted: str, device: str = "cpu") -> None:
        required("torch", "encoders")
        without_broken_torchaudio()
        transformers = required("transformers", "encoders")
        self.name = wanted
        found = weights.local(wanted, extractor="whisper", named=True)
        where = str(found) if found is not None else wanted
        if found is not None and not Path(found).is_dir():
            raise MissingWeights(f"{found} is a file: a recogniser needs the folder of a Whisper as transformers saves "
                                 "it, with its tokenizer")
        try:
            self._processor = transformers.WhisperProcessor.from_pretrained(where)
            self._model = transformers.WhisperForConditionalGeneration.from_pretrained(where, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise MissingWeights(f"{wanted} cannot be loaded as a Whisper ({str(error).splitlines()[0]}). Give a hub "
                                 "id, or a folder with config.json, model.safetensors and a tokenizer") from error
        self._model.to(device).eval()
        self._device = device

    def __call__(self, wave: Array, language: str | None = None) -> str:
        import torch

        long = len(wave) > WINDOW_S * SAMPLE_RATE
        more = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
        heard = self._processor(wave, sampling_rate=SAMPLE_RATE, return_tensors="pt", **more).to(self._device)
        options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "return_timestamps": long}
        if language and getattr(self._model.generation_config, "is_multilingual", False):
            options |= {"language": language, "task": "transcribe"}
        with torch.inference_mode():
            tokens = self._model.generate(**heard, **options)
        return str(self._processor.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def transcribe(recognise: Recogniser, wave: Array, language: str | None = None) -> str:
    """The text of a waveform (N,) at 16 kHz; of silence "", which Whisper would rather fill."""
    if not len(wave) or float(np.abs(wave).max()) < QUIET:
        return ""
    return recognise(np.asarray(wave, np.float32), language)


def normalised(text: str, language: str | None = None) -> str:
    """A text as texts are compared: NFKC, lower case, no punctuation, English contractions in full, single spaces; no
    spaces where the language has none between words."""
    clean = _cleaning(language == "en")(unicodedata.normalize("NFKC", text))
    return clean.replace(" ", "") if language in UNSPACED else str(clean)


def character_errors(reference: str, heard: str, language: str | None = None) -> Errors:
    """Character error rate: substitutions, deletions and insertions per character of the reference, both `normalised`.

    NaN where the reference has no text. Spaces between words count as characters.
    """
    jiwer = _jiwer()
    one, other = normalised(reference, language), normalised(heard, language)
    if not one:
        return Errors(Undefined("the reference has no text"), 0)
    return Errors(float(jiwer.cer(one, other)), len(one))


def word_errors(reference: str, heard: str, language: str | None = None) -> Errors:
    """Word error rate, as `character_errors`; NaN in languages that do not separate words."""
    jiwer = _jiwer()
    if language in UNSPACED:
        return Errors(Undefined(f"words are not separated in {language!r}"), 0)
    one, other = normalised(reference, language), normalised(heard, language)
    if not one:
        return Errors(Undefined("the reference has no text"), 0)
    return Errors(float(jiwer.wer(one, other)), len(one.split()))


def differences(reference: str, heard: str, language: str | None = None) -> list[tuple[str, str, str]]:
    """Both texts, `normalised`, cut where they agree and differ: (kind, of the reference, heard), kind one of equal,
    substitute, delete and insert."""
    one, other = normalised(reference, language), normalised(heard, language)
    gap = "" if language in UNSPACED else " "
    words, others = (list(x) if not gap else x.split() for x in (one, other))
    if not words:
        return [("insert", "", other)] if other else []
    jiwer = _jiwer()
    process = jiwer.process_words if gap else jiwer.process_characters
    return [(chunk.type, gap.join(words[chunk.ref_start_idx:chunk.ref_end_idx]),
             gap.join(others[chunk.hyp_start_idx:chunk.hyp_end_idx]))
            for chunk in process(one, other).alignments[0]]


@functools.cache
def _cleaning(english: bool) -> Any:
    jiwer = _jiwer()
    contractions = [jiwer.SubstituteRegexes({r"[’ʼ`´]": "'"}), jiwer.ExpandCommonEnglishContractions()]
    return jiwer.Compose([jiwer.ToLowerCase(), *(contractions if english else []),
                          jiwer.SubstituteRegexes({r"[-‐‑‒–—/_]": " "}), jiwer.RemovePunctuation(),
                          jiwer.SubstituteRegexes({r"\s+": " "}), jiwer.Strip()])


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError:
        raise MissingPackage("error rates of text need the package jiwer: pip install 'featstore[evaluate]'") from None
    return jiwer
