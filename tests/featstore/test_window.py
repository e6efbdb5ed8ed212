"""Long audio in pieces: what is cut, what is kept, what a window must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st
from toys import Mean

from featstore import work
from featstore.errors import BadRequest
from featstore.spec import Spec, longest_piece

HOP, WIDTH = 8, 10  # as 320 and 400, the encoders' own
FRAMES: dict[str, Callable[[int], int]] = {
    "ceil(n / hop)": lambda n: math.ceil(n / HOP),
    "n // hop": lambda n: n // HOP,
    "(n - width) // hop + 1": lambda n: max(0, (n - WIDTH) // HOP + 1),
}


@dataclass(frozen=True)
class Cut:
    """A window over frames of HOP samples, and a recording that comes in blocks."""

    samples: int
    window: tuple[int, ...]
    blocks: tuple[int, ...]

    def pieces(self) -> list[work.Piece]:
        """What the cutter makes of the samples 1, 2, 3..."""
        extractor: Any = SimpleNamespace(window=self.window, sample_rate=16000, frame_rate=Fraction(16000, HOP))
        cutter, wave = work.Cutter(extractor), np.arange(1.0, self.samples + 1)
        return [piece for block, last in self._blocks(wave) for piece in cutter.push(block, last)]

    def _blocks(self, wave: np.ndarray) -> Iterator[tuple[np.ndarray, bool]]:
        start, sizes = 0, iter(self.blocks * (self.samples + 1))
        while True:
            stop = start + next(sizes)
            yield wave[start:stop], stop >= self.samples
            start = stop
            if stop >= self.samples:
                return


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    core, context = HOP * draw(st.integers(1, 12)), HOP * draw(st.integers(1, 15))
    longest = draw(st.none() | st.integers(core + 2 * context, core + 2 * context + 200))
    window = (core, context) if longest is None else (core, context, longest)
    return Cut(draw(st.integers(1, 900)), window, tuple(draw(st.lists(st.integers(1, 300), min_size=1, max_size=4))))


def sums(wave: np.ndarray, reach: int, frames: int) -> np.ndarray:
    """Of the samples up to `reach` beyond each hop on either side, and of the width that begins with it."""
    padded = np.pad(wave, (reach, reach + WIDTH + HOP))
    return np.array([padded[i * HOP:i * HOP + 2 * reach + WIDTH].sum() for i in range(frames)])


@given(cut=cuts(), rule=st.sampled_from(list(FRAMES)), data=st.data())
def test_pieces_rebuild_what_a_bounded_reach_sees_in_the_whole(cut: Cut, rule: str, data: st.DataObject) -> None:
    frames = FRAMES[rule]
    reach = data.draw(st.integers(0, cut.window[1] - (WIDTH - HOP)))
    parts = []
    for piece in cut.pieces():
        found = sums(piece.wave, reach, frames(len(piece.wave)))
        parts.append(found[piece.skip:None if piece.count is None else piece.skip + piece.count])
        assert piece.count in (None, len(parts[-1]))
    whole = sums(np.arange(1.0, cut.samples + 1), reach, frames(cut.samples))
    assert sum(map(len, parts)) == frames(cut.samples)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(cut=cuts())
def test_no_piece_is_longer_than_the_longest_and_their_cores_make_up_the_whole(cut: Cut) -> None:
    pieces = cut.pieces()
    assert max(len(piece.wave) for piece in pieces) <= longest_piece(cut.window)
    assert sum(piece.samples for piece in pieces) == cut.samples
    assert len(pieces) == 1 or cut.samples > longest_piece(cut.window)


@given(cut=cuts(), blocks=st.lists(st.integers(1, 300), min_size=1, max_size=4))
def test_pieces_do_not_depend_on_the_blocks_that_audio_comes_in(cut: Cut, blocks: list[int]) -> None:
    other = Cut(cut.samples, cut.window, tuple(blocks)).pieces()
    assert [(piece.wave.tolist(), piece.skip, piece.count) for piece in cut.pieces()] == [
        (piece.wave.tolist(), piece.skip, piece.count) for piece in other]


def test_a_window_of_three_parts_cuts_thirty_seconds_as_whisper_needs_it() -> None:
    window = (26 * 16000, 2 * 16000, 30 * 16000)
    lengths = {seconds: [len(piece.wave) / 16000 for piece in Cut(seconds * 16000, window, (20 * 16000,)).pieces()]
               for seconds in (5, 30, 31, 54, 56, 57, 90)}
    assert lengths == {5: [5], 30: [30], 31: [28, 7], 54: [28, 30], 56: [28, 30, 6], 57: [28, 30, 7],
                       90: [28, 30, 30, 14]}


@pytest.mark.parametrize("seconds", [0.3, 1.2, 1.21, 2.4, 9.99])
def test_windows_of_two_and_three_parts_give_one_feature(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "a.wav"
    sf.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, round(16000 * seconds)), 16000)
    windows = {"whole": None, "two": (16000, 320), "three": (8000, 320, 9600)}
    extractors = {name: Reaching(window=window) for name, window in windows.items()}
    made = work.Workbench(extractors, "cpu", tmp_path).make(work.Task("x", str(path), 0.0, None, tuple(extractors)))
    found = {name: np.concatenate(list(frames.blocks())) for name, frames in made.frames.items()}
    np.testing.assert_array_equal(found["two"], found["whole"])
    np.testing.assert_array_equal(found["three"], found["whole"])


@dataclass(frozen=True)
class Reaching(Mean):
    """Maximum of |x| over 30 ms about each 10 ms."""

    window: tuple[int, ...] | None = None

    def of(self, wave: np.ndarray) -> np.ndarray:
        padded = np.pad(np.abs(wave), 160)
        return np.array([padded[i * 160:i * 160 + 480].max() for i in range(len(wave) // 160)], np.float32)


def test_a_window_is_recorded_as_it_is_given() -> None:
    for window in ((16000, 160), (16000, 160, 16320), (np.int64(16000), 0, 20001)):
        assert Spec.of(Reaching(window=window)).settings["window"] == list(window)
    assert Spec.of(Reaching(window=(16000, 160))).identity != Spec.of(Reaching(window=(16000, 160, 32160))).identity


@pytest.mark.parametrize(("window", "words"), [
    ((16000,), r"expected \(core, context\)"), ((16000, 0, 32000, 1), r"expected \(core, context\)"),
    ((16000.0, 160), "whole numbers of samples"), ((16000, 100), r"whole numbers of frames \(160 samples"),
    ((16001, 160), "whole numbers of frames"), ((0, 160), "at least one"), ((16000, -160), "not negative"),
    ((16000, 160, 16319), "16320, so longest must be at least that, not 16319")])
def test_an_impossible_window_is_refused(window: tuple[Any, ...], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        Spec.of(Reaching(window=window))
