"""Pictures of utterances: that everything lies where its time is, that they get written, and what they refuse."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

import featstore as fs
from featstore.errors import BadRequest, DiskFull, MissingFeature, MissingPackage, MissingUtterance
from featstore_extractors.signal import LogMel, mel_filters

pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install featstore[signal]")
from featstore import plot as plots
from featstore.plot import COLUMNS, Grid, MelAxis, draw, plot, readable

CLICK_S = 1.25
WAVE = fs.Spec(made_by="wave", version=1, kind="samples", frame_rate=24000, dim=0, dtype="int16")
MEL = fs.Spec.of(LogMel())
F0 = fs.Spec(made_by="f0", version=1, kind="f0", frame_rate=200, dim=0, dtype="float32")
LOUDNESS = fs.Spec(made_by="loudness", version=1, kind="continuous", frame_rate=200, dim=0, dtype="float32")
CONTENT = fs.Spec(made_by="soft", version=1, kind="continuous", frame_rate=50, centre_s=Fraction(1, 80), dim=8,
                  dtype="float16")
UNITS = fs.Spec(made_by="units", version=1, kind="discrete", frame_rate=50, dim=0, dtype="int16")
VOICE = fs.Spec(made_by="speaker", version=1, kind="global", dim=16, dtype="float32")
SPECS = {"wave": WAVE, "log-mel": MEL, "f0": F0, "loudness": LOUDNESS, "soft": CONTENT, "units": UNITS,
         "speaker": VOICE}
HOSTILE = "evil \n\x1b[31m $x^2$ $\\frac \\u202e\u202e 天国 " + "W" * 300


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> fs.Store:
    """`click` has a click at CLICK_S in every feature, `hostile` an odd key, `audio only` a file, `bare` nothing."""
    root = tmp_path_factory.mktemp("plot")
    soundfile.write(root / "tone.wav", np.where(np.arange(32000) == CLICK_S * 16000, 0.5, 0.0), 16000)
    store = fs.create(root / "songs.zarr")
    with store.writer() as writer:
        for name, spec in SPECS.items():
            writer.declare(name, spec)
        for key in ("click", HOSTILE):
            writer.utterance({"key": key, "speaker": "歌手 $", "flags": ["clipped"], "duration_s": 2.0}, seconds=2.0)
            for name, frames in _clicks().items():
                writer.write(key, name, frames)
        for key, name in (("audio only", "tone.wav"), ("bare", "gone.wav")):
            writer.utterance({"key": key, "audio": name, "root": str(root), "duration_s": 2.0}, seconds=2.0)
    return fs.open(root / "songs.zarr")


def _clicks() -> dict[str, np.ndarray]:
    """Two seconds of every feature, in which something happens in the frame that covers CLICK_S and nowhere else."""
    wave = np.zeros(48000, np.int16)
    mel = np.full((187, 100), -11.5, np.float32)
    f0, loudness = np.zeros(401, np.float32), np.full(401, -80, np.float32)
    soft, units = np.zeros((99, 8), np.float16), np.zeros(100, np.int16)
    wave[30000], mel[30000 // 256, 20], f0[250], loudness[250] = 16000, 0, 440, -10
    soft[62], units[62] = 1, 7  # frame 62 of soft is centred on 1.2525 s
    return {"wave": wave, "log-mel": mel, "f0": f0, "loudness": loudness, "soft": soft, "units": units,
            "speaker": np.linspace(-1, 1, 16).astype(np.float32)}


def _panel(figure, name: str):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").split(" ")[0] == name)


def _bright_s(axes) -> tuple[float, float]:
    """From when to when the brightest column of the panel's image lasts."""
    image = axes.images[0]
    levels = np.asarray(image.get_array()).max(axis=0)
    left, right, *_ = image.get_extent()
    at, width = int(levels.argmax()), (right - left) / len(levels)
    return left + at * width, left + (at + 1) * width


def _peak_s(axes) -> float:
    time_s, values = axes.lines[0].get_data()
    return float(time_s[np.argmax(values)])


