"""Probes: known answers come out, chance is chance, nobody who is tested was learnt from, findings claim no more."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("torch")

import featstore as fs
from featstore.errors import BadRequest, MissingFeature
from featstore_zoo import learners, probe, targets

SPEAKERS, SONGS, FRAMES = 5, 5, 40


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    """Songs of five singers. `who` is the label as one-hot, `net` noise with the melody in it, `turned` the same
    rotated, `flat` a constant."""
    store = fs.create(tmp_path_factory.mktemp("known") / "known.zarr")
    drawn = np.random.default_rng(0)
    turn = np.linalg.qr(drawn.standard_normal((6, 6)))[0].astype(np.float32)
    with store.writer() as writer:
        for name, kind in (("f0", "f0"), ("net", "continuous"), ("turned", "continuous"), ("flat", "continuous")):
            writer.declare(name, fs.Spec(made_by="own", version=1, frame_rate=probe.RATE, kind=kind,
                                         centre_s=Fraction(1, 2 * probe.RATE)))  # as the study's own grid
        writer.declare("who", fs.Spec(made_by="own", version=1, kind="global"))
        for number in range(SPEAKERS * SONGS):
            singer, key = number % SPEAKERS, f"s{number % SPEAKERS}/{number // SPEAKERS}"
            writer.utterance({"key": key, "speaker": f"s{singer}", "duration_s": FRAMES / probe.RATE},
                             seconds=FRAMES / probe.RATE)
            octaves = drawn.random(FRAMES)
            voiced = drawn.random(FRAMES) < 0.7
            net = drawn.standard_normal((FRAMES, 6)).astype(np.float32)
            net[:, 0] = np.where(voiced, octaves, -1)
            writer.write(key, "f0", np.where(voiced, 100 * 2**octaves, 0).astype(np.float32))
            writer.write(key, "net", net)
            writer.write(key, "turned", net @ turn)
            writer.write(key, "flat", np.full((FRAMES, 2), 3, np.float32))
            writer.write(key, "who", np.eye(SPEAKERS, dtype=np.float32)[singer])
    return store


@pytest.fixture(scope="module")
def study(known: fs.Store) -> probe.Study:
    return probe.study(known, ["who", "f0", "net", "turned", "flat", "net+who"], probes=["linear"])


def test_the_label_itself_is_always_right_and_a_constant_is_at_chance_everywhere(study: probe.Study) -> None:
    assert study.of("speaker", "who").value == 1
    assert study.of("f0", "f0").value > 0.9999 and study.of("voicing", "f0").value == 1
    for target in study.targets:
        for name in ("flat", probe.CONTROL):
            result = study.of(target.name, name)
            assert result.value == pytest.approx(target.chance, abs=1e-6), target.name
            assert result.low <= target.chance + 1e-6 and result.high >= target.chance - 1e-6


def test_rotated_copies_know_the_same(study: probe.Study) -> None:
    assert study.of("f0", "net").value > 0.99
    for target in ("f0", "voicing"):
        assert study.of(target, "turned").value == pytest.approx(study.of(target, "net").value, abs=5e-3)


def test_findings_claim_what_intervals_bear_out(study: probe.Study) -> None:
    speaker, f0 = (next(said for said, target in zip(study.findings, study.targets, strict=True)
                        if target.name == name) for name in ("speaker", "f0"))
    assert "who comes first with 100.0 % [100.0, 100.0]; chance is 20.0 %" in speaker
    assert "net+who cannot be told from it" in speaker and "flat" in speaker.partition("from chance")[0]
    assert "net+who shows no gain over net" in f0 or "net+who loses" in f0
    assert study.skipped["energy"].endswith("-f energy") and "`clean`" in study.skipped["robustness"]


def test_the_same_seed_gives_the_same_study(known: fs.Store, study: probe.Study) -> None:
    again = probe.study(known, ["net"], probes=["linear"])
    assert again.of("f0", "net").draws.tobytes() == study.of("f0", "net").draws.tobytes()


def test_no_unit_is_learnt_from_and_tested() -> None:
    target = targets.Target("f0", "", "r2", "frames", np.arange(60), np.zeros(60), np.repeat(np.arange(12), 5), "x", 0)
    folds = target.folds(None, [], np.zeros(0), seed=3)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(60))
    assert not any(set(target.units[learn]) & set(target.units[test]) for learn, test in folds)


def test_a_split_decides_who_is_learnt_from(known: fs.Store) -> None:
    if "by-singer" not in known.splits:
        fs.split(known, "by-singer", by="speaker", test=40)
    found = probe.study(known, ["net"], split="by-singer", probes=["linear"])
    assert "speakers are in train and test of the split by-singer" in found.skipped["speaker"]
    assert found.of("f0", "net").value > 0.99
    with pytest.raises(BadRequest, match="has no split 'main'"):
        probe.study(known, ["net"], split="main")


def test_a_noisy_copy_belongs_to_its_clean_recording() -> None:
    keys = ["p1/a", "p1_noisy/a", "noisy_set/b", "clean_set/b", "p2/a", "p3_noisy/a", "own"]
    found = [fs.StoredUtterance(key, speaker=key.partition("/")[0], duration_s=1 + 0.2 * (key == "p2/a"),
                                extra={"clean": "p2/a"} if key == "own" else {}) for key in keys]
    labels = targets.labels_of(found)
    assert labels.twins == [(0, 1), (3, 2)]  # p2/a is longer than what names it
    assert labels.speakers[1] == "p1" and labels.recordings[0] == labels.recordings[1]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    """Four singers, each with noisy copies. `voice` is who sings; `room` too, by other channels in noisy copies."""
    store = fs.create(tmp_path_factory.mktemp("rooms") / "rooms.zarr")
    with store.writer() as writer:
        for name in ("voice", "room"):
            writer.declare(name, fs.Spec(made_by="own", version=1, kind="global"))
        for singer, song, noisy in product(range(4), range(5), (0, 1)):
            key = f"s{singer}{'_noisy' * noisy}/{song}"
            writer.utterance({"key": key, "speaker": f"s{singer}", "duration_s": 1.0}, seconds=1.0)
            writer.write(key, "voice", np.eye(4, dtype=np.float32)[singer])
            writer.write(key, "room", np.eye(8, dtype=np.float32)[4 * noisy + singer])
    return store


def test_a_feature_that_knows_rooms_is_found_out_in_another_one(rooms: fs.Store) -> None:
    study = probe.study(rooms, ["voice", "room"], probes=["linear"])
    assert study.of("speaker", "voice").value == study.of("speaker", "room").value == 1
    assert study.of("speaker across", "voice").value == 1
    assert study.of("speaker across", "room").value < 0.5  # a guess: all it hears there is new to it


def test_who_is_asked_in_one_condition_was_learnt_from_in_others(rooms: fs.Store) -> None:
    utterances = [rooms.utterances[key] for key in rooms.utterances]
    target = targets.speaker_across(utterances, targets.labels_of(utterances))
    assert isinstance(target, targets.Target) and target.held is not None
    folds = target.folds(None, [], np.zeros(0), seed=0)
    assert sorted(np.concatenate([test for _, test in folds]).tolist()) == list(range(40))
    for learn, test in folds:
        assert not set(target.units[learn]) & set(target.units[test])
        assert not set(target.held[learn]) & set(target.held[test])


def test_what_few_voices_say_of_many_frames_is_not_believed() -> None:
    drawn = np.random.default_rng(0)
    voices = drawn.standard_normal((16, 64)).astype(np.float32)  # a vector of each voice, which says nothing of values
    units, values = np.repeat(np.arange(16), 100), drawn.standard_normal(16).repeat(100) + drawn.standard_normal(1600)
    found = learners.regress("linear", voices[units], values, units, drawn.standard_normal((50, 64)), 0)
    assert np.abs(found - values.mean()).mean() < 0.2


def test_text_is_compared_in_plain_letters() -> None:
    assert targets.plain_text(" It\N{RIGHT SINGLE QUOTATION MARK}s -- ＯＫ, Brian!") == "it's ok brian"
    assert learners.edits("kitten", "sitting") == 3 and learners.edits("", "abc") == 3


@pytest.mark.slow
def test_ctc_reads_what_frames_say_outright(one_thread: None) -> None:
    drawn = np.random.default_rng(1)
    texts = ["".join(drawn.choice(list("abc"), 3)) for _ in range(12)]
    said = [np.repeat(np.eye(4, dtype=np.float32)[[n for c in text for n in ("abc".index(c), 3)]], 2, axis=0)
            for text in texts]
    assert learners.transcribe("linear", said, texts, said[:3], 0) == texts[:3]


def test_what_cannot_be_probed_is_said(known: fs.Store) -> None:
    with pytest.raises(MissingFeature, match="no feature 'whisper'"):
        probe.study(known, ["net+whisper"])
    with pytest.raises(BadRequest, match="always there as a control"):
        probe.study(known, ["constant"])
    with pytest.raises(BadRequest, match=r"no target 'speakers' .*speaker.*: expected some of speaker, speaker across"):
        probe.study(known, ["net"], targeted=["speakers"])
    with pytest.raises(BadRequest, match=r"has answers for nothing that is asked \(robustness: .*`clean`"):
        probe.study(known, ["net"], targeted=["robustness"])


def test_only_what_is_targeted_is_asked(known: fs.Store, study: probe.Study) -> None:
    some = probe.study(known, study.features, targeted=["robustness", "f0"], probes=["linear"])
    assert [target.name for target in some.targets] == ["f0"] and set(some.skipped) == {"robustness"}
    for name in study.features:
        assert some.of("f0", name).value == study.of("f0", name).value


@pytest.mark.slow
def test_of_recordings_f0_knows_the_melody_and_the_embedding_more_of_speakers_than_f0(shared: Path,
                                                                                      tmp_path: Path) -> None:
    from click.testing import CliRunner

    from featstore_cli import cli
    from featstore_extractors import parse

    with (shared / "audio" / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["speaker"].startswith(("vctk", "berklee", "fsdd_t"))]
    chosen = [row for row in rows if float(row["duration_s"]) < 4][:48]
    manifest = tmp_path / "some.jsonl"
    manifest.write_text("".join(json.dumps({
        "key": f"{row['speaker']}/{row['utterance']}", "path": str(shared / "audio" / row["path"]), "text": row["text"],
        "speaker": row["speaker"], "condition": row["condition"]}) + "\n" for row in chosen))
    store = fs.create(tmp_path / "some.zarr")
    assert not fs.extract(fs.corpus(manifest), store, parse("log-mel", "f0:dio", "energy", "speaker"),
                          workers=0).failures
    done = CliRunner().invoke(cli, ["probe", str(store.path), "-f", "log-mel", "-f", "f0", "-f", "speaker",
                                    "-f", "log-mel+f0", "-o", str(tmp_path / "report")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "report" / "probe.json").read_text())
    value = {(r["target"], r["features"], r["probe"]): r for r in found["results"]}
    for name in ("f0", "constant"):  # not log-mel: its means tell these speakers apart as well, see docs/probes.md
        assert value["speaker", "speaker", "linear"]["value"] > value["speaker", name, "linear"]["value"]
    assert all(value["f0", "f0", p]["value"] > 0.98 > value["f0", "log-mel", p]["value"] for p in learners.PROBES)
    for target, facts in found["targets"].items():
        control = value[target, "constant", "none" if target == "robustness" else "linear"]
        assert control["low"] <= facts["chance"] + 0.02 and control["high"] >= facts["chance"] - 0.02, target
    assert (tmp_path / "report" / "probe.png").stat().st_size > 10_000
    assert "<svg" in (tmp_path / "report" / "index.html").read_text()
