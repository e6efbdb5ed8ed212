"""Splits: no song, speaker or recording in two parts; same seed, same parts; kept in the store as they were made."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featstore as fs
from featstore import upkeep
from featstore.errors import BadRequest, CorruptSegment, MissingFeature

PARTS = ("train", "valid", "test")
Record = dict[str, Any]


def store_of(path: Path, records: list[Record]) -> fs.Store:
    """A store of utterances alone: fields of each, and `audio_of`, what tells one recording's bytes from another's."""
    store = fs.create(path)
    add(store, records)
    return store


def add(store: fs.Store, records: list[Record]) -> None:
    with store.writer() as w:
        for record in records:
            fields = {name: value for name, value in record.items() if name != "audio_of"}
            source = sha256(str(record.get("audio_of", record["key"])).encode()).digest()
            w.utterance({"duration_s": 1.0} | fields, source=source, seconds=record.get("duration_s", 1.0))


def songs(speakers: int = 6, each: int = 5, takes: int = 4) -> list[Record]:
    noise = np.random.default_rng(0)
    return [{"key": f"s{s}/{song}_{take}", "speaker": f"s{s}", "extra": {"song": f"s{s}-{song}"},
             "duration_s": float(noise.uniform(2, 12))}
            for s in range(speakers) for song in range(each) for take in range(takes)]


def parts_of(store: fs.Store, name: str) -> dict[str, str]:
    """The part of each utterance that is in one."""
    keys = list(store.utterances)
    return {key: PARTS[place] for key, place in zip(keys, store.splits[name].places(keys), strict=True) if place >= 0}


records = st.lists(st.builds(
    lambda speaker, song, file, cut, seconds, audio: {"speaker": f"s{speaker}", "song": song, "file": file, "cut": cut,
                                                      "duration_s": seconds, "audio_of": audio},
    st.integers(0, 5), st.one_of(st.none(), st.integers(0, 8)), st.integers(0, 12), st.integers(0, 3),
    st.floats(0.1, 300), st.one_of(st.none(), st.integers(0, 30))), min_size=1, max_size=40)


@given(records, st.sampled_from(["song", "speaker", "utterance"]), st.integers(0, 2**64 - 1), st.integers(1, 45))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_that_must_stay_whole_is_in_two_parts(tmp_path_factory: pytest.TempPathFactory, rows: list[Record],
                                                      by: str, seed: int, percent: int) -> None:
    utterances = [{"key": f"u{i}", "speaker": row["speaker"], "audio": f"{row['file']}.wav", "root": "/corpus",
                   "start_s": float(row["cut"]), "end_s": row["cut"] + 1.0, "duration_s": row["duration_s"],
                   "audio_of": f"u{i}" if row["audio_of"] is None else row["audio_of"]}
                  | ({"extra": {"song": f"song{row['song']}"}} if row["song"] is not None else {})
                  for i, row in enumerate(rows)]
    store = store_of(tmp_path_factory.mktemp("split") / "s.zarr", utterances)
    try:
        made = fs.split(store, "main", by=by, valid=percent, test=percent, seed=seed)  # type: ignore[arg-type]
    except BadRequest as refused:
        assert "too few" in str(refused)
        return
    part = parts_of(store, "main")
    assert set(part) == {u["key"] for u in utterances} and set(part.values()) == set(PARTS)
    assert {name: sum(p == name for p in part.values()) for name in PARTS} == {
        name: found.utterances for name, found in made.parts.items()}
    songless = {u["audio"] for u in utterances if "extra" not in u}
    labels: dict[Any, set[str]] = {}
    for u in utterances:
        labels.setdefault(("audio", u["audio_of"]), set()).add(part[u["key"]])
        if by == "speaker":
            labels.setdefault(u["speaker"], set()).add(part[u["key"]])
        elif by == "song":
            if "extra" in u:
                labels.setdefault(u["extra"]["song"], set()).add(part[u["key"]])
            if u["audio"] in songless:
                labels.setdefault(("recording", u["audio"]), set()).add(part[u["key"]])
    assert all(len(found) == 1 for found in labels.values())


def test_parts_have_the_duration_asked_for_as_near_as_groups_allow(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    by_song = fs.split(store, "song", by="song", valid=10, test="10%")
    longest = 4 * 12 / (store.utterances.hours * 3600)
    for part in ("valid", "test"):
        assert abs(by_song.shares[part] - 0.1) <= longest / 2
    by_utterance = fs.split(store, "utterance", by="utterance", valid=10, test=10)
    assert by_utterance.shares["valid"] == pytest.approx(0.1, abs=0.01)
    assert by_utterance.parts["valid"].groups == by_utterance.parts["valid"].utterances
    assert sum(by_utterance.shares.values()) == pytest.approx(1)


def test_without_durations_shares_are_of_utterances(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", [{"key": str(number), "duration_s": 0.0} for number in range(10)])
    assert fs.split(store, "main", by="utterance", valid=20).shares == {"train": 0.8, "valid": 0.2, "test": 0.0}


def test_parts_depend_on_the_seed_and_not_on_the_order_of_insertion(tmp_path: Path) -> None:
    rows = songs()
    one, other = store_of(tmp_path / "a.zarr", rows), store_of(tmp_path / "b.zarr", rows[::-1][:50])
    add(other, rows[::-1][50:])
    for store in (one, other):
        fs.split(store, "main", by="song", valid=10, test=10, seed=3)
        fs.split(store, "again", by="song", valid=10, test=10, seed=3)
        fs.split(store, "else", by="song", valid=10, test=10, seed=4)
    assert parts_of(one, "main") == parts_of(other, "main") == parts_of(one, "again") != parts_of(one, "else")


def test_utterances_added_later_are_in_no_part_and_removed_ones_drop_out(tmp_path: Path) -> None:
    rows = songs()
    store = store_of(tmp_path / "s.zarr", rows[:100])
    fs.split(store, "main", by="song", valid=20)
    before = parts_of(store, "main")
    add(store, rows[100:])
    assert len(store.utterances) == 120 and parts_of(store, "main") == before
    gone = [key for key, part in before.items() if part == "valid"][:3]
    upkeep.remove(store, utterances=gone)
    assert parts_of(fs.open(store.path), "main") == {key: part for key, part in before.items() if key not in gone}


def test_a_view_takes_a_part(tmp_path: Path) -> None:
    rows = songs()
    store = store_of(tmp_path / "s.zarr", rows)
    with store.writer() as w:
        w.declare("x", fs.Spec(made_by="noise", version=1, frame_rate=100, kind="continuous"))
        for row in rows:
            w.write(row["key"], "x", np.zeros(int(row["duration_s"] * 100), np.float32))
    fs.split(store, "main", by="speaker", valid=20, test=20)
    part = parts_of(store, "main")
    views = {name: list(store.view(["x"], like="x", split=f"main/{name}")) for name in PARTS}
    assert {key: name for name, keys in views.items() for key in keys} == part
    assert views["train"] == [key for key in store.utterances if part[key] == "train"]
    some = list(reversed(views["valid"][:3])) + views["train"][:2]
    assert list(store.view(["x"], like="x", utterances=some, split="main/valid")) == some[:3]
    with pytest.raises(BadRequest, match=r"no split 'mian' \(it has: main\).*featstore split .* main --by song"):
        store.view(["x"], like="x", split="mian/train")
    with pytest.raises(BadRequest, match=r"such as main/train \(main has: train, valid, test\)"):
        store.view(["x"], like="x", split="main")
    with pytest.raises(BadRequest, match="main/test has none of the 2 utterances"):
        store.view(["x"], like="x", utterances=views["train"][:2], split="main/test")
    with store.writer() as w:
        w.delete(views["train"][0], "x")
    with pytest.raises(MissingFeature, match="lacks x for 1 of"):
        store.view(["x"], like="x", split="main/train")
    assert len(store.view(["x"], like="x", split="main/valid")) == len(views["valid"])


def test_what_is_unknown_is_said_with_a_way_out(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", [{"key": "a"}, {"key": "b", "speaker": "x"}, {"key": "c", "kind": "speech"}])
    with pytest.raises(BadRequest, match=r"2 of 3 utterances have no speaker, such as a.*--pattern.*--by utterance"):
        fs.split(store, "main", by="speaker", valid=10)
    with pytest.raises(BadRequest, match=r"2 of 3 utterances have no field song and are no cuts of a longer recording, "
                                         r"such as a: .*--pattern.*--by speaker.*--by utterance"):
        fs.split(store, "main", by="song", valid=10)


def test_cuts_of_one_recording_are_one_song(tmp_path: Path) -> None:
    rows = [{"key": f"{file}-{cut}", "audio": f"{file}.wav", "root": "/c", "start_s": 5.0 * cut, "end_s": 5.0 * cut + 5}
            for file in "abcdef" for cut in range(4)]
    store = store_of(tmp_path / "s.zarr", rows)
    made = fs.split(store, "main", by="song", valid=20, test=20)
    assert {name: (found.utterances, found.groups) for name, found in made.parts.items()} == {
        "train": (16, 4), "valid": (4, 1), "test": (4, 1)}
    assert {len({part for key, part in parts_of(store, "main").items() if key[0] == file}) for file in "abcdef"} == {1}


def test_a_part_that_would_be_empty_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs(speakers=2))
    with pytest.raises(BadRequest, match="has 2 groups by speaker, too few for train, valid, test: each part"):
        fs.split(store, "main", by="speaker", valid=1, test=1)
    made = fs.split(store, "main", by="speaker", valid=1)
    assert made.parts["valid"].groups == 1 and made.parts["test"].utterances == 0
    assert repr(made).startswith("<Split main by speaker: train 20 (") and repr(made).endswith("test 0 (0.0%)>")
    with pytest.raises(BadRequest, match="has no utterances to split"):
        fs.split(fs.create(tmp_path / "empty.zarr"), "main", by="speaker", valid=1)


@pytest.mark.parametrize(("asked", "message"), [
    ({"valid": 0}, "expected something for valid or test"),
    ({"valid": 60, "test": 40}, "something left to train on"),
    ({"valid": -1}, "valid=-1: expected percent of the duration, from 0"),
    ({"test": "many"}, "test='many': expected percent of the duration, such as 5%"),
    ({"valid": 5, "by": "mood"}, "by='mood': expected one of song, speaker, utterance"),
    ({"valid": 5, "name": "Main!"}, "cannot be a split's name"),
    ({"valid": 5, "seed": -1}, "seed=-1: expected 0 or more"),
])
def test_requests_that_make_no_sense_are_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    store = store_of(tmp_path / "s.zarr", songs(speakers=2, each=2))
    with pytest.raises(BadRequest, match=message):
        fs.split(store, asked.pop("name", "main"), **{"by": "song"} | asked)
    assert not (store.path / "splits").exists()


def test_a_name_is_given_once(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    late = fs.open(store.path)
    assert late.splits == {}
    fs.split(store, "main", by="song", valid=10)
    before = parts_of(store, "main")
    for handle in (store, late):  # `late` looked before the other made it
        with pytest.raises(BadRequest, match=r"has a split 'main' already.*such as main-2"):
            fs.split(handle, "main", by="speaker", valid=10)
    assert parts_of(fs.open(store.path), "main") == before and list(late.splits) == ["main"]


def test_what_has_no_document_is_no_split(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    fs.split(store, "main", by="song", valid=10)
    (store.path / "splits" / "main" / "zarr.json").unlink()  # as a writer leaves it that was killed before its commit
    assert fs.open(store.path).splits == {}
    fs.split(fs.open(store.path), "main", by="speaker", valid=20)
    assert fs.open(store.path).splits["main"].by == "speaker"


def test_zarr_reads_a_split_and_no_name_is_in_it(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    made = fs.split(store, "main", by="speaker", valid=20, test=20)
    group = zarr.open_group(store.path / "splits" / "main" / made.folder.name, mode="r")
    assert np.bincount(group["parts"][:]).tolist() == [found.utterances for found in made.parts.values()]
    assert group["hashes"].shape == (120, 2) and group["hashes"].dtype == np.uint64
    told = b"".join(path.read_bytes() for path in (store.path / "splits").rglob("*") if path.is_file())
    assert not any(name.encode() in told for name in ("s3/", '"s3"', "s3-"))


def test_a_damaged_split_is_not_read(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    made = fs.split(store, "main", by="song", valid=10)
    leaf = made.folder / "parts" / "c" / "0"
    data = bytearray(leaf.read_bytes())
    data[5] ^= 1
    leaf.write_bytes(data)
    with pytest.raises(CorruptSegment, match=r"its bytes changed since.*Remove the folder .*splits/main and make"):
        parts_of(fs.open(store.path), "main")


def test_copy_takes_splits_along(tmp_path: Path) -> None:
    store = store_of(tmp_path / "s.zarr", songs())
    fs.split(store, "main", by="song", valid=10, test=10)
    for _ in range(2):
        upkeep.copy(store, tmp_path / "t.zarr")
    assert parts_of(fs.open(tmp_path / "t.zarr"), "main") == parts_of(store, "main")
    assert fs.open(tmp_path / "t.zarr").splits["main"].parts == store.splits["main"].parts