def test_a_click_is_drawn_at_one_time_in_every_panel(store):
    figure = draw(store, "click")
    mel = _panel(figure, "log-mel")
    assert _peak_s(_panel(figure, "wave")) == pytest.approx(CLICK_S, abs=6 / 24000), "12 samples make a column"
    assert _peak_s(_panel(figure, "loudness")) == CLICK_S
    assert mel.lines[1].get_xdata().tolist() == [CLICK_S], "f0, voiced in one frame only, is a dot over the log-mel"
    assert _bright_s(mel) == pytest.approx((30000 // 256 * 256 / 24000, (30000 // 256 + 1) * 256 / 24000))
    assert _bright_s(mel)[0] <= CLICK_S <= _bright_s(mel)[1]
    assert _bright_s(_panel(figure, "soft")) == pytest.approx((1.2525 - 0.01, 1.2525 + 0.01))


def test_all_panels_on_the_time_axis_share_it_to_the_pixel(store):
    figure = draw(store, "click")
    timed = [_panel(figure, name) for name in SPECS if name not in ("f0", "speaker")]
    assert {axes.get_xlim() for axes in timed} == {(0.0, 2.0)}
    assert len({axes.transData.transform((CLICK_S, 0))[0] for axes in timed}) == 1


def test_a_click_stays_within_its_column_when_a_long_file_is_reduced(store, monkeypatch):
    monkeypatch.setattr(plots, "COLUMNS", 40)
    monkeypatch.setattr(plots, "PIECE", 3000)
    figure = draw(store, "click")
    column_s = 2.0 / 40
    for name in ("wave", "loudness"):
        assert _peak_s(_panel(figure, name)) == pytest.approx(CLICK_S, abs=column_s / 2 + 0.003)
        assert len(_panel(figure, name).lines[0].get_xdata()) <= 80
    for name in ("log-mel", "soft"):
        start, end = _bright_s(_panel(figure, name))
        assert start <= CLICK_S <= end and end - start <= column_s * 1.4
        assert _panel(figure, name).images[0].get_array().shape[1] <= 40


@pytest.mark.parametrize("block", [1, 7])
def test_frames_are_placed_exactly(block):
    rate, centre = Fraction(11025, 128), Fraction(128, 22050)
    grid = Grid(rate, centre, frames=500, block=block)
    exact = [centre + Fraction(2 * i + min(block, 500 - i) - 1, 2) / rate for i in range(0, 500, block)]
    assert grid.centres_s == pytest.approx([float(time) for time in exact], abs=1e-12)
    assert grid.edges_s[0] == float(centre - 1 / (2 * rate)), "an image begins half a frame before its first centre"
    width = (grid.edges_s[1] - grid.edges_s[0]) / len(grid.starts)
    assert width == pytest.approx(float(block / rate), rel=1e-12)


@pytest.mark.parametrize("frames", [1, COLUMNS, COLUMNS + 1, 2 * 3600 * 48000])
def test_no_panel_has_more_columns_than_it_should(frames):
    grid = Grid(Fraction(100), Fraction(0), frames, plots.block_for(frames))
    assert (min(frames, COLUMNS) + 1) // 2 <= len(grid.starts) <= COLUMNS


@pytest.mark.parametrize("contract", [LogMel(n_fft=1 << 16),
                                      LogMel(n_fft=1 << 16, mel_scale="htk", fmin=40, n_mels=64)])
def test_channels_lie_on_the_mel_axis_where_their_filters_peak(contract):
    axis = MelAxis.of(fs.Spec.of(contract))
    peaks_hz = mel_filters(contract).argmax(axis=1) * contract.sample_rate / contract.n_fft
    low, high = axis.edges
    centres = low + (np.arange(contract.n_mels) + 0.5) * (high - low) / contract.n_mels
    assert axis.mel(peaks_hz) == pytest.approx(centres, abs=0.01 * (high - low) / contract.n_mels + axis.mel(0.5))
    assert all(low <= axis.mel(hz) <= high for hz in axis.ticks_hz) and len(axis.ticks_hz) >= 4


def test_f0_gets_its_own_panel_in_hz_without_a_log_mel(store):
    panel = _panel(draw(store, "click", ["f0"]), "f0")
    assert panel.get_ylabel() == "Hz"
    assert panel.lines[1].get_ydata().tolist() == [440]


def test_unvoiced_frames_are_gaps(store):
    hz = _panel(draw(store, "click", ["f0"]), "f0").lines[0].get_ydata()
    assert np.isnan(hz).sum() == 400


def test_panels_say_what_they_are(store):
    figure = draw(store, "click")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    label = store.features["log-mel"].label
    assert f"log-mel {label} · 93.75 Hz · dim 100" in titles
    assert [title.split(" ")[0] for title in titles] == ["wave", "log-mel", "loudness", "units", "soft", "speaker"]
    assert _panel(figure, "loudness").get_ylabel() == "dBFS"
    assert figure.texts[0].get_text() == "click"
    assert figure.texts[1].get_text() == "speaker \\u6b4c\\u624b $ · 2.00 s · flags: clipped"


def test_only_what_is_asked_for_is_shown_below_the_waveform(store):
    identity = store.features["soft"].short
    figure = draw(store, "click", [f"soft@{identity[:6]}", "speaker"])
    titles = [axes.get_title(loc="left").split(" ")[0] for axes in figure.axes if axes.get_title(loc="left")]
    assert titles == ["wave", "soft", "speaker"]


def test_the_waveform_comes_from_the_file_where_none_is_stored(store):
    panel = _panel(draw(store, "audio only"), "audio")
    assert _peak_s(panel) == pytest.approx(CLICK_S, abs=4 / 16000)
    assert panel.get_title(loc="left") == "audio file · 16000 Hz"


def test_a_changed_audio_file_is_named_as_such(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    store = fs.create(tmp_path / "s.zarr")
    with store.writer() as writer:
        writer.utterance({"key": "a", "audio": "a.wav", "root": str(tmp_path)}, source=b"\1" * 32, seconds=0.1)
    assert "CHANGED" in _panel(draw(fs.open(store.path), "a"), "audio").get_title(loc="left")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_hostile_key_is_drawn_without_a_warning(store, tmp_path, suffix):
    out = tmp_path / f"odd{suffix}"
    plot(store, HOSTILE, out, ["f0"])
    assert out.stat().st_size > 10_000
    shown = readable(HOSTILE)
    assert shown.startswith("evil \\n\\x1b[31m $x^2$ $\\frac \\u202e\\u202e \\u5929\\u56fd ")


def test_a_long_line_fits_into_the_picture(store):
    figure = draw(store, HOSTILE, ["f0"])
    for line in figure.texts:
        assert line.get_window_extent().x1 <= figure.bbox.x1


def test_the_picture_is_an_image_of_the_expected_size(store, tmp_path):
    plot(store, "click", tmp_path / "click.png", ["f0", "loudness"])
    data = (tmp_path / "click.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert width == 1800
    assert 700 < height < 1000, "three panels"
    from matplotlib.image import imread

    pixels = imread(tmp_path / "click.png")
    assert pixels.shape[:2] == (height, width) and pixels[..., :3].std() > 0.05
    assert [file.name for file in tmp_path.iterdir()] == ["click.png"]


def test_single_frames_and_numbers_beyond_float32_are_drawn(tmp_path):
    store = fs.create(tmp_path / "s.zarr")
    odd = fs.Spec(made_by="odd", version=1, kind="continuous", frame_rate=20, dim=2, dtype="float64")
    tempo = fs.Spec(made_by="tempo", version=1, kind="global", dim=0, dtype="float32")
    with store.writer() as writer:
        for name, spec in {"log-mel": MEL, "f0": F0, "units": UNITS, "odd": odd, "huge": odd, "tempo": tempo}.items():
            writer.declare(name, spec)
        writer.utterance({"key": "a"}, seconds=0.02)
        writer.write("a", "log-mel", np.zeros((1, 100), np.float32))
        writer.write("a", "f0", np.zeros(1, np.float32))
        writer.write("a", "units", np.zeros(1, np.int16))
        writer.write("a", "odd", np.array([[1e300, 1.0], [-1e300, 2.0]]))
        writer.write("a", "huge", np.full((1, 2), 1e300))
        writer.write("a", "tempo", np.array(120, np.float32))
    plot(fs.open(store.path), "a", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_what_the_store_does_not_have_is_refused_with_what_it_has(store, tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(MissingUtterance, match=r"no utterance 'clik' \(it has: click"):
        plot(store, "clik", out)
    with pytest.raises(MissingFeature, match="no feature 'f00'"):
        plot(store, "click", out, ["f00"])
    with pytest.raises(MissingFeature, match="audio only has no f0"):
        plot(store, "audio only", out, ["f0"])
    with pytest.raises(MissingFeature, match=r"bare has neither features .* nor audio"):
        plot(store, "bare", out)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_a_picture_is_refused(store, tmp_path):
    with pytest.raises(BadRequest, match=r"\.png, \.pdf, \.svg; its name ends in '\.jpg'\. Try: a\.png"):
        plot(store, "click", tmp_path / "a.jpg")
    with pytest.raises(BadRequest, match=r"ends in 'none of them'"):
        plot(store, "click", Path())
    with pytest.raises(BadRequest, match=r"folder .* does not exist"):
        plot(store, "click", tmp_path / "gone" / "a.png")
    (tmp_path / "b.png").mkdir()
    with pytest.raises(BadRequest, match="is a folder"):
        plot(store, "click", tmp_path / "b.png")


def test_a_full_disk_leaves_the_old_picture_and_no_half_one(store, tmp_path, monkeypatch):
    out = tmp_path / "a.png"
    out.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="no space left"):
        plot(store, "click", out, ["f0"])
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.png": b"old"}


def test_without_matplotlib_it_says_what_to_install(store, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackage, match=r"plots need matplotlib: pip install featstore\[signal\]"):
        plot(store, "click", tmp_path / "a.png")


def test_pyplot_and_its_global_state_are_never_loaded(store, tmp_path):
    code = ("import sys; from pathlib import Path; import featstore as fs; from featstore.plot import plot; "
            "assert 'matplotlib' not in sys.modules; plot(fs.open(sys.argv[1]), 'click', Path(sys.argv[2]), ['f0']); "
            "assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(store.path), str(tmp_path / "a.png")], check=True,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert (tmp_path / "a.png").exists()
