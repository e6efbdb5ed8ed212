"""Batches: batch i is the same whoever asks, cuts into ranks, is drawn as said, and a position knows its data."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import noise
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featstore as fs
from featstore import upkeep
from featstore.errors import BadRequest, PositionMismatch


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    return noise.make(tmp_path_factory.mktemp("batches") / "s.zarr")


@pytest.fixture(scope="module")
def view(store: fs.Store) -> fs.View:
    return store.view(noise.GRID, like="log-mel")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(one[name].tobytes() == other[name].tobytes() for name in one)


def drawn(batches: fs.Batches, count: int) -> list[tuple[str, int]]:
    return [item for i in range(count) for item in batches.items(i)]


@pytest.mark.parametrize("make", [lambda v: fs.crops(v, frames=64, batch=8, seed=5, balance="speaker"),
                                  lambda v: fs.whole(v, batch_frames=2500, seed=5)])
def test_batch_i_is_the_same_whoever_asks_and_when(store: fs.Store, view: fs.View, tmp_path: Path, make: Any) -> None:
    batches = make(view)
    forward = [batches[i] for i in range(6)]
    upkeep.copy(store, tmp_path / "copy.zarr")
    for other in (make(view), make(fs.open(tmp_path / "copy.zarr").view(noise.GRID, like="log-mel"))):
        assert all(same(other[i], forward[i]) for i in (4, 0, 5, 2, 2, 1, 3))
    assert not same(forward[0], forward[1])
    assert make(view).items(10**12) == batches.items(10**12)


def test_the_numbers_drawn_never_change(view: fs.View) -> None:
    assert fs.crops(view, frames=64, batch=4, seed=7, balance="speaker").items(3) == [
        ("s1/006", 113), ("s3/038", 199), ("s1/006", 15), ("s3/038", 45)]
    assert [key for key, _ in fs.whole(view, batch_frames=2500, seed=7).items(30)] == [
        "s5/029", "s0/045", "s0/020", "s5/011", "s2/052", "s5/041", "s5/059", "s3/018"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_join_to_the_whole_batch(view: fs.View, world: int) -> None:
    for batches in (fs.crops(view, frames=64, batch=8), fs.whole(view, batch_frames=12_000)):
        for i in (0, 1, 7):
            parts = [batches.read(i, rank=rank, world=world) for rank in range(world)]
            assert same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, batches[i])
            items = [item for rank in range(world) for item in batches.items(i, rank=rank, world=world)]
            assert items == batches.items(i)


def test_ranks_that_a_batch_cannot_give_are_refused(view: fs.View) -> None:
    with pytest.raises(BadRequest, match="batch=8 cannot be cut into 3 equal ranks: give a multiple of 3"):
        fs.crops(view, batch=8).read(0, rank=0, world=3)
    with pytest.raises(BadRequest, match=r"some batches have . utterances? only, too few for 8 ranks"):
        fs.whole(view, batch_frames=2500).read(0, rank=0, world=8)
    with pytest.raises(BadRequest, match="rank 2 of 2: expected 0 to 1"):
        fs.crops(view, batch=8).items(0, rank=2, world=2)


def test_a_batch_has_the_crops_of_the_view_with_their_names(view: fs.View) -> None:
    crops = fs.crops(view, frames=64, batch=16)
    batch = crops[3]
    assert batch["log-mel"].shape == (16, 64, 8) and batch["content"].shape == (16, 64, 16)
    assert batch["f0"].shape == (16, 64) and batch["wave"].shape == (16, 64 * noise.HOP)
    assert batch["who"].shape == (16, 4)
    assert batch["content"].dtype == np.float16
    assert crops.speakers == [f"s{i}" for i in range(6)] and crops.utterances == list(view)
    for row, (key, start) in enumerate(crops.items(3)):
        assert crops.utterances[batch["utterance_index"][row]] == key
        assert crops.speakers[batch["speaker_index"][row]] == key.partition("/")[0]
        assert batch["lengths"][row] == min(64, view.length(key) - start)
        for name, array in view.crop(key, start=start, frames=64).items():
            assert array.tobytes() == batch[name][row].tobytes(), name


def test_what_is_shorter_than_a_crop_is_padded_with_the_features_own_value(store: fs.Store) -> None:
    short = [key for key in store.utterances if key.startswith("s5")]
    view = store.view(noise.GRID, like="log-mel", utterances=short)
    batch = fs.crops(view, frames=64, batch=16)[0]
    assert (batch["lengths"] == [view.length(short[i]) for i in batch["utterance_index"]]).all()
    assert batch["lengths"].max() < 50
    for row, length in enumerate(batch["lengths"]):
        assert (batch["log-mel"][row, length:] == np.float32(noise.FLOOR)).all()
        assert not batch["wave"][row, length * noise.HOP:].any() and not batch["f0"][row, length:].any()


def test_every_second_is_as_likely_as_any_other(view: fs.View) -> None:
    frames, count = 64, 20_000
    seen = Counter(key for key, _ in drawn(fs.crops(view, frames=frames, batch=1000), count // 1000))
    weight = np.maximum(view.lengths, frames) / np.maximum(view.lengths, frames).sum()
    expected = dict(zip(view, count * weight, strict=True))
    assert all(abs(seen[key] - n) < 5 * np.sqrt(n) for key, n in expected.items())


def test_crops_begin_anywhere_with_equal_chance_and_never_reach_over_the_end(store: fs.Store) -> None:
    key = max(store.utterances, key=lambda key: len(store[key, "log-mel"]))
    view = store.view(["f0"], like="log-mel", utterances=[key])
    last = view.length(key) - 64
    starts = np.array([start for _, start in drawn(fs.crops(view, frames=64, batch=1000), 20)])
    assert starts.min() <= last * 0.01 and last * 0.99 <= starts.max() <= last
    share = np.histogram(starts, bins=10, range=(0, last + 1))[0] / len(starts)
    assert np.abs(share - 0.1).max() < 0.01
    exact = store.view(["f0"], like="log-mel", utterances=[key])
    assert {start for _, start in drawn(fs.crops(exact, frames=view.length(key), batch=9), 3)} == {0}


def test_balance_makes_the_values_of_a_field_equally_likely(view: fs.View) -> None:
    fields = {"speaker": lambda u: u.speaker, "mood": lambda u: u.extra["mood"], "corpus": lambda u: u.root}

    def share(balance: str, weights: dict[str, float] | None = None) -> dict[str, float]:
        crops = fs.crops(view, frames=64, batch=1000, balance=balance, weights=weights)
        value = {key: fields[balance](utterance) for key, utterance in view.store.utterances.items()}
        found = Counter(value[key] for key, _ in drawn(crops, 12))
        return {name: n / 12_000 for name, n in found.items()}

    assert share("speaker") == pytest.approx({f"s{i}": 1 / 6 for i in range(6)}, abs=0.015)
    assert share("speaker", {"s1": 3, "s5": 0}) == pytest.approx(
        {"s0": 1 / 7, "s1": 3 / 7, "s2": 1 / 7, "s3": 1 / 7, "s4": 1 / 7}, abs=0.015)
    assert share("mood") == pytest.approx({"glad": 0.5, "sad": 0.5}, abs=0.015)
    assert share("corpus") == {"/data/noise": 1}


def test_within_a_group_every_second_is_as_likely_as_any_other(view: fs.View) -> None:
    seen = Counter(key for key, _ in drawn(fs.crops(view, frames=64, batch=1000, balance="speaker"), 24))
    mine = [key for key in view if key.startswith("s0")]
    weight = np.array([max(view.length(key), 64) for key in mine])
    expected = 24_000 / 6 * weight / weight.sum()
    assert all(abs(seen[key] - n) < 5 * np.sqrt(n) for key, n in zip(mine, expected, strict=True))


@pytest.mark.parametrize(("asked", "message"), [
    ({"frames": 0}, "frames=0, batch=32: expected at least one frame"),
    ({"seed": -1}, "seed=-1: expected 0 or more"),
    ({"weights": {"s1": 2}}, "say which, as in balance='speaker'"),
    ({"balance": "speaker", "weights": {"s9": 2}}, r"no utterance has the speaker 's9' \(it has: s0"),
    ({"balance": "speaker", "weights": {"s1": -2}}, "'s1' has -2: expected 0 or more"),
    ({"balance": "speaker", "weights": {f"s{i}": 0 for i in range(6)}}, "all are 0"),
    ({"balance": "moods"}, r"60 of 60 utterances have no moods, such as s0/.* \(it has: mood,"),
])
def test_crops_that_make_no_sense_are_refused(view: fs.View, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        fs.crops(view, **asked)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_utterance_comes_once_an_epoch_under_the_budget(store: fs.Store, data: st.DataObject) -> None:
    keys = data.draw(st.lists(st.sampled_from(list(store.utterances)), min_size=1, unique=True))
    view = store.view(["f0"], like="log-mel", utterances=keys)
    budget = data.draw(st.integers(int(view.lengths.max()), 20_000))
    whole = fs.whole(view, batch_frames=budget, seed=data.draw(st.integers(0, 2**64 - 1)))
    epoch = data.draw(st.integers(0, 1000))
    assert whole.per_epoch is not None
    batches = [whole.items(i) for i in range(epoch * whole.per_epoch, (epoch + 1) * whole.per_epoch)]
    assert sorted(key for items in batches for key, _ in items) == sorted(keys)
    assert all(start == 0 for items in batches for _, start in items)
    assert all(len(items) * max(view.length(key) for key, _ in items) <= budget for items in batches)


def test_epochs_differ_in_company_and_order_and_agree_in_number(view: fs.View) -> None:
    whole = fs.whole(view, batch_frames=4000)
    per_epoch = whole.per_epoch or 0
    epochs = [[frozenset(key for key, _ in whole.items(e * per_epoch + i)) for i in range(per_epoch)] for e in range(3)]
    assert len({frozenset(epoch) for epoch in epochs}) == 3
    padded = [whole.room(i)["f0"].size for i in range(per_epoch)]
    assert view.lengths.sum() / sum(padded) > 0.7
    assert whole[0]["lengths"].max() == whole[0]["f0"].shape[1]


def test_an_utterance_above_the_budget_is_named(view: fs.View) -> None:
    most = int(view.lengths.max())
    with pytest.raises(BadRequest, match=rf"alone has {most:,} frames, more than batch_frames=500 \(.* of 60 "
                                         rf"utterances have\): give batch_frames={most} or more"):
        fs.whole(view, batch_frames=500)


def test_arrays_are_written_over_where_they_are_given(view: fs.View) -> None:
    crops = fs.crops(view, frames=32, batch=4)
    room = crops.room(0)
    assert crops.read(7, out=room) is room and same(room, crops[7])
    assert same(crops.read(8, out=room), crops[8])


def test_a_position_is_saved_as_json_and_goes_on(view: fs.View) -> None:
    crops = fs.crops(view, frames=32, batch=4, seed=2, balance="speaker", weights={"s1": 2})
    saved = json.loads(json.dumps(crops.position(1200)))
    again = fs.crops(view, frames=32, batch=4, seed=2, balance="speaker", weights={"s1": 2})
    assert again.resume(saved) == 1200
    with pytest.raises(PositionMismatch, match=r"the position \(batch 1,200\) is one of other batches: "
                                               r"frames was 32, now 64; seed was 2, now 3; balance was speaker, "
                                               "now None"):
        fs.crops(view, frames=64, batch=4, seed=3).resume(saved)
    with pytest.raises(PositionMismatch, match="of was crops, now whole"):
        fs.whole(view).resume(saved)
    with pytest.raises(BadRequest, match=r"is no position: expected what batches\.position"):
        crops.resume({"batch": 3})


def test_a_position_is_refused_when_the_data_changed(tmp_path: Path) -> None:
    store = noise.make(tmp_path / "s.zarr", count=6)
    saved = fs.crops(store.view(["f0", "content"], like="log-mel")).position(10)
    random = np.random.default_rng(9)

    def resume(**options: Any) -> int:
        return fs.crops(fs.open(store.path).view(["f0", "content"], **{"like": "log-mel"} | options)).resume(saved)

    assert resume() == 10
    with pytest.raises(PositionMismatch, match=r"the grid was 100 Hz by edges, .* now 100 Hz by centres"):
        resume(timing="centres")
    with store.writer() as w:
        noise.add(w, "s1/new", 300, random)
    old = [key for key in store.utterances if key != "s1/new"]
    assert resume(utterances=old) == 10
    with pytest.raises(PositionMismatch, match=r"the utterances was 6 \(.*\), now 7 \("):
        resume()
    with store.writer() as w:
        w.write(old[0], "f0", random.uniform(100, 200, len(store[old[0], "f0"])).astype(np.float32))
    with pytest.raises(PositionMismatch, match=r"batches: f0 was [0-9a-f]{16}, rows .*, now [0-9a-f]{16}, rows \w+\."):
        resume(utterances=old)
