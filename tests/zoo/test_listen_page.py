"""The page of a listening test in a real browser, by the keyboard alone."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import soundfile as sf

from featstore_zoo import listen
from featstore_zoo.listen_server import Server

pytestmark = pytest.mark.slow


def press(browser: Any, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def wait_for(browser: Any, script: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 60, 0.05).until(lambda b: b.execute_script(f"return {script}"))


def test_a_listener_answers_by_the_keyboard_and_the_server_has_it(browser: Any, tmp_path: Path) -> None:
    for system, level in (("one", 0.1), ("other", 0.05)):
        (tmp_path / system).mkdir()
        for number in range(2):
            noise = np.random.default_rng(number).uniform(-level, level, 1600)
            sf.write(tmp_path / system / f"{number}.wav", noise, 16000)
    folder = tmp_path / "test"
    listen.make({name: tmp_path / name for name in ("one", "other")}, folder, target=tmp_path / "one" / "0.wav")
    browser.get_log("browser")
    with Server(folder) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            browser.get(server.url)
            wait_for(browser, "document.getElementById('number').value === '1'")
            browser.find_element("id", "number").send_keys("\ue007")
            for trial in range(6):  # two judgements and a check in each part
                wait_for(browser, f"document.getElementById('place').textContent === '{trial + 1} of 6'")
                press(browser, "2")  # nothing: it was not heard yet
                assert not browser.execute_script("return document.querySelector('input:checked') !== null")
                if trial == 3:
                    browser.refresh()  # it goes on where it was
                    wait_for(browser, "document.getElementById('number').value !== ''")
                    browser.execute_script("document.getElementById('number').value = 1")
                    browser.find_element("id", "number").send_keys("\ue007")
                    wait_for(browser, "document.getElementById('place').textContent === '4 of 6'")
                for _ in browser.find_elements("tag name", "audio"):
                    press(browser, " ")
                    wait_for(browser, "[...document.querySelectorAll('audio')].every((a) => a.paused || a.ended)"
                                      " && heard.size > 0")
                wait_for(browser, "!document.getElementById('scale').disabled")
                press(browser, "3")
                press(browser, "\ue007")
            wait_for(browser, "document.getElementById('saved').textContent === 'The answers have arrived.'")
        finally:
            server.shutdown()
            thread.join()
    (file,) = (folder / "answers").iterdir()
    rows = json.loads(file.read_text())["answers"]
    assert [row["value"] for row in rows] == [3] * 6 and all(row["plays"] >= 1 for row in rows)
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
