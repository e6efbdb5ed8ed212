"""Listening tests: orders are balanced, pages give nothing away, careless listeners are named, intervals are honest."""

from __future__ import annotations

import http.client
import json
import shutil
import threading
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner

pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from featstore.errors import BadRequest
from featstore_cli import cli
from featstore_zoo import listen
from featstore_zoo.listen_server import Server

SYSTEMS, UTTERANCES = ("old-one", "new-one", "plain-one"), 7


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("heard")
    drawn = np.random.default_rng(0)
    for system in SYSTEMS:
        (home / system).mkdir()
        for number in range(UTTERANCES):
            sf.write(home / system / f"song-{number}.wav", drawn.uniform(-0.1, 0.1, 1600), 16000)
    return {system: home / system for system in SYSTEMS}


@pytest.fixture(scope="module")
def test_folder(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("test") / "test"
    listen.make(folders, out, target=folders["plain-one"] / "song-0.wav", listeners=6, seed=4)
    return out


def asked(folder: Path) -> Any:
    text = (folder / "index.html").read_text()
    begin = text.index('type="application/json">') + len('type="application/json">')
    return json.loads(text[begin:text.index("</script>", begin)])


def answers(folder: Path, listener: int, *, careless: bool = False, up: float = 0) -> bytes:
    """What a listener saves who hears `new-one` a point above the others."""
    key, test = listen.read_key(folder), asked(folder)
    given = []
    for part in test["orders"][listener - 1]:
        for trial in part["trials"]:
            sound = trial["sounds"][-1]
            better = key["sounds"].get(sound, {}).get("system") == "new-one"
            value = key["checks"][sound] % 4 + 1 if careless and sound in key["checks"] else key["checks"].get(
                sound, round(2 + better + up))
            given.append({"task": part["task"], "sound": sound, "value": value})
    return json.dumps({"test": test["test"], "listener": listener, "answers": given}).encode()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_in_a_williams_square_all_places_and_neighbours_come_equally_often(count: int) -> None:
    rows = listen.williams(count)
    assert all(sorted(row) == list(range(count)) for row in rows)
    assert len({Counter(column)[0] for column in zip(*rows, strict=True)}) == 1
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert len(follows) == count * (count - 1) and len(set(follows.values())) <= 1


def test_listeners_hear_each_utterance_once_and_all_together_every_system(test_folder: Path) -> None:
    key, test = listen.read_key(test_folder), asked(test_folder)
    for task in range(2):
        heard = []
        for order in test["orders"]:
            own = [key["sounds"][t["sounds"][-1]] for t in order[task]["trials"] if "check" not in t]
            assert sorted(one["utterance"] for one in own) == [f"song-{n}" for n in range(UTTERANCES)]
            counts = Counter(one["system"] for one in own)
            assert max(counts.values()) - min(counts.values()) <= 1
            heard += [(one["utterance"], one["system"]) for one in own]
        assert set(Counter(heard).values()) == {2} and len(set(heard)) == UTTERANCES * len(SYSTEMS)  # of six listeners
    assert all(any("check" in t for t in part["trials"]) for order in test["orders"] for part in order)
    assert len({json.dumps(order) for order in test["orders"]}) == 6


def test_the_page_names_no_system_and_no_utterance_and_comes_out_the_same(test_folder: Path, folders: dict[str, Path],
                                                                         tmp_path: Path) -> None:
    text = (test_folder / "index.html").read_text()
    assert not any(word in text for word in (*SYSTEMS, "song-"))
    listen.make(folders, tmp_path / "again", target=folders["plain-one"] / "song-0.wav", listeners=6, seed=4)
    assert (tmp_path / "again" / "index.html").read_text() == text
    with pytest.raises(BadRequest, match="is there already"):
        listen.make(folders, tmp_path / "again")
    with pytest.raises(BadRequest, match="give its recordings, --target"):
        listen.make(folders, tmp_path / "other", tasks=["similarity"])


def test_the_table_has_means_with_intervals_and_names_who_was_left_out(test_folder: Path, tmp_path: Path) -> None:
    for listener in range(1, 6):
        (tmp_path / f"{listener}.json").write_bytes(answers(test_folder, listener, careless=listener == 5,
                                                            up=0.6 * (listener == 4)))
    (tmp_path / "again.json").write_bytes(answers(test_folder, 1))
    done = CliRunner().invoke(cli, ["listen", "collect", str(test_folder), str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "left out: listener 5: 2 of 2 attention checks missed (5.json)" in done.output
    assert "left out: listener 1 (again.json): answered before" in done.output
    found = {(o.task, o.system): o for o in listen.collect(test_folder, [tmp_path]).opinions}
    new, old = found["naturalness", "new-one"], found["naturalness", "old-one"]
    assert new.mean == pytest.approx(old.mean + 1, abs=0.3) and new.listeners == 4
    assert str(new) == f"{new.mean:.2f} ± {new.half:.2f}" and str(new) in done.output
    assert new.half > 0.2  # one listener of four is a point above the others, on every utterance


def test_an_interval_of_independent_ratings_is_the_usual_one() -> None:
    values = np.random.default_rng(1).normal(3.7, 0.8, 40 * 30)
    listeners, utterances = np.repeat(np.arange(40), 30), np.tile(np.arange(30), 40)
    mean, half = listen.opinion(values, listeners, utterances)
    usual = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert mean == values.mean() and usual * 0.99 < half < 1.5 * usual
    strict = np.random.default_rng(2).normal(0, 0.5, 40)[listeners]
    assert listen.opinion(values + strict, listeners, utterances)[1] > 2.5 * usual  # some are strict: they count as one
    assert np.isnan(listen.opinion(values[:30], listeners[:30], utterances[:30])[1])


def test_what_is_no_answer_to_this_test_is_refused(test_folder: Path) -> None:
    key, good = listen.read_key(test_folder), json.loads(answers(test_folder, 2))
    for change, message in (({"test": "other"}, "answers another test"), ({"answers": 3}, "is not a file that a page"),
                            ({"answers": [{**good["answers"][0], "value": 6}]}, "expected 1 to 5"),
                            ({"answers": [{**good["answers"][0], "sound": "x"}]}, "is not asked")):
        with pytest.raises(BadRequest, match=message):
            listen.answer(key, json.dumps(good | change).encode(), "a.json")
    with pytest.raises(BadRequest, match="is no listening test"):
        listen.read_key(test_folder.parent)


def test_the_server_keeps_answers_and_nothing_else(test_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(test_folder, folder)
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            def ask(method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
                line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
                line.request(method, path, body, headers)
                reply = line.getresponse()
                found = reply.status, reply.read()
                line.close()
                return found

            post = {"Content-Type": "application/json"}
            assert ask("GET", "/") == (200, (folder / "index.html").read_bytes())
            assert ask("GET", "/key.json")[0] == 404 and ask("GET", "/", Host="elsewhere.org:80")[0] == 403
            assert ask("POST", "/answers", answers(folder, 1), **post) == (200, b"kept")
            assert ask("POST", "/answers", b"{}", **post)[0] == 400
            assert ask("GET", "/number")[1] == b"2"
        finally:
            server.shutdown()
            thread.join()
    assert [path.read_bytes() for path in (folder / "answers").iterdir()] == [answers(folder, 1)]
