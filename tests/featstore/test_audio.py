"""What a file is, what is heard of it, and what resampling makes of it: on broken files and on recorded voices."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.audio import Reader, Resampler, file_digest, probe, resampled_length, source_digest
from featstore.errors import BadAudio

RATES = [(44100, 24000), (16000, 24000), (8000, 44100), (192000, 16000), (22050, 16000), (48000, 44100), (11025, 48000)]

READ = {  # file of audio_bad.md: samples, flags
    "header_too_long.wav": (16000, ("truncated",)),
    "header_streaming.wav": (16000, ()),
    "odd_byte_count.wav": (15999, ()),
    "truncated.flac": (12288, ("truncated",)),
    "wrong_extension.wav": (32000, ()),
    "float_over_range.wav": (16000, ("over-range",)),
    "too_short_20ms.wav": (320, ()),
    "silence.wav": (16000, ("silent",)),
    "dc_offset.wav": (16000, ("dc-offset",)),
    "clipped.wav": (16000, ("clipped", "dc-offset")),
    "antiphase_stereo.wav": (16000, ("antiphase",)),
    "eight_bit.wav": (16000, ()),
    "twentyfour_bit.wav": (48000, ()),
    "surround_5_1.wav": (24000, ()),
    "rate_192k.wav": (76800, ()),
    "rate_4k.wav": (4000, ("low-band",)),
    "lossy.mp3": (44100, ()),
    "lossy.ogg": (44100, ()),
    "Übung ñandú 歌声 🎤.wav": (16000, ()),
    "space 'single' \"double\" & $HOME;.wav": (16000, ()),
    "-leading-dash.wav": (16000, ()),
    "long_" + "x" * 240 + ".wav": (16000, ()),
    "UPPER.WAV": (16000, ()),
    "same_stem/a/take1.wav": (9600, ()),
}
REFUSED = {
    "empty_file.wav": "^empty file$",
    "no_samples.wav": "^no audio: 0 samples$",
    "text_named.wav": "^not audio$",
    "header_zero_rate.wav": "^bad header: sample rate 0$",
    "nan_inf_float.wav": "^50 NaN and 2 infinite samples$",
    "one_sample.wav": r"^too short: 1 samples \(0.06 ms\)",
    "same_stem/a/take1.txt": "^not audio$",
}


@pytest.fixture(scope="module")
def bad(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(shared / "make_audio_bad.py", tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def odd(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(shared / "make_symlink_loop.py", tmp_path_factory.mktemp("odd"))


def made(script: Path, folder: Path) -> Path:
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


def heard(path: Path | str, *cut: float | None, block_s: float = 20.0) -> tuple[np.ndarray, Reader]:
    with Reader(path, *cut, block_s=block_s) as reader:  # type: ignore[arg-type]
        blocks = list(reader)
    return np.concatenate(blocks), reader


def sine(hz: float, rate: int, seconds: float) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("name", READ)
def test_usable_file_gives_its_true_length_and_flags(bad: Path, name: str) -> None:
    if not (bad / name).exists():
        pytest.skip("this libsndfile cannot write it")
    wave, reader = heard(bad / name)
    samples, flags = READ[name]
    assert (len(wave), reader.samples, reader.flags) == (samples, samples, flags)
    assert wave.dtype == np.float32
    assert np.isfinite(wave).all()


@pytest.mark.parametrize("name", REFUSED)
def test_unusable_file_is_refused_with_a_short_reason(bad: Path, name: str) -> None:
    with pytest.raises(BadAudio, match=REFUSED[name]):
        heard(bad / name)


def test_every_broken_file_has_an_expectation_here(bad: Path) -> None:
    names = {str(path.relative_to(bad)) for path in bad.rglob("*") if path.is_file()}
    assert names - {"same_stem/b/take1.wav"} <= READ.keys() | REFUSED.keys()


def test_probe_reads_the_header_by_content(bad: Path) -> None:
    header = probe(bad / "wrong_extension.wav")
    assert (header.format, header.sample_rate, header.channels, header.frames, header.duration_s) == (
        "flac", 16000, 1, 32000, 2.0)
    with pytest.raises(BadAudio, match=r"^no audio: 0 samples$"):
        probe(bad / "no_samples.wav")


def test_eight_bits_are_decoded_around_zero(bad: Path) -> None:
    wave, _ = heard(bad / "eight_bit.wav")
    assert abs(wave.mean()) < 0.01


def test_floats_beyond_one_are_kept(bad: Path) -> None:
    wave, _ = heard(bad / "float_over_range.wav")
    assert np.abs(wave).max() > 11


def test_surround_is_the_mean_of_its_channels(bad: Path) -> None:
    wave, reader = heard(bad / "surround_5_1.wav")
    channels, _ = soundfile.read(bad / "surround_5_1.wav")
    assert reader.channels == 6
    assert np.abs(wave - channels.mean(axis=1)).max() < 1e-6


def test_antiphase_gives_the_loudest_channel(bad: Path) -> None:
    wave, _ = heard(bad / "antiphase_stereo.wav")
    channels, _ = soundfile.read(bad / "antiphase_stereo.wav", dtype="float32")
    assert np.array_equal(wave, channels[:, 0])


def test_channels_that_cancel_only_later_are_flagged(tmp_path: Path) -> None:
    tone = sine(220, 8000, 10)
    left = np.concatenate([np.zeros(8000 * 21, np.float32), tone])
    soundfile.write(tmp_path / "late.wav", np.stack([left, -left], axis=1), 8000)
    assert heard(tmp_path / "late.wav")[1].flags == ("antiphase", "silent")


@pytest.mark.parametrize("block_s", [0.07, 1.0, 30.0])
def test_channel_choice_does_not_depend_on_the_block(tmp_path: Path, block_s: float) -> None:
    tone = sine(220, 8000, 25)
    both = np.stack([tone, np.where(np.arange(len(tone)) < 4000, tone, -tone)], axis=1)  # agree for half a second
    soundfile.write(tmp_path / "both.wav", both, 8000)
    wave, reader = heard(tmp_path / "both.wav", block_s=block_s)
    assert np.array_equal(wave, heard(tmp_path / "both.wav")[0])
    assert reader.flags == heard(tmp_path / "both.wav")[1].flags


def test_loud_music_is_not_called_clipped(tmp_path: Path) -> None:
    tone = 2 * sine(220, 16000, 2)
    soundfile.write(tmp_path / "loud.wav", tone, 16000)  # touches full scale at every crest
    assert heard(tmp_path / "loud.wav")[1].flags == ()


def test_recorded_voices_have_no_flags(shared: Path) -> None:
    flagged = {path.name: reader.flags for path in sorted((shared / "audio").glob("*/*.flac"))[::8]
               for _, reader in [heard(path)] if reader.flags}
    assert flagged == {}


@pytest.mark.parametrize("name", ["line\nbreak.wav", "loop/real.wav"])
def test_strange_names_open(odd: Path, name: str) -> None:
    assert len(heard(odd / name)[0]) == 8000


def test_names_that_are_not_utf8_open(tmp_path: Path, odd: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.wav"
    try:
        Path(os.fsdecode(name)).write_bytes((odd / "loop" / "real.wav").read_bytes())
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    assert probe(os.fsdecode(name)).frames == 8000
    assert len(file_digest(os.fsdecode(name))) == 32


def test_a_file_called_dash_is_not_standard_input(tmp_path: Path, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "-").write_bytes((odd / "loop" / "real.wav").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert probe("-").frames == 8000


@pytest.mark.parametrize(("name", "reason"), [
    ("fifo.wav", r"^not a regular file \(named pipe\)$"),
    ("loop/dangling.wav", "^link to nothing$"),
    ("loop", r"^not a regular file \(folder\)$"),
    ("nowhere.wav", "^no such file$"),
    ("nul\0.wav", "^no such file"),
])
def test_what_is_no_file_is_refused_unopened(odd: Path, name: str, reason: str) -> None:
    for read in (probe, file_digest, Reader):
        with pytest.raises(BadAudio, match=reason):
            read(odd / name)


def test_unreadable_file_is_refused_to_an_ordinary_user(shared: Path) -> None:
    script = ("import os, sys\nfrom featstore.audio import probe\nfrom featstore.errors import BadAudio\n"
              "os.getuid() or os.setuid(65534)\n"
              "try: probe(sys.argv[1])\nexcept BadAudio as error: print(error)")
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        made(shared / "make_symlink_loop.py", Path(folder))
        Path(folder).chmod(0o755)
        found = subprocess.run([sys.executable, "-c", script, f"{folder}/unreadable.wav"], text=True,
                               capture_output=True, env={**os.environ, "PYTHONPATH": f"{root}:{root / 'align'}"})
    assert found.stdout.strip() == "cannot be read: permission denied", found.stderr


@pytest.mark.parametrize("rate", [2_000_000, 0x7FFFFFFF])
def test_absurd_sample_rate_is_a_bad_header(odd: Path, tmp_path: Path, rate: int) -> None:
    data = bytearray((odd / "loop" / "real.wav").read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "rate.wav").write_bytes(data)
    with pytest.raises(BadAudio, match="bad header: sample rate"):
        Reader(tmp_path / "rate.wav")


def test_flac_without_a_length_is_read_to_its_end(bad: Path, tmp_path: Path) -> None:
    data = bytearray((bad / "wrong_extension.wav").read_bytes())
    data[21] &= 0xF0  # the 36 bits that count samples
    data[22:26] = bytes(4)
    (tmp_path / "streamed.flac").write_bytes(data)
    assert probe(tmp_path / "streamed.flac").frames == 32000
    wave, reader = heard(tmp_path / "streamed.flac", 0.5, 1.25)
    assert np.array_equal(wave, heard(bad / "wrong_extension.wav", 0.5, 1.25)[0])
    assert reader.flags == ()


@pytest.mark.parametrize("junk", [b"RIFF", b"\xff\xfb\x90\x00", b"OggS" + bytes(20), b"fLaC" + bytes(40),
                                  "a text in UTF-16".encode("utf-16") * 50, bytes(1000)])
def test_junk_is_refused(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "junk.wav").write_bytes(junk)
    with pytest.raises(BadAudio):
        heard(tmp_path / "junk.wav")


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "AIFF", "CAF", "AU", "OGG", "MP3", "RF64"])
def test_cut_is_those_samples_of_the_whole(tmp_path: Path, shared: Path, kind: str) -> None:
    voice, rate = soundfile.read(shared / "audio" / "csd_alto1" / "nino_dios.flac", dtype="float32", frames=160000)
    soundfile.write(tmp_path / "x", voice, rate, format=kind)
    whole, _ = heard(tmp_path / "x")
    part, reader = heard(tmp_path / "x", 1.23456, 7.5)
    assert np.array_equal(part, whole[round(1.23456 * rate):round(7.5 * rate)])
    assert reader.samples == len(part)


@pytest.mark.parametrize("block_s", [0.011, 0.5, 3.0])
def test_blocks_joined_are_the_whole(shared: Path, block_s: float) -> None:
    path = shared / "audio" / "vctk_p225" / "p225_003.flac"
    whole, _ = heard(path)
    with Reader(path, block_s=block_s) as reader:
        blocks = list(reader)
    assert {len(block) for block in blocks[:-1]} == {round(block_s * 16000)}
    assert np.array_equal(np.concatenate(blocks), whole)


def test_end_may_lie_a_tenth_of_a_second_beyond(bad: Path) -> None:
    assert len(heard(bad / "wrong_extension.wav", 1.0, 2.09)[0]) == 16000


@pytest.mark.parametrize(("cut", "reason"), [
    ((0.0, 2.2), r"^the cut ends at 2.200 s, the recording is 2.000 s long$"),
    ((3.0, None), r"^the cut starts at 3.000 s, the recording is 2.000 s long$"),
    ((1.0, 1.0), "is empty"),
    ((-1.0, 1.0), "is empty"),
    ((float("nan"), None), "is empty"),
    ((1.0, 1.005), "^too short: 80 samples"),
])
def test_impossible_cut_is_refused(bad: Path, cut: tuple[float, float | None], reason: str) -> None:
    with pytest.raises(BadAudio, match=reason):
        heard(bad / "wrong_extension.wav", *cut)


def test_cut_beyond_what_a_truncated_file_decodes_is_refused(bad: Path) -> None:
    with pytest.raises(BadAudio, match=r"ends at 1.500 s, the recording is 0.768 s long"):
        heard(bad / "truncated.flac", 0.5, 1.5)
    assert len(heard(bad / "truncated.flac", 0.25, 0.5)[0]) == 4000


def test_long_recording_is_read_in_bounded_memory(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "long.flac", "w", samplerate=16000, channels=1) as file:
        for _ in range(60):
            file.write(sine(220, 16000, 10))
    tracemalloc.start()
    with Reader(tmp_path / "long.flac", block_s=5.0) as reader:
        count = sum(len(block) for block in reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 9_600_000
    assert peak < 20e6  # the whole is 38 MB


def test_standard_error_stays_quiet_over_mp3(bad: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if not (bad / "lossy.mp3").exists():
        pytest.skip("this libsndfile cannot write MP3")
    heard(bad / "lossy.mp3", 0.3, 0.7)
    assert capfd.readouterr().err == ""


def test_without_pyav_the_reason_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "song.wav").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadAudio, match=r"^m4a/mp4: install PyAV: pip install av$"):
        probe(tmp_path / "song.wav")


def test_m4a_is_read_through_pyav_in_time(tmp_path: Path, shared: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV reads m4a")
    voice, rate = soundfile.read(shared / "audio" / "csd_bass1" / "nino_dios.flac", dtype="float32", frames=128000)
    with av.open(str(tmp_path / "voice.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(voice[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    (tmp_path / "voice.m4a").rename(tmp_path / "voice.wav")
    wave, reader = heard(tmp_path / "voice.wav")
    assert (reader.sample_rate, len(wave)) == (rate, len(voice))
    assert np.corrcoef(wave, voice)[0, 1] > 0.99  # one frame of AAC late would give about 0
    assert np.array_equal(heard(tmp_path / "voice.wav", 1.5, 3.25)[0], wave[24000:52000])


def test_file_digest_is_that_of_its_bytes(odd: Path) -> None:
    path = odd / "loop" / "real.wav"
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).digest()


def test_source_digest_tells_cuts_apart_but_not_spellings() -> None:
    digest = bytes(32)
    same = {source_digest(digest), source_digest(digest, 0), source_digest(digest, -0.0, None)}
    others = {source_digest(digest, 1.0), source_digest(digest, 0.0, 1.0), source_digest(bytes(31) + b"1")}
    assert len(same) == 1
    assert len(same | others) == 4


@pytest.mark.parametrize(("source", "target"), RATES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_resampling_does_not_depend_on_the_partition(source: int, target: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 30000))
    wave = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    edges = sorted(data.draw(st.lists(st.integers(0, count), max_size=8)))
    whole = Resampler(source, target).push(wave, last=True)
    resampler, parts = Resampler(source, target), np.split(wave, edges)
    joined = np.concatenate([resampler.push(part, last=k == len(parts) - 1) for k, part in enumerate(parts)])
    assert len(whole) == resampled_length(count, source, target)
    assert np.array_equal(joined, whole)


@given(st.integers(0, 10**12), st.integers(1, 400_000), st.integers(1, 400_000))
def test_resampled_length_is_rounded_half_up(samples: int, source: int, target: int) -> None:
    excess = 2 * (resampled_length(samples, source, target) * source - samples * target)
    assert -source < excess <= source


@pytest.mark.parametrize(("source", "target"), RATES)
def test_resampled_sine_stays_in_time(source: int, target: int) -> None:
    out = Resampler(source, target).push(sine(440, source, 2), last=True)
    middle = slice(target // 2, -target // 2)
    assert np.abs(out[middle] - sine(440, target, 2)[middle]).max() < 1e-5


def test_equal_rates_pass_untouched() -> None:
    wave = sine(440, 16000, 1)
    assert Resampler(16000, 16000).push(wave, last=True) is wave


def test_resampled_voice_joined_from_blocks_is_the_whole(shared: Path) -> None:
    path = shared / "audio" / "vocadito_S1" / "vocadito_1.flac"
    wave, reader = heard(path)
    resampler = Resampler(reader.sample_rate, 24000)
    parts = [resampler.push(wave[k:k + 7777], last=k + 7777 >= len(wave)) for k in range(0, len(wave), 7777)]
    assert np.array_equal(np.concatenate(parts), Resampler(reader.sample_rate, 24000).push(wave, last=True))
