"""The report in a real browser: it fetches nothing, complains of nothing, sorts, filters, plays, and prints."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from metric_pairs import RATE, pair

from featstore_zoo.evaluate import evaluate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two systems, six short utterances, of which one is silent in one of them; with words."""
    pytest.importorskip("pocketsphinx")
    home = tmp_path_factory.mktemp("evaluation")
    one, other = pair("noise")
    for number in range(6):
        part = slice(number * 1600, number * 1600 + 9600)
        silent = number == 3
        waves = {"reference": one[part], "noisy": other[part], "duller": np.convolve(one[part], [.3, .4, .3], "same")}
        for system, wave in waves.items():
            (home / system).mkdir(exist_ok=True)
            sf.write(home / system / f"<b>u{number}.wav", 0 * wave if silent and system == "noisy" else wave, RATE)
    evaluate(home / "reference", {"noisy": home / "noisy", "duller & <i>": home / "duller"}, home / "report",
             recogniser="pocketsphinx")
    return home / "report"


def opened(browser: Any, page: Path) -> Any:
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    return browser


def column(browser: Any, table: str, name: str) -> list[str]:
    """What a column shows, from the top."""
    return browser.execute_script(
        "const t = document.getElementById(arguments[0]);"
        "const c = [...t.tHead.rows[0].cells].findIndex((h) => h.innerText.startsWith(arguments[1]));"
        "return [...t.tBodies[0].rows].map((r) => r.cells[c].dataset.value ?? r.cells[c].innerText)", table, name)


def pressed(browser: Any, table: str, name: str) -> str:
    """Click a head of a table; how it is sorted then."""
    (head,) = [head for head in browser.find_elements("css selector", f"#{table} th") if head.text.startswith(name)]
    button = head.find_element("tag name", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", button)
    button.send_keys("\ue007")  # Enter: the keyboard is enough
    return str(head.get_attribute("aria-sort"))


@pytest.mark.parametrize("name", ["index.html", "utterances/0001.html", "utterances/0004.html"])
def test_a_page_fetches_nothing_and_complains_of_nothing(browser, report, name):
    opened(browser, report / name)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(report / name).as_uri()]


def test_tables_are_sorted_by_keyboard_both_ways_and_what_has_no_value_is_last(browser, report):
    opened(browser, report / "index.html")
    assert pressed(browser, "by-utterance", "MCD") == "ascending"
    values = column(browser, "by-utterance", "MCD")
    numbers = [float(value) for value in values[:-1]]
    assert values[-1] == "nan" and len(values) == 12 and numbers == sorted(numbers)
    assert pressed(browser, "by-utterance", "MCD") == "descending"
    values = column(browser, "by-utterance", "MCD")
    assert values[-1] == "nan" and [float(value) for value in values[:-1]] == sorted(numbers, reverse=True)
    pressed(browser, "by-utterance", "system")
    assert column(browser, "by-utterance", "system") == ["duller & <i>"] * 6 + ["noisy"] * 6


def test_utterances_are_found_and_lead_to_their_pages(browser, report):
    opened(browser, report / "index.html")
    browser.find_element("css selector", "input.filter").send_keys("<b>u5")
    shown = [row for row in browser.find_elements("css selector", "#by-utterance tbody tr") if row.is_displayed()]
    assert len(shown) == 2
    target = shown[0].find_element("tag name", "a").get_attribute("href")
    browser.get(target)
    assert browser.find_element("tag name", "h1").text == "<b>u5"


def test_players_have_sound_pictures_are_drawn_and_texts_are_compared(browser, report):
    opened(browser, report / "utterances" / "0001.html")
    lengths = browser.execute_async_script(
        "const done = arguments[0];"
        "Promise.all([...document.querySelectorAll('audio')].map((a) => a.readyState > 0 ? a.duration :"
        " new Promise((r) => { a.onloadedmetadata = () => r(a.duration); a.load(); }))).then(done)")
    assert lengths == pytest.approx([0.6] * 3, abs=0.01)
    sizes = browser.execute_script("return [...document.querySelectorAll('svg image')].map((i) => i.getBBox().width)")
    assert len(sizes) >= 5 and min(sizes) > 0
    assert "Text" in [head.text for head in browser.find_elements("tag name", "h2")]


def test_a_silent_utterance_says_so(browser, report):
    opened(browser, report / "index.html")
    said = browser.find_element("css selector", "#missing + ul").text
    assert "noisy: the converted recording is silent (1 utterance:" in said


@pytest.mark.parametrize("name", ["index.html", "utterances/0001.html"])
def test_a_page_fits_a_narrow_screen_and_what_is_wider_scrolls_by_itself(browser, report, name):
    opened(browser, report / name)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True})
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360
        widths = browser.execute_script("return [...document.querySelectorAll('.wide')].map((w) => w.scrollWidth)")
        assert max(widths) > 360  # nothing is squeezed until it cannot be read
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_page_says_what_texts_and_tests_rest_on(browser, report):
    opened(browser, report / "index.html")
    said = browser.find_element("tag name", "body").text
    assert "what the recogniser heard, with its own errors, in every reference" in said
    assert "of so few (6) it comes out too narrow" in said and "no p-value can be below" not in said
    opened(browser, report / "utterances" / "0001.html")
    assert "Reference, as heard" in browser.find_element("tag name", "body").text


def test_a_page_follows_a_dark_screen_and_prints(browser, report):
    opened(browser, report / "index.html")
    seen = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia",
                                {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        seen.append(browser.execute_script(
            "const of = (q) => getComputedStyle(document.querySelector(q));"
            "return [of('html').backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"))
    assert seen[0] == ["rgb(255, 255, 255)", "rgb(28, 31, 35)"] and seen[1] == ["rgb(21, 24, 28)", "rgb(230, 232, 235)"]
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})
    assert len(base64.b64decode(printed["data"])) > 20_000
