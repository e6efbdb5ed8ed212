"""Evaluation: what belongs together, means and their intervals, paired tests, tables, what is refused."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from metric_pairs import RATE, pair

import featstore as fs
from featstore.errors import BadRequest
from featstore_cli import cli
from featstore_extractors import parse
from featstore_zoo import intervals, metrics, pairs, report
from featstore_zoo.evaluate import evaluate

QUICK = ("mcd", "f0_corr", "f0_rmse", "energy_rmse", "si_sdr")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """reference/, same/ and noisy/, two utterances of 0.6 s each, in folders of two speakers."""
    one, other = pair("noise")
    for number, start in enumerate((0, 9600)):
        for system, wave in (("reference", one), ("same", one), ("noisy", other)):
            path = tmp_path / system / f"s{number}" / f"u{number}.wav"
            path.parent.mkdir(parents=True)
            sf.write(path, wave[start:start + 9600], RATE, subtype="FLOAT")
    return tmp_path


def test_equal_files_are_perfect_noisy_ones_are_not_and_both_are_compared(folders):
    made = {system: folders / system for system in ("same", "noisy")}
    found = evaluate(folders / "reference", made, names=QUICK, workers=1)
    same = {name: found.summary("same", name).interval.mean for name in QUICK}
    assert same == {"mcd": 0, "f0_corr": 1, "f0_rmse": 0, "energy_rmse": 0, "si_sdr": 100}
    noisy = found.summary("noisy", "mcd").interval
    values = [one.values["mcd"] for one in found.measured if one.system == "noisy"]
    assert noisy.mean == pytest.approx(np.mean(values)) and noisy.low == min(values) and noisy.high == max(values)
    assert found.summary("noisy", "mcd", "speaker", "s1").interval.mean == values[1]
    (compared,) = [one for one in found.comparisons if one.metric == "mcd"]
    assert (compared.one, compared.other) == ("same", "noisy") and compared.difference.mean == -noisy.mean
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["utterances"][0]["utterance"] == "s0/u0"


def test_silence_has_no_value_and_a_reason(folders, tmp_path):
    sf.write(folders / "noisy" / "s0" / "u0.wav", np.zeros(9600), RATE)
    found = evaluate(folders / "reference", {"noisy": folders / "noisy"}, names=("mcd", "si_sdr"), workers=1)
    assert found.measured[0].reasons == dict.fromkeys(("mcd", "si_sdr"), "the converted recording is silent")
    assert found.summary("noisy", "mcd").missing == 1 and found.summary("noisy", "mcd").interval.count == 1
    assert found.to_json()["utterances"][0]["values"]["mcd"] is None
    assert list(report.missing(found)) == ["noisy: the converted recording is silent (1 utterance: all metrics)"]
    said = CliRunner().invoke(cli, ["evaluate", "--reference", str(folders / "reference"), "--converted",
                                     str(folders / "noisy"), "-m", "si_sdr", "--workers", "1", "-o",
                                     str(tmp_path / "out")])
    assert said.exit_code == 0 and "left out: noisy: the converted recording is silent (1 utterance" in said.output
    assert "n = 1" in (tmp_path / "out" / "index.html").read_text("utf-8")  # a mean says of how many it is


def test_frechet_distance_is_over_what_is_compared(folders, tmp_path):
    for system in ("reference", "noisy"):
        assert not fs.extract(fs.corpus(folders / system), fs.create(tmp_path / f"{system}.zarr"),
                              parse("wave", "log-mel"), workers=0).failures
    stores = [fs.open(tmp_path / f"{system}.zarr") for system in ("reference", "noisy")]
    fs.split(stores[0], "main", by="utterance", test=1, seed=0)
    (key,) = fs.open(tmp_path / "reference.zarr").view(["log-mel"], like="log-mel", split="main/test")
    found = evaluate(tmp_path / "reference.zarr", {"noisy": tmp_path / "noisy.zarr"}, split="main/test",
                     names=("si_sdr",), frechet=["log-mel"], workers=1)
    one, other = (np.asarray(store[key, "log-mel"].as_float()) for store in stores)
    assert found.frechet["log-mel"]["noisy"] == pytest.approx(metrics.frechet_distance(one, other))


def test_what_has_no_counterpart_is_named(folders):
    (folders / "noisy" / "s0" / "u0.wav").rename(folders / "noisy" / "s0" / "other.wav")
    with pytest.raises(BadRequest, match="noisy lacks s0/u0; noisy has s0/other, which the reference lacks"):
        evaluate(folders / "reference", {"noisy": folders / "noisy"})


def test_recordings_are_paired_by_name_where_their_folders_differ(folders):
    (folders / "noisy" / "s0").rename(folders / "noisy" / "converted")
    found = pairs.pair(*[pairs.recordings(folders / name) if name == "reference" else
                         {name: pairs.recordings(folders / name)} for name in ("reference", "noisy")])
    assert [one.converted["noisy"].key for one in found] == ["converted/u0", "s1/u1"]
    assert [one.name for one in found] == ["s0/u0", "s1/u1"]


def test_a_list_says_what_belongs_together(folders, tmp_path):
    reference, made = (pairs.recordings(folders / name) for name in ("reference", "noisy"))
    listed = tmp_path / "pairs.csv"
    listed.write_text("reference,converted\nu0,s1/u1\ns0/u0,u0\n")
    found = pairs.pair(reference, {"noisy": made}, listed)
    keys = [(one.reference.key, one.converted["noisy"].key) for one in found]
    assert keys == [("s0/u0", "s0/u0"), ("s0/u0", "s1/u1")]
    listed.write_text("reference,converted\nu7,u1\n")
    with pytest.raises(BadRequest, match=r"pairs.csv:2: the reference has 0 recordings 'u7' \(it has: s0/u0"):
        pairs.pair(reference, {"noisy": made}, listed)
    listed.write_text("a,b\n")
    with pytest.raises(BadRequest, match="has the columns a, b: expected reference, converted"):
        pairs.pair(reference, {"noisy": made}, listed)


def test_a_store_is_a_reference_with_its_split_and_its_waveform(folders, tmp_path):
    store = fs.create(tmp_path / "songs.zarr")
    fs.extract(fs.corpus(folders / "reference"), store, parse("wave,sample_rate=16000"), workers=0)
    store.refresh()
    fs.split(store, "main", by="speaker", test=50, seed=0)
    found = evaluate(tmp_path / "songs.zarr", {"same": folders / "same"}, split="main/test", names=("si_sdr",),
                     workers=1)
    assert len(found.measured) == 1 and found.measured[0].values["si_sdr"] > 60
    with pytest.raises(BadRequest, match="--split needs a reference that is one"):
        evaluate(folders / "reference", {"same": folders / "same"}, split="main/test")


def test_tables_hold_what_was_found(folders, tmp_path):
    evaluate(folders / "reference", {"noisy": folders / "noisy"}, tmp_path / "out", names=("si_sdr",), workers=1)
    rows = list(csv.DictReader((tmp_path / "out" / "utterances.csv").read_text().splitlines()))
    assert [row["utterance"] for row in rows] == ["s0/u0", "s1/u1"] and float(rows[0]["si_sdr"]) > 0
    assert (tmp_path / "out" / "utterances" / "0002.html").exists()
    with pytest.raises(BadRequest, match="has files that are no report"):
        evaluate(folders / "reference", {"noisy": folders / "noisy"}, folders, names=("si_sdr",))
    evaluate(folders / "reference", {"same": folders / "same"}, tmp_path / "out", names=("si_sdr",), workers=1)
    assert "same" in (tmp_path / "out" / "summary.csv").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


@pytest.mark.parametrize(("options", "said"), [
    ({"names": ("mdc",)}, "no metric 'mdc'"), ({"names": ("cer",)}, "cer needs a recogniser"),
    ({"f0": "f0:swift,hop=256"}, "expected an f0 of 200 frames per second"),
    ({"speaker": "energy"}, "expected a speaker embedding"), ({"frechet": ("log-mel",)}, "is no store"),
    ({"recogniser": "whisper:vast"}, "no recogniser 'whisper:vast'"), ({"variant": "other"}, "there is amphion")])
def test_what_cannot_be_is_refused(folders, options, said):
    with pytest.raises(BadRequest, match=said):
        evaluate(folders / "reference", {"same": folders / "same"}, **options)


def test_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = [low <= 1 <= high for _, low, high, _ in (intervals.interval(rng.normal(1, 1, 60)) for _ in range(200))]
    assert 0.90 <= np.mean(inside) <= 0.99


def test_interval_of_shares_is_that_of_the_whole_text_and_of_one_value_is_none():
    found = intervals.interval(np.array([0.0, 1.0, math.nan]), np.array([9, 1, 5]))
    assert found.mean == pytest.approx(0.1) and found.count == 2
    assert math.isnan(intervals.interval(np.array([1.0])).low)
    assert math.isnan(intervals.interval(np.array([math.nan])).mean)


def test_paired_test_is_scipys_and_needs_a_difference():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    one = rng.normal(0, 1, 30)
    other = one + rng.normal(0.5, 0.5, 30)
    found = intervals.difference(one, other)
    assert found.p == pytest.approx(stats.wilcoxon(one, other).pvalue) and found.low < found.mean < found.high < 0
    assert intervals.difference(one, one).p == 1
    assert math.isnan(intervals.difference(one[:1], other[:1]).p)


def test_holm_corrects_by_rank_and_never_downwards():
    assert intervals.holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
