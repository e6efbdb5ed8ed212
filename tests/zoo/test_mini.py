"""How the content encoder in the box is made: phones, speech with times, songs, batches, training that goes on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from featstore_extractors import parse
from featstore_extractors.convnext import ContentNet, Sizes
from featstore_zoo import card
from featstore_zoo.mini import curves, encoder, erase, measure, speech, sung, texts, voices
from featstore_zoo.mini.augment import Augment
from featstore_zoo.mini.phones import ARPABET, NUMBER, PHONES, VOWELS, of_arpabet, of_ipa

ROOT = Path(__file__).resolve().parents[2]
espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng: apt-get install espeak-ng")
lacking = [name for name in ("espeak-ng", "flite", "festival") if shutil.which(name) is None] + [
    package for file, package in texts.DICTIONARIES.values() if not (texts.WORDS / file).exists()]
synthesisers = pytest.mark.skipif(bool(lacking), reason=f"apt-get install {' '.join(lacking)}")
TEXT = "She had some dark bread, and the choir sang over there."


def names(numbers: np.ndarray | tuple[int, ...]) -> str:
    return " ".join(PHONES[int(number)] for number in numbers)


# Phones.


@pytest.mark.parametrize(("ipa", "expected"), [
    ("ɔːɹ", "ɔ ɹ"), ("tʃ", "tʃ"), ("ˈaɪ", "aɪ"), ("əl", "ə l"), ("ɚ", "ɜ"), ("ɔ̃", "ɔ"), ("ç", "ç"), ("nʲ", "n"),
    ("ʔ", ""), ("y", "y"), ("əʊ", "oʊ"), ("", "")])
def test_marks_are_dropped_and_the_longest_symbol_counts(ipa: str, expected: str) -> None:
    assert names(of_ipa(ipa)) == expected


def test_every_name_of_flite_is_in_the_inventory() -> None:
    assert len(set(PHONES)) == len(PHONES)
    assert all(of_arpabet(name) < len(PHONES) for name in ARPABET)


# Speech.


@espeak
def test_espeak_tells_when_each_phone_is_said() -> None:
    said = voices.espeak().say("gmw/en-US+f3", TEXT)
    assert "d ɑ ɹ k b ɹ ɛ d" in names(said.phones)
    assert said.ends[-1] == len(said.wave) and (np.diff(said.ends) > 0).all()
    level = [np.sqrt((said.wave[a:b] ** 2).mean()) for a, b in zip([0, *said.ends], said.ends, strict=False)]
    loud = {kind: np.mean([x for x, p in zip(level, said.phones, strict=True) if (PHONES[p] in VOWELS) == kind])
            for kind in (True, False)}
    assert loud[True] > 2 * loud[False]  # vowels are where it says they are


@espeak
def test_capitals_are_read_and_not_spelled() -> None:
    assert voices.transcribed("IT WAS HERE") == voices.transcribed("it was here")


@espeak
def test_a_song_follows_its_melody_and_its_vowels_are_held() -> None:
    pyworld = pytest.importorskip("pyworld")
    said = voices.espeak().say("gmw/en-US+m3", TEXT)
    song, melody = sung.sing(said, np.random.default_rng(4))
    again, _ = sung.sing(said, np.random.default_rng(4))
    np.testing.assert_array_equal(song.wave, again.wave)
    np.testing.assert_array_equal(song.phones, said.phones)
    assert len(song.wave) > 1.2 * len(said.wave)
    f0, _ = pyworld.harvest(song.wave.astype(np.float64), 16000, frame_period=5.0)
    both = min(len(f0), len(melody))
    voiced = (f0[:both] > 0) & (melody[:both] > 0)
    cents = 1200 * np.log2(f0[:both][voiced] / melody[:both][voiced])
    assert np.median(np.abs(cents)) < 40


@synthesisers
def test_shards_are_the_same_whenever_they_are_made_and_kept_once_made(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "SHARD", 2)
    told: list[str] = []
    first = speech.make(tmp_path / "a", None, sentences=4, workers=1, told=told.append)
    assert [path.name for path in first] == ["made-000000.safetensors", "made-000002.safetensors"]
    first[1].rename(tmp_path / "kept")
    before = first[0].stat().st_mtime_ns
    speech.make(tmp_path / "a", None, sentences=4, workers=1, told=told.append)
    assert first[0].stat().st_mtime_ns == before
    assert first[1].read_bytes() == (tmp_path / "kept").read_bytes()
    assert len(told) == 3
    clips, parts = speech.read(first[0])
    assert sum(clip.frames for clip in clips) * 2 == len(parts["bands"])


@espeak
def test_readers_held_out_are_in_no_training_data(shared: Path) -> None:
    kept = speech.readers(shared / "audio")
    assert kept and not set(kept) & set(speech.HELD_OUT)
    assert set(speech.HELD_OUT) <= {row["speaker"] for row in speech.manifest(shared / "audio")}


@espeak
def test_recordings_of_english_readers_have_phones_and_times(shared: Path) -> None:
    pytest.importorskip("pocketsphinx")
    zero, *_ = speech.recordings(shared / "audio", "fsdd_theo")
    assert [n for n in names(zero.phones).split() if n != "sil"] == ["z", "i", "ɹ", "oʊ"]
    assert len(zero.ends) == len(zero.phones) and zero.ends[-1] == len(zero.wave) and (np.diff(zero.ends) > 0).all()
    sung, *_ = speech.recordings(shared / "audio", "csd_bass1")
    assert not len(sung.phones) and not len(sung.ends)


@espeak
def test_a_recogniser_hears_what_a_voice_says_and_when() -> None:
    pytest.importorskip("pocketsphinx")
    said = voices.flite("slt", "the old man went to the river and sat down by the water")
    understood = voices.heard(said.wave)
    told = voices.heard(said.wave, "The old man went to the river, and sat down by the water.")
    assert understood is not None and told is not None
    centres = (np.arange(len(said.wave) // 320) + 0.5) * 320
    at = [one.phones[np.minimum(np.searchsorted(one.ends, centres), len(one.phones) - 1)]
          for one in (said, understood, told)]
    assert (at[0] == at[1]).mean() > 0.5 and (at[0] == at[2]).mean() > 0.6
    assert voices.heard(np.zeros(16000, np.float32)) is None
    assert voices.heard(said.wave, "xyzzyqq") is None


def test_a_reading_over_frames_is_their_mean_with_the_edges_repeated() -> None:
    rows = np.array([[0.0], [3.0], [6.0], [0.0]], np.float32)
    assert measure._mean(rows, 1).tolist() == rows.tolist()
    assert measure._mean(rows, 3).ravel().tolist() == [1.0, 3.0, 3.0, 2.0]


# Training.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> encoder.Data:
    """Twelve sentences by two voices each, and a reader without transcript, of noise bands in place of speech."""
    rng = np.random.default_rng(0)
    clips, bands, labels, f0, phones, ends = [], [], [], [], [], []
    for sentence in range(1, 13):
        said = rng.integers(1, 12, 8)
        for voice in ("a", "b"):
            lengths = rng.integers(8, 20, 8)
            frames = int(lengths.sum())
            rows = np.repeat(said, lengths)
            clips.append(speech.Clip(sentence, voice, "espeak", "en", False, True, frames, 8))
            shape = -8 + 3 * np.cos(np.arange(64)[None] * rows.repeat(2)[:, None] / 9) + (voice == "b")
            bands.append((shape + rng.normal(0, 0.3, shape.shape)).astype(np.float16))
            labels.append(rows)
            f0.append(np.full(frames, 220.0 if voice == "b" else -1.0, np.float32))
            phones.append(said)
            ends.append(np.cumsum(lengths).astype(float))
    for number in range(3):
        clips.append(speech.Clip(-1, "reader", "real", "", False, False, 170, 2 * (number == 0)))
        bands.append(rng.normal(-7, 1, (340, 64)).astype(np.float16))
        labels.append(np.full(170, -1))
        f0.append(np.zeros(170, np.float32))
        phones.append(np.array([3, 4][: 2 * (number == 0)]))
        ends.append(np.full(len(phones[-1]), 170.0))
    clips.append(speech.Clip(-1, "teller", "real", "", False, False, 60, 2))
    bands.append(rng.normal(-7, 1, (120, 64)).astype(np.float16))
    labels.append(np.full(60, -1))
    f0.append(np.zeros(60, np.float32))
    phones.append(np.array([5, 6]))
    ends.append(np.full(2, 60.0))
    starts = np.cumsum([0, *(clip.frames for clip in clips)])[:-1]
    return encoder.Data(np.concatenate(bands), np.concatenate(labels), np.concatenate(f0), clips, starts, phones, ends,
                        {"a": 0, "b": 1, "reader": 2, "teller": 3})


SMALL = Sizes(width=16, blocks=2, expansion=2, dim=12, phones=len(PHONES))


def test_batches_are_functions_of_seed_and_step_and_twins_say_the_same(data: encoder.Data) -> None:
    batches = encoder.Batches(data, seed=3)
    one, other = batches.at(5), encoder.Batches(data, seed=3).at(5)
    assert torch.equal(one.bands, other.bands) and torch.equal(one.twin, other.twin)
    assert not torch.equal(one.bands, batches.at(6).bands)
    pairs = len(one.twin)
    row, frame = (one.twin >= 0).nonzero(as_tuple=True)
    assert len(row) > 100
    same = one.labels[row, frame] == one.labels[pairs + row, one.twin[row, frame]]
    assert same.float().mean() > 0.95  # those at the very edge of a phone may fall beyond it


def test_augmentation_keeps_shape_and_is_drawn_by_its_generator(data: encoder.Data) -> None:
    bands = encoder.Batches(data, seed=0).at(0).bands
    warped = torch.zeros(len(bands), dtype=torch.bool)
    one, other = (Augment(torch.Generator().manual_seed(1), 1.0)(bands, warped) for _ in range(2))
    assert one.shape == bands.shape and torch.isfinite(one).all()
    assert torch.equal(one, other)
    assert torch.allclose(Augment(torch.Generator().manual_seed(1), 0.0)(bands, warped), bands, atol=0.02)


def test_a_vocal_tract_moves_a_formant_by_its_factor() -> None:
    augment = Augment(torch.Generator().manual_seed(0), 1.0)
    bands = torch.full((1, 2, 64), -16.0)
    bands[..., 30] = 0.0
    moved = augment._warp(bands, torch.tensor([True]))[0, 0]
    generator = torch.Generator().manual_seed(0)
    factor = float(torch.rand(1, generator=generator) * (1.22 - 0.82) + 0.82)
    peak = float(augment.centres[int(moved.argmax())])
    assert peak == pytest.approx(float(augment.centres[30]) * factor, rel=0.06)


def test_training_interrupted_goes_on_to_the_same_weights(data: encoder.Data, tmp_path: Path) -> None:
    told: list[str] = []
    whole = encoder.Training(tmp_path / "a", data, encoder.Weights(), steps=6, sizes=SMALL)
    assert whole.run(told=told.append)
    part = encoder.Training(tmp_path / "b", data, encoder.Weights(), steps=6, sizes=SMALL)
    for _ in range(3):
        part._advance()
    part._save()
    rest = encoder.Training(tmp_path / "b", data, encoder.Weights(), steps=6, sizes=SMALL)
    assert rest.step == 3 and rest.run(told=told.append)
    for name, tensor in whole.mean.state_dict().items():
        assert torch.equal(tensor, rest.mean.state_dict()[name]), name
    assert curves.read(tmp_path / "a" / "log.csv")[-1]["step"] == 6


def test_phones_are_learnt_and_the_encoder_is_written_as_the_box_has_it(data: encoder.Data, tmp_path: Path) -> None:
    run = encoder.Training(tmp_path, data, encoder.Weights(voice=0, pitch=0, real=0), steps=60, sizes=SMALL)
    first = [run._advance()["phones"] for _ in range(5)]
    assert run.run(told=lambda line: None)
    last = curves.read(tmp_path / "log.csv")[-1]["phones"]
    assert last < 0.8 * np.mean(first)
    curves.draw(curves.read(tmp_path / "log.csv"), tmp_path / "log.png")
    assert (tmp_path / "log.png").stat().st_size > 5000
    path = erase.finish(run, removed=4)
    extractor = parse(f"mini,weights={path}")["mini"]
    assert extractor.dim == 8
    (found,) = extractor.load("cpu")([np.zeros(3200, np.float32)])
    assert found.shape == (10, 8)


def test_a_gradient_comes_back_reversed() -> None:
    x = torch.ones(3, requires_grad=True)
    encoder.Reversed.apply(x, 0.5).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), -0.5))


def test_an_unknown_objective_is_named() -> None:
    assert encoder.without(["voice"]) == replace(encoder.Weights(), voice=0.0)
    with pytest.raises(ValueError, match="no objective 'speaker'; there are phones, ctc"):
        encoder.without(["speaker"])


def test_what_tells_voices_apart_is_erased_and_phones_stay(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    network = ContentNet(SMALL)
    phone, voice = rng.integers(1, 5, 4000), rng.integers(0, 6, 4000)
    content = rng.normal(0, 0.3, (4000, 12)).astype(np.float32)
    content[:, :4] += 2.0 * np.eye(4, dtype=np.float32)[phone - 1]
    content[:, 5] += voice
    octave = rng.uniform(6, 9, 4000)
    content[:, 7] += octave
    frames = erase.Frames(content, phone, voice, octave, voice > 2)
    kept = content @ erase.directions(frames, 2)
    spread = np.array([[kept[(phone == p) & (voice == v)].mean(0) for v in range(6)] for p in range(1, 5)])
    assert np.abs(spread - spread.mean(1, keepdims=True)).max() < 0.1
    assert abs(np.corrcoef(kept.T, octave)[-1, :-1]).max() < 0.1
    centres = np.array([kept[phone == p].mean(0) for p in range(1, 5)])
    near = np.linalg.norm(kept[:, None] - centres, axis=2).argmin(1) + 1
    assert (near == phone).mean() > 0.98
    found = erase.erased(network, frames, removed=2)
    assert found.sizes.dim == 10
    erase.save(found, tmp_path / "a.safetensors")
    assert parse(f"mini,weights={tmp_path / 'a.safetensors'}")["mini"].dim == 10


# The box.


def test_the_card_says_all_that_a_release_must() -> None:
    text = (ROOT / "docs" / "mini" / "encoder.md").read_text("utf-8")
    assert card.problems(text) == []


@espeak
def test_the_box_reads_the_phones_of_a_voice_it_was_taught() -> None:
    said = voices.espeak().say("gmw/en-US", "Nobody knows whether the yellow garden was beautiful in winter.")
    extractor = parse("mini:phones")["mini"]
    (found,) = extractor.load("cpu")([said.wave])
    path = found.argmax(1)
    heard = [int(n) for n in path[np.flatnonzero(np.diff(path, prepend=-1))] if n != NUMBER["sil"]]
    expected = [int(n) for n in said.phones if n != NUMBER["sil"]]
    wrong = measure.learners.edits("".join(map(chr, heard)), "".join(map(chr, expected)))
    assert wrong / len(expected) < 0.3
