"""Pages: texts are escaped, nothing is fetched, figures take the colour of the text."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("jinja2")

from featstore_zoo import page

OUTSIDE = re.compile(r"""(?:src|href|action)=["']?(?!data:|\#|index\.html|["'])|url\((?!#)|@import""")


def made() -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(page.inked()):
        drawn = Figure(figsize=(2, 1))
        drawn.subplots().plot([0, 1], color=page.COLOURS[0])
    pixels = np.zeros((4, 6, 3), np.uint8)
    rows = [["<i>", page.Cell("1.00", "0.90 to 1.10", 1.0, best=True)], ["b", page.Cell("–", value=float("nan"))]]
    body = (page.table(["name", ("MCD", "dB, lower is better")], rows, name="t", caption="A & B", filtered=True)
            + page.figure(drawn, "a <line>", "caption") + page.image(pixels, "dark")
            + page.player(np.zeros(1600, np.float32), 16000, "a \"sound\""))
    return page.page("<title> & more", body, links=[("all", "index.html")])


def test_texts_are_escaped_and_nothing_lies_outside():
    text = made()
    assert "&lt;title&gt; &amp; more" in text and "<title> &" not in text
    assert "&lt;i&gt;" in text and "a &lt;line&gt;" in text and "a &#34;sound&#34;" in text
    assert OUTSIDE.findall(text) == []


def test_a_figure_has_the_colour_of_the_text_and_the_same_bytes_each_time():
    assert "currentColor" in made() and page.INK not in made()
    assert made() == made()


def test_what_is_no_number_is_a_dash():
    assert page.number(float("nan")) == "–" and page.number(-1.234, 1) == "−1.2"
