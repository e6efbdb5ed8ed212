"""Text: how it is compared, and the recognisers that hear it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from metric_pairs import CORPUS, RATE, pair

pytest.importorskip("jiwer")

from featstore.errors import BadRequest, MissingWeights
from featstore_zoo import recognition
from featstore_zoo.evaluate import evaluate


@pytest.mark.parametrize(("language", "text", "expected"), [
    ("en", "Well-known; DON'T  stop! It’s 5 p.m.", "well known do not stop it is 5 pm"),
    ("zh", "广州市，房 地产。", "广州市房地产"), ("ja", "ナッツ｡", "ナッツ"),
    ("de", "Größe, „ja“ – nein", "größe ja nein"), (None, "L'été", "lété")])
def test_texts_are_compared_without_case_punctuation_and_contractions(language, text, expected):
    assert recognition.normalised(text, language) == expected


def test_errors_are_shares_of_the_reference():
    assert recognition.character_errors("He turned.", "he  turned", "en") == (0, 9)
    assert recognition.word_errors("one two three", "one six two three", "en") == pytest.approx((1 / 3, 3))
    assert recognition.word_errors("one two", "", "en") == (1, 2)
    assert recognition.character_errors("广州市", "广州", "zh") == pytest.approx((1 / 3, 3))


@pytest.mark.parametrize("name", ["cer", "wer"])
def test_errors_are_those_of_an_edit_distance_by_hand(name):
    one, other = "we also need a small plastic snake", "we all need small plastic snakes now"
    units = (list(one), list(other)) if name == "cer" else (one.split(), other.split())
    found = {"cer": recognition.character_errors, "wer": recognition.word_errors}[name](one, other, "en")
    assert found == pytest.approx((distance(*units) / len(units[0]), len(units[0])))


def distance(one: list[str], other: list[str]) -> int:
    """Levenshtein's, by the table of Wagner and Fischer (1974)."""
    row = np.arange(len(other) + 1)
    for i, mine in enumerate(one, start=1):
        new = [i]
        for j, theirs in enumerate(other, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (mine != theirs)))
        row = np.array(new)
    return int(row[-1])


def test_what_has_no_text_or_no_words_has_no_errors_but_a_reason():
    for found in (recognition.character_errors("...", "a", "en"), recognition.word_errors("广州", "广", "zh")):
        assert math.isnan(found.rate) and found.rate.reason and found.of == 0


def test_differences_put_both_texts_together_again():
    one, other = "a b c d", "a x c d e"
    chunks = recognition.differences(one, other, "en")
    assert " ".join(old for _, old, _ in chunks if old) == one and " ".join(new for _, _, new in chunks if new) == other
    assert [kind for kind, _, _ in chunks] == ["equal", "substitute", "equal", "insert"]


def test_a_whisper_of_no_known_size_is_refused():
    with pytest.raises(BadRequest, match=r"no recogniser 'whisper:vast': there are pocketsphinx"):
        recognition.recogniser("whisper:vast")


@pytest.mark.slow
def test_pocketsphinx_hears_english_and_refuses_other_languages():
    pytest.importorskip("pocketsphinx")
    wave, rate = sf.read(CORPUS / "ljspeech" / "LJ001-0002.flac", dtype="float32")
    heard = recognition.recogniser("pocketsphinx")
    assert "comparatively" in heard(np.asarray(_at_16k(wave, rate)), "en")
    assert recognition.transcribe(heard, np.zeros(RATE, np.float32), "en") == ""
    with pytest.raises(BadRequest, match="English only, and a recording is marked 'zh'"):
        heard(wave, "zh")


def _at_16k(wave: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    return np.asarray(soxr.resample(wave, rate, RATE), np.float32)


@pytest.mark.slow
def test_a_whisper_of_a_folder_hears_short_and_long_and_equal_files_have_no_errors(tmp_path):
    with pytest.raises(MissingWeights, match="cannot be loaded as a Whisper"):
        recognition.recogniser(str(tmp_path))
    folder = whisper_with_words(tmp_path / "whisper")
    heard = recognition.recogniser(str(folder))
    one, _ = pair("noise")
    assert heard(one, "en") == heard(one, "en") != ""
    assert heard(np.tile(one, 16), "en") != ""
    for name in ("reference", "same"):
        (tmp_path / name).mkdir()
        sf.write(tmp_path / name / "u.wav", one, RATE, subtype="FLOAT")
    found = evaluate(tmp_path / "reference", {"same": tmp_path / "same"}, names=("cer", "wer"), recogniser=str(folder),
                     language="en")
    assert found.measured[0].values == {"cer": 0, "wer": 0} and found.measured[0].text == heard(one, "en")


def whisper_with_words(folder: Path) -> Path:
    """A Whisper of random weights that decodes, with a tokenizer of single characters."""
    import torch

    from featstore_extractors.imports import without_broken_torchaudio

    without_broken_torchaudio()
    import transformers

    letters = [*map(chr, range(33, 127)), "Ġ", "<|endoftext|>"]
    tokenizer = transformers.WhisperTokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    marks = ["startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev", "nospeech",
             "notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    tokenizer.add_tokens([f"<|{i * 0.02:.2f}|>" for i in range(1501)])
    at = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in (*marks, "endoftext")}
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=32, decoder_layers=1, num_mel_bins=80,
        decoder_attention_heads=4, decoder_ffn_dim=32, max_target_positions=40, vocab_size=len(tokenizer),
        pad_token_id=at["endoftext"], bos_token_id=at["endoftext"], eos_token_id=at["endoftext"],
        decoder_start_token_id=at["startoftranscript"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.WhisperForConditionalGeneration(config)
    model.model.decoder.embed_tokens.weight.data[:95] *= 50  # letters are what it likes best
    generation = transformers.GenerationConfig(
        is_multilingual=True, lang_to_id={"<|en|>": at["en"]}, max_length=20, return_timestamps=False,
        task_to_id={"transcribe": at["transcribe"], "translate": at["translate"]}, suppress_tokens=[at["endoftext"]],
        no_timestamps_token_id=at["notimestamps"], decoder_start_token_id=at["startoftranscript"],
        pad_token_id=at["endoftext"], bos_token_id=at["endoftext"], eos_token_id=at["endoftext"])
    model.save_pretrained(folder)
    for part in (generation, tokenizer, transformers.WhisperFeatureExtractor()):
        part.save_pretrained(folder)
    return folder
