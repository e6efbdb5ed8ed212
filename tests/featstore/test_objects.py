"""Stores under URLs: the same code as in folders, against an S3 server, one that fails, and others."""

from __future__ import annotations

import asyncio
import inspect
import multiprocessing
import os
import pickle
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from corpora import make_corpus
from object_server import Proxy, make_bucket, moto, web
from toys import Mean, Total

import featstore as fs
from featstore import cache, clients, errors, objects, storage, upkeep
from featstore.compact import compact
from featstore.pack import pack
from featstore.verify import verify
from featstore_cli import cli

KEY, SECRET = "AKIDNOTTOBESEEN", "s3cr3t/NotToBeSeen+"
NET = fs.Spec(made_by="net", version=1, frame_rate=Fraction(50), kind="continuous", dtype="float16", dim=64)
FLAT = fs.Spec(made_by="flat", version=1, frame_rate=Fraction(100), kind="continuous")

pytest.importorskip("obstore", reason="pip install 'featstore[s3]'")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A server with an empty bucket at `server.bucket`; the environment says how to reach it."""
    yield from serve(None, monkeypatch)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    pytest.importorskip("moto", reason="moto[server] is the S3 server of these tests")
    with moto() as found:
        yield found


@pytest.fixture
def other_s3(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """As `s3`, with a server that others wrote behind it."""
    yield from serve(port, monkeypatch)


def serve(port: int | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(clients, "RETRIES", 4)
    monkeypatch.setattr(clients, "SETTLE_S", 0.05)
    for name in [name for name in os.environ if name.startswith(("AWS_", "FEATSTORE_CACHE"))]:
        monkeypatch.delenv(name)
    with Proxy(port) as server:
        bucket = f"b{os.urandom(6).hex()}"
        make_bucket(server.url, bucket)
        server.bucket = f"s3://{bucket}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        forget()
        yield server
        forget()


def forget() -> None:
    """Whatever this process knows of servers."""
    clients._clients.clear()
    clients._honoured.clear()
    objects.documents.clear()
    objects.surroundings.clear()


def numbers(key: str, frames: int = 100) -> np.ndarray:
    return np.random.default_rng(len(key) + sum(key.encode())).normal(size=(frames, 64)).astype(np.float16)


def fill(store: fs.Store, keys: list[str], frames: int = 100) -> None:
    with store.writer() as w:
        w.declare("net", NET)
        w.declare("flat", FLAT)
        for key in keys:
            w.utterance({"key": key, "speaker": key[0], "duration_s": frames / 50}, source=key.encode().ljust(32),
                        seconds=frames / 50)
            w.write(key, "net", numbers(key, frames))
            w.write(key, "flat", np.arange(2 * frames, dtype=np.float32))


def contents(store: fs.Store) -> dict[tuple[str, str], bytes]:
    return {(key, name): store[key, name].read(check=True).tobytes() for name in store.features for key in
            store.features[name]}


# ---------------------------------------------------------------- places
def test_what_has_no_scheme_is_a_path_and_a_file_url_names_one(tmp_path: Path) -> None:
    assert storage.place("a/b.zarr") == Path("a/b.zarr") and storage.place(tmp_path) == tmp_path
    assert storage.place((tmp_path / "ä b").as_uri()) == tmp_path / "ä b"
    assert str(storage.place("s3://bucket/a//b/")) == "s3://bucket/a/b"


def test_places_under_urls_behave_as_paths() -> None:
    place = storage.place("s3://bucket/a/b.zarr")
    assert str(place / "c" / "d") == "s3://bucket/a/b.zarr/c/d" and (place / "c").parent == place
    assert place.name == "b.zarr" and str(place.with_name("x")) == "s3://bucket/a/x"
    assert pickle.loads(pickle.dumps(place)) == place and len({place, storage.place("s3://bucket/a/b.zarr")}) == 1
    assert (place / "c").relative_to(place).as_posix() == "c"


@pytest.mark.parametrize("url", ["s3://AKID:hush@bucket/a", "https://me:hush@host/a", "https://host/a?X-Amz-Sig=hush",
                                 "sftp://me:hush@host/a"])
def test_a_url_with_a_secret_in_it_is_refused_and_the_secret_not_told(url: str) -> None:
    with pytest.raises(errors.BadRequest, match="would be seen") as refused:
        fs.open(url)
    assert "hush" not in str(refused.value)


# ---------------------------------------------------------------- reading and writing
def test_a_store_of_objects_holds_what_a_store_in_a_folder_holds(s3: Proxy, tmp_path: Path) -> None:
    stores = [fs.create(tmp_path / "s.zarr"), fs.create(f"{s3.bucket}/deep/s.zarr")]
    for store in stores:
        fill(store, ["a1", "a2", "b1"])
    local, remote = (fs.open(store.path if isinstance(store.path, Path) else str(store.path)) for store in stores)
    assert contents(remote) == contents(local)
    assert repr(remote) == repr(local) and list(remote.utterances) == ["a1", "a2", "b1"]
    assert np.array_equal(remote["a2", "net"][10:20], numbers("a2")[10:20])
    assert dict(remote.utterances) == dict(local.utterances)
    named = {path.relative_to(remote.path).parts[0] for path in remote.path.rglob("*")}
    assert named == {"zarr.json", "utterances", "features"}


def test_the_document_of_a_segment_is_put_last_and_only_where_there_is_none(s3: Proxy) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1"])
    for kind in ("utterances/segments", "net/.*/segments"):
        puts = [(path, headers) for method, path, headers in s3.log
                if method == "PUT" and re.search(rf"{kind}/[0-9a-f]+-", path)]
        assert re.search(r"-[0-9a-f]{12}/zarr.json$", puts[-1][0]) and puts[-1][1]["if-none-match"] == "*"
        assert len(puts) == 7 and puts[-1][0] not in [path for path, _ in puts[:-1]]


def test_what_is_not_committed_is_not_seen_and_goes_with_purge(s3: Proxy) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    fill(store, ["a1"])
    s3.refuse, s3.after = r"PUT .*/features/net/.*/segments/[0-9a-f]{16}-[0-9a-f]{12}/zarr.json", 0
    with pytest.raises(errors.RemoteError, match="permission was refused"):
        fill(store, ["a2"])
    s3.refuse = ""
    again = fs.open(f"{s3.bucket}/s.zarr")
    assert "a2" not in again.features["net"] and "a2" in again.utterances
    found = verify(again)
    assert found.damages == [] and found.uncommitted == 1 and found.uncommitted_bytes > 12_000
    assert upkeep.purge(again) == 0  # it may belong to a writer that is alive
    assert upkeep.purge(again, grace_s=0) == found.uncommitted_bytes
    assert verify(again).uncommitted == 0 and contents(fs.open(again.path))


def test_staging_leaves_nothing_behind(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1"])
    assert list(tmp_path.iterdir()) == []


def test_a_batch_is_one_request_for_each_crop_and_feature(s3: Proxy) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), [f"a{i}" for i in range(8)], frames=2000)
    view = fs.open(f"{s3.bucket}/s.zarr").view(["net", "flat"], like="net")
    items = [(f"a{i}", 100 * i) for i in range(8)]
    view.read_batch(items, frames=50)
    s3.log.clear()
    batch = view.read_batch(items, frames=50)
    assert [method for method, _, _ in s3.log] == ["GET"] * len(s3.log) and len(s3.log) <= 16
    assert len([path for path in s3.asked("GET") if "/net/" in path]) == 8
    for row, (key, start) in enumerate(items):
        assert np.array_equal(batch["net"][row], numbers(key, 2000)[start:start + 50])
    spans = [re.findall(r"\d+", headers["range"]) for _, path, headers in s3.log if "/net/" in path]
    assert sum(int(stop) + 1 - int(start) for start, stop in spans) == batch["net"].nbytes  # and not a byte more


def test_the_first_batch_checks_shards_with_its_frames(s3: Proxy) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1", "a2"], frames=2000)
    view = fs.open(f"{s3.bucket}/s.zarr").view(["net"], like="net")
    s3.log.clear()
    view.read_batch([("a1", 0), ("a2", 1000)], frames=50)
    assert len(s3.asked("GET", "/frames/c/")) == 3 and s3.asked("HEAD") == []


def test_many_utterances_are_listed_with_few_requests(s3: Proxy) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), [f"a{i:03d}" for i in range(200)], frames=2)
    store = fs.open(f"{s3.bucket}/s.zarr")
    s3.log.clear()
    assert {utterance.speaker for utterance in store.utterances.values()} == {"a"}
    assert len(s3.log) < 10


def test_a_batch_can_be_read_inside_a_running_loop(s3: Proxy) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1", "a2"])
    view = fs.open(f"{s3.bucket}/s.zarr").view(["net"], like="net")

    async def cell() -> np.ndarray:
        return view.read_batch([("a1", 0), ("a2", 0)], frames=10)["net"]

    assert np.array_equal(asyncio.run(cell())[1], numbers("a2")[:10])


def test_features_are_extracted_into_objects_and_a_second_run_does_nothing(s3: Proxy, tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(f"{s3.bucket}/s.zarr")
    first = fs.extract(corpus, store, {"mean": Mean(), "total": Total()}, workers=0)
    assert (first.done, first.failures, first.ok) == (6, [], True)
    local = fs.create(tmp_path / "s.zarr")
    fs.extract(corpus, local, {"mean": Mean(), "total": Total()}, workers=0)
    assert contents(fs.open(f"{s3.bucket}/s.zarr")) == contents(local)
    s3.log.clear()
    assert fs.extract(corpus, fs.open(store.path), {"mean": Mean(), "total": Total()}, workers=0).fresh == 6
    assert s3.asked("PUT") == []


def test_what_failed_is_remembered_beside_the_store(s3: Proxy, tmp_path: Path) -> None:
    wavs = make_corpus(tmp_path / "wavs")
    (wavs / "spk0" / "bad.wav").write_bytes(b"no audio")
    store = fs.create(f"{s3.bucket}/s.zarr")
    report = fs.extract(fs.corpus(wavs), store, {"mean": Mean()}, workers=0)
    assert [failure.utterance for failure in report.failures] == ["spk0/bad"] == [
        failure.utterance for failure in fs.failures(fs.open(store.path))]
    assert storage.place(f"{s3.bucket}/s.zarr.failures.jsonl").is_file()


# ---------------------------------------------------------------- servers that fail
def test_a_server_that_fails_for_good_stops_the_run_and_the_same_call_goes_on(s3: Proxy, tmp_path: Path) -> None:
    corpus, store = fs.corpus(make_corpus(tmp_path / "wavs")), fs.create(f"{s3.bucket}/s.zarr")
    s3.refuse, s3.after = "PUT .*/features/mean/.*/frames/c/", 2
    with pytest.raises(errors.RemoteError, match="permission was refused"):
        fs.extract(corpus, store, {"mean": Mean()}, workers=0, commit_every_s=1e-9)
    s3.refuse = ""
    assert fs.failures(fs.open(store.path)) == []  # no recording is at fault
    report = fs.extract(corpus, fs.open(store.path), {"mean": Mean()}, workers=0)
    assert report.ok and report.done >= 1 and len(fs.open(store.path).features["mean"]) == 6


@pytest.mark.slow
def test_one_request_in_ten_may_fail_and_bodies_may_break_off(s3: Proxy, tmp_path: Path) -> None:
    s3.fail_every, s3.cut_every = 10, 7
    store = fs.create(f"{s3.bucket}/s.zarr")
    fs.extract(fs.corpus(make_corpus(tmp_path / "wavs")), store, {"mean": Mean()}, workers=0)
    fill(store, [f"a{i}" for i in range(6)], frames=500)
    assert len(fs.open(store.path).features["mean"]) == 6
    view = fs.open(store.path).view(["net"], like="net", utterances=[f"a{i}" for i in range(6)])
    for start in range(0, 400, 100):
        batch = view.read_batch([(f"a{i}", start) for i in range(6)], frames=64)["net"]
        assert all(np.array_equal(batch[i], numbers(f"a{i}", 500)[start:start + 64]) for i in range(6))
    assert verify(fs.open(store.path)).damages == []


def test_a_server_that_ignores_if_none_match_is_named_once(s3: Proxy) -> None:
    s3.ignores_conditions = True
    with pytest.warns(errors.ConditionalPutIgnored, match=f"{s3.bucket} ignores If-None-Match") as told:
        store = fs.create(f"{s3.bucket}/s.zarr")
        fill(store, ["a1"])
    assert len(told) == 1
    other = fs.open(store.path)
    fill(other, ["a2"])
    assert sorted(fs.open(store.path).features["net"]) == ["a1", "a2"]


def test_there_a_name_that_somebody_else_took_is_still_told(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.ignores_conditions = True
    with pytest.warns(errors.ConditionalPutIgnored):
        store = fs.create(f"{s3.bucket}/s.zarr")
    step = storage.place(f"{s3.bucket}/s.zarr/features/x/served/00000001/zarr.json")

    def other(seconds: float) -> None:
        step.put(b'{"by": "the other"}')  # while this one waits to see

    monkeypatch.setattr(clients.time, "sleep", other)
    assert storage.create_document(step, {"by": "this one"}) is False
    assert store.path.is_dir()


def test_an_answer_that_is_lost_does_not_make_a_commit_fail(s3: Proxy) -> None:
    place = storage.place(f"{s3.bucket}/x.json")
    assert place.create(b"{}") and place.create(b"{}")  # the second: the first one's answer never came
    assert not place.create(b"[]") and place.read_bytes() == b"{}"


def wrong_keys(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.refuse, s3.code = ".", "InvalidAccessKeyId"
    return f"{s3.bucket}/s.zarr"


def refused(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.refuse = "."
    return f"{s3.bucket}/s.zarr"


def no_bucket(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    return "s3://no-such-bucket/s.zarr"


def other_region(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.refuse, s3.status, s3.code = ".", 400, "AuthorizationHeaderMalformed"
    return f"{s3.bucket}/s.zarr"


def down(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    return f"{s3.bucket}/s.zarr"


def always_503(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.refuse, s3.status, s3.code = ".", 503, "SlowDown"
    return f"{s3.bucket}/s.zarr"


@pytest.mark.parametrize("trouble, words", [
    (wrong_keys, "does not accept the credentials"), (refused, "permission was refused"),
    (no_bucket, "there is no such bucket"), (other_region, "Set AWS_REGION"), (down, "cannot be reached"),
    (always_503, "answered 503 SlowDown, after several tries")])
def test_an_error_says_what_to_do_and_no_secret(s3: Proxy, monkeypatch: pytest.MonkeyPatch, trouble: Callable[..., str],
                                                words: str) -> None:
    monkeypatch.setattr(clients, "RETRIES", 2)
    url = trouble(s3, monkeypatch)
    for act in (fs.open, fs.create):
        with pytest.raises(errors.RemoteError, match=words) as told:
            act(url)
        text = "".join(traceback.format_exception(told.value)) + repr(told.value)
        assert KEY not in text and SECRET not in text and "Signature" not in text.replace("SignatureDoesNotMatch", "")
    assert KEY not in repr(clients.connect(storage.place(url).base)._store)


def test_no_credentials_is_said(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(clients, "RETRIES", 0)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(errors.RemoteError, match="no credentials were found"):
        fs.open(f"{s3.bucket}/s.zarr")


def test_keys_and_endpoint_may_come_from_a_profile(s3: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {s3.url}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1"])
    signed = s3.log[-1][2]["authorization"]
    assert f"{KEY}/" in signed and "/eu-west-1/" in signed


def test_a_shard_that_is_short_or_gone_is_corrupt_and_repaired(s3: Proxy) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    fill(store, ["a1", "a2"], frames=4000)
    shard = next(path for path in store.features["net"].folder.rglob("*") if "/frames/c/" in str(path))
    data = shard.read_bytes()
    for damaged in (data[:1000], data[:-9] + b"x" * 9):
        shard.put(damaged)
        with pytest.raises(errors.CorruptSegment, match="featstore verify STORE"):
            fs.open(store.path)["a2", "net"][2000:3900]
    assert {damage.utterance for damage in verify(fs.open(store.path)).damages} >= {"a1", "a2"}
    shard.unlink()
    with pytest.raises(errors.CorruptSegment, match="is missing"):
        fs.open(store.path)["a2", "net"][2000:3900]
    again = fs.open(store.path)
    upkeep.repair(again, verify(again), grace_s=0)
    assert verify(fs.open(store.path)).damages == [] and len(fs.open(store.path).features["net"]) == 0
    assert len(fs.open(store.path).features["flat"]) == 2


# ---------------------------------------------------------------- several at once
def test_two_writers_at_once_lose_nothing(s3: Proxy) -> None:
    path = fs.create(f"{s3.bucket}/s.zarr").path
    threads = [threading.Thread(target=lambda name=name: fill(fs.open(path), [f"{name}{i}" for i in range(5)]))
               for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = fs.open(path)
    assert sorted(found.features["net"]) == sorted(found.utterances) == [f"{n}{i}" for n in "ab" for i in range(5)]
    assert verify(found).damages == []


def _read_in_child(store: fs.Store, key: str, pipe: object) -> None:
    found = fs.open(store.path)[key, "net"].read(), store[key, "net"].read()
    pipe.send([array.tobytes() for array in found])  # type: ignore[attr-defined]
    pipe.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_worker_process_reads_after_its_parent_has(s3: Proxy, method: str) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    fill(store, ["a1", "a2"])
    assert len(contents(store)) == 4  # the parent's client is at work before the fork
    context = multiprocessing.get_context(method)
    for _ in range(2):
        here, there = context.Pipe(duplex=False)
        worker = context.Process(target=_read_in_child, args=(store, "a2", there))
        worker.start()
        there.close()
        assert here.poll(60), "the worker hangs"
        assert here.recv() == [numbers("a2").tobytes()] * 2
        worker.join(60)
        assert worker.exitcode == 0
    assert store["a1", "net"].read().tobytes() == numbers("a1").tobytes()


def test_a_store_pickles_as_its_url(s3: Proxy) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    fill(store, ["a1"])
    text = pickle.dumps(store)
    assert KEY.encode() not in text and contents(pickle.loads(text)) == contents(store)


# ---------------------------------------------------------------- copy
def test_a_copy_goes_there_and_back_and_merges(s3: Proxy, tmp_path: Path) -> None:
    local = fs.create(tmp_path / "s.zarr")
    fill(local, ["a1", "a2"])
    assert upkeep.copy(local, f"{s3.bucket}/s.zarr") == 6
    assert upkeep.copy(local, f"{s3.bucket}/s.zarr") == 0
    fill(local, ["a3"])
    assert upkeep.copy(local, f"{s3.bucket}/s.zarr") == 3
    remote = fs.open(f"{s3.bucket}/s.zarr")
    upkeep.copy(remote, tmp_path / "back.zarr")
    assert contents(fs.open(tmp_path / "back.zarr")) == contents(local) == contents(remote)


@pytest.mark.slow
def test_a_copy_that_was_interrupted_goes_on(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featstore.writer.COMMIT_BYTES", 20_000)
    local = fs.create(tmp_path / "s.zarr")
    fill(local, [f"a{i}" for i in range(9)])
    s3.refuse, s3.after = "PUT .*/frames/c/", 5
    with pytest.raises(errors.RemoteError):
        upkeep.copy(local, f"{s3.bucket}/s.zarr")
    s3.refuse = ""
    there = fs.open(f"{s3.bucket}/s.zarr")
    done = sum(map(len, (there.utterances, *there.features.values())))
    assert 0 < done < 27 and verify(there).damages == []
    assert upkeep.copy(local, f"{s3.bucket}/s.zarr") == 27 - done
    assert contents(fs.open(f"{s3.bucket}/s.zarr")) == contents(local)


# ---------------------------------------------------------------- upkeep
@pytest.mark.slow
def test_objects_are_compacted_erased_and_packed(s3: Proxy) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    for number in range(3):
        fill(store, [f"a{number}", f"z{number}"], frames=200)
    before = contents(fs.open(store.path))
    assert compact(fs.open(store.path)).segments_after == 3 and contents(fs.open(store.path)) == before
    upkeep.remove(fs.open(store.path), speaker="a")
    compact(fs.open(store.path), purge=True, grace_s=0)
    left = b"".join(path.read_bytes() for path in store.path.rglob("*"))
    assert numbers("a1", 200).tobytes()[:64] not in left and b'"a1"' not in left
    assert numbers("z1", 200).tobytes()[:64] in left
    pack(fs.open(store.path), "net", "int8")
    pack(fs.open(store.path), "net", "zstd")
    found = fs.open(store.path)
    assert np.array_equal(found["z1", "net"].read(), numbers("z1", 200)) and len(found.features["net-int8"]) == 3
    assert verify(found).damages == []


@pytest.mark.slow
def test_a_loader_reads_in_forked_workers(s3: Proxy) -> None:
    pytest.importorskip("torch")
    from featstore.torch import loader

    fill(fs.create(f"{s3.bucket}/s.zarr"), [f"a{i}" for i in range(8)], frames=300)
    view = fs.open(f"{s3.bucket}/s.zarr").view(["net", "flat"], like="net")
    crops = fs.crops(view, frames=64, batch=4, seed=0)
    batches = loader(crops, workers=2)
    for number, found in zip(range(4), batches, strict=False):
        assert np.array_equal(found["net"].numpy(), crops[number]["net"])


# ---------------------------------------------------------------- the cache
@pytest.fixture
def kept(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSTORE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_was_read_once_is_read_from_the_cache(s3: Proxy, kept: Path) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), [f"a{i}" for i in range(4)], frames=4000)
    view = fs.open(f"{s3.bucket}/s.zarr").view(["net", "flat"], like="net")
    items = [(f"a{i}", 900 * i) for i in range(4)]
    first = view.read_batch(items, frames=500)
    forget()
    s3.log.clear()
    again = fs.open(f"{s3.bucket}/s.zarr").view(["net", "flat"], like="net").read_batch(items, frames=500)
    assert s3.asked("GET", "segments/[0-9a-f]{16}-") == []  # listings and names are asked for: they change
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(np.array_equal(again["net"][i], numbers(key, 4000)[at:at + 500]) for i, (key, at) in enumerate(items))


def test_a_damaged_file_of_the_cache_is_fetched_again(s3: Proxy, kept: Path) -> None:
    fill(fs.create(f"{s3.bucket}/s.zarr"), ["a1"], frames=4000)
    before = contents(fs.open(f"{s3.bucket}/s.zarr"))
    for number, path in enumerate(sorted(path for path in kept.rglob("*") if path.is_file())):
        data = path.read_bytes()
        path.write_bytes([b"", data[:-1], bytes([data[0] ^ 1]) + data[1:], data[:5]][number % 4])
    forget()
    assert contents(fs.open(f"{s3.bucket}/s.zarr")) == before


def test_the_cache_stays_below_its_limit(s3: Proxy, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 2_000_000
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", str(limit))
    fill(fs.create(f"{s3.bucket}/s.zarr"), [f"a{i}" for i in range(8)], frames=4000)
    store = fs.open(f"{s3.bucket}/s.zarr")
    for key in store.utterances:
        store[key, "net"].read()
        assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) <= limit
    assert sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) > limit // 2


def test_what_was_used_least_recently_goes_first(tmp_path: Path) -> None:
    folder = cache.Folder(tmp_path, 20_000)
    for number in range(15):
        folder.put(str(number), bytes(1000))
    for path in tmp_path.rglob("*"):
        os.utime(path, (1, 1))
    assert folder.get("3") is not None  # which says that it was used
    for number in range(15, 25):
        folder.put(str(number), bytes(1000))
    there = {number for number in range(25) if folder.get(str(number)) is not None}
    assert 3 in there and 24 in there and len(there) < 20


def test_verify_looks_at_the_server_and_not_at_the_cache(s3: Proxy, kept: Path) -> None:
    store = fs.create(f"{s3.bucket}/s.zarr")
    fill(store, ["a1"], frames=4000)
    contents(fs.open(store.path))
    shard = next(path for path in store.features["net"].folder.rglob("*") if "/frames/c/" in str(path))
    data = bytearray(storage.place(str(shard)).read_bytes())
    data[100] ^= 1
    shard.put(bytes(data))
    assert [damage.utterance for damage in verify(fs.open(store.path)).damages] == ["a1"]


def test_a_limit_that_is_no_number_is_refused(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATSTORE_CACHE_BYTES", "20GB")
    with pytest.raises(errors.BadRequest, match="FEATSTORE_CACHE_BYTES='20GB': expected a number of bytes"):
        cache.whole("x", lambda: b"x")


# ---------------------------------------------------------------- other places
@pytest.mark.parametrize("scheme", ["memory", "local"])
def test_memory_and_what_fsspec_opens_hold_stores_too(scheme: str, tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}/s.zarr" if scheme == "memory" else f"local://{tmp_path}/s.zarr"
    store = fs.create(url)
    fill(store, ["a1", "a2"])
    upkeep.remove(store, utterances=["a1"])
    found = fs.open(url)
    assert list(found.utterances) == ["a2"] and np.array_equal(found["a2", "net"].read(), numbers("a2"))
    view = found.view(["net", "flat"], like="net")
    assert np.array_equal(view.read_batch([("a2", 3), ("a2", 50)], frames=20)["net"][1], numbers("a2")[50:70])
    assert verify(found).damages == [] and upkeep.purge(found, grace_s=0) >= 0
    with pytest.raises(errors.NotAStore, match="exists already"):
        fs.create(url)
    with pytest.raises(errors.NotAStore, match="does not exist"):
        fs.open(f"{url}x")


def test_a_scheme_that_nobody_knows_is_refused() -> None:
    with pytest.raises(errors.MissingPackage, match="fsspec cannot open such places"):
        fs.open("nowhere://a/b.zarr")


def test_a_store_on_a_web_server_is_read_and_not_written(tmp_path: Path) -> None:
    fill(fs.create(tmp_path / "s.zarr"), ["a1", "a2"])
    with web(tmp_path) as url:
        store = fs.open(f"{url}/s.zarr")
        assert contents(store) == contents(fs.open(tmp_path / "s.zarr"))
        with pytest.raises(errors.RemoteError, match="a web server is for reading"):
            fill(store, ["a3"])


def test_a_web_server_that_shows_no_folders_is_refused(tmp_path: Path) -> None:
    fill(fs.create(tmp_path / "s.zarr"), ["a1"])
    with web(tmp_path, lists=False) as url, pytest.raises(errors.RemoteError, match="does not show what is in this"):
        fs.open(f"{url}/s.zarr")


# ---------------------------------------------------------------- the commands
@pytest.mark.slow
def test_the_commands_take_urls(s3: Proxy, tmp_path: Path) -> None:
    def run(*words: object, status: int = 0) -> str:
        done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == status, done.output
        assert KEY not in done.output and SECRET not in done.output
        return done.output

    wavs, url = make_corpus(tmp_path / "wavs"), f"{s3.bucket}/s.zarr"
    assert "6 utterances" in run("extract", wavs, url, "-f", "toys.Mean", "-f", "energy", "--workers", 0)
    assert "Nothing to do" in run("extract", wavs, url, "-f", "toys.Mean", "--workers", 0)
    assert "mean@" in run("info", url) and "spk0/u000" in run("ls", url, "mean")
    assert "fresh" in run("status", wavs, url) and "fresh" in run("why", url, "spk0/u000", "mean")
    assert "rows copied to s3://" in run("copy", url, f"{s3.bucket}/t.zarr")
    run("split", url, "main", "--by", "utterance", "--valid", "20%", "--test", "20%")
    run("export", url, "-f", "mean", "-o", tmp_path / "npy")
    run("import", tmp_path / "npy", f"{s3.bucket}/t.zarr", "--layout", "npy", "-f", "mean", "--replace")
    run("plot", url, "spk0/u000", "-o", tmp_path / "a.png")
    run("verify", url)
    run("rm", url, "--utterance", "spk0/u000")
    run("verify", url, "--repair", "--grace", 0)
    assert "5 utterances" in run("info", url)
    name = next(word for word in run("info", url).split() if word.startswith("mean@"))
    run("use", url, name)
    assert "would be seen" in run("info", "s3://a:b@c/d", status=2)


# ---------------------------------------------------------------- and against the server that others wrote
@pytest.mark.slow
@pytest.mark.parametrize("fact", [
    test_a_store_of_objects_holds_what_a_store_in_a_folder_holds, test_a_batch_is_one_request_for_each_crop_and_feature,
    test_the_document_of_a_segment_is_put_last_and_only_where_there_is_none,
    test_what_is_not_committed_is_not_seen_and_goes_with_purge, test_two_writers_at_once_lose_nothing,
    test_one_request_in_ten_may_fail_and_bodies_may_break_off, test_a_copy_that_was_interrupted_goes_on,
    test_a_server_that_ignores_if_none_match_is_named_once, test_a_shard_that_is_short_or_gone_is_corrupt_and_repaired],
    ids=lambda fact: fact.__name__)
def test_it_holds_against_moto(fact: Callable[..., None], other_s3: Proxy, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"s3": other_s3, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
    fact(**{name: given[name] for name in inspect.signature(fact).parameters})
