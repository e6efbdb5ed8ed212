"""The report on a store: known numbers come out, by speaker; flags are kept and found; the page needs nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import featstore as fs
from featstore_cli import cli
from featstore_zoo import census


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    """Alice on A4, voiced three frames of four, at -20 dBFS; Bob an octave lower, clipped; somebody silent."""
    store = fs.create(tmp_path_factory.mktemp("census") / "some.zarr")
    with store.writer() as writer:
        writer.declare("f0", fs.Spec(made_by="own", version=1, frame_rate=100, kind="f0"))
        writer.declare("loudness", fs.Spec(made_by="own", version=1, frame_rate=100, kind="continuous"))
        for key, hz, level, record in (("a/1", 440, -20, {"speaker": "alice"}), ("a/2", 440, -20, {"speaker": "alice"}),
                                       ("b/<i>", 220, -3, {"speaker": "bob", "flags": ["clipped"]}),
                                       ("c/1", 0, -80, {})):
            writer.utterance({"key": key, "duration_s": 1.0, **record}, seconds=1.0)
            writer.write(key, "f0", np.where(np.arange(100) % 4, hz, 0).astype(np.float32))
            writer.write(key, "loudness", np.full(100, level, np.float32))
    return store


def test_each_speaker_has_the_numbers_that_went_in(store: fs.Store) -> None:
    found = census.take(store)
    alice, bob, nobody = found.voices
    assert [v.speaker for v in found.voices] == ["alice", "bob", None]
    assert alice.f0_at(0.5) == pytest.approx(440, rel=2 ** (census.CENTS / 1200) - 1)
    assert alice.voiced_share == 0.75 and alice.mean_db == pytest.approx(-20) and alice.hours == pytest.approx(2 / 3600)
    assert bob.f0_at(0.05) == pytest.approx(220, rel=0.006) and math.isnan(nobody.f0_at(0.5))
    assert found.flagged == {"b/<i>": ("clipped",), "c/1": ("mostly-silent", "quiet", "unvoiced")}


def test_notes_are_those_of_the_piano() -> None:
    assert [census.note(hz) for hz in (440, 261.63, 27.5, 466.2, 0)] == ["A4", "C4", "A0", "A♯4", ""]


def test_the_command_writes_a_page_with_nothing_outside_it(store: fs.Store, tmp_path: Path) -> None:
    out = tmp_path / "x.html"
    done = CliRunner().invoke(cli, ["report", str(store.path), "-o", str(out), "--json"], catch_exceptions=False)
    assert done.exit_code == 0 and json.loads(done.stdout)["speakers"][2]["f0_median_hz"] is None
    text = out.read_text()
    assert "b/&lt;i&gt;" in text and "A4" in text and "over 1 % of the samples" in text
    assert "<svg" in text and 'src="http' not in text
    refused = CliRunner().invoke(cli, ["report", str(store.path), "-o", str(tmp_path / "no" / "x.html")])
    assert refused.exit_code == 2 and "does not exist" in refused.output


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fs.errors.BadRequest, match="no utterances to report on"):
        census.take(fs.create(tmp_path / "empty.zarr"))
