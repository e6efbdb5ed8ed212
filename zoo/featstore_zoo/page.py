"""Pages of HTML that need nothing beside them: style, script, pictures and sounds are inside, and nothing is fetched.

Texts are escaped; what is HTML already is a `Markup`. Colours follow the reader's light or dark screen, and print.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

Head = str | tuple[str, str]  # of a column, and a finer line below it

INK = "#010203"  # what a figure draws in the colour of the text: no other colour is written so
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by all eyes
SHORT = 8192     # samples: Chromium does not play a FLAC of one block, which has 4096
DPI = 130  # of pictures inside figures
PICTURE = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=\s]+)")


class Cell(NamedTuple):
    """A cell of a table: what is shown, a finer line below, what it is sorted by, and whether it is its column's best.

    title: shown when pointed at: why there is no number.
    """

    text: object
    small: str = ""
    value: float | None = None
    best: bool = False
    title: str = ""


def page(title: str, body: Markup, *, links: Sequence[tuple[str, str]] = (), footer: str = "") -> str:
    """A whole page. links: (text, target) at its head, such as ("Metrics", "#metrics").

    Raises:
        ImportError: without jinja2, naming the extra.
    """
    return _templates().get_template("page.html").render(
        title=title, body=body, links=links, footer=footer, css=own("page.css"), js=own("page.js"),
        version=metadata.version("featstore"))


def render(template: str, **values: object) -> Markup:
    """A template of ours, filled in."""
    return markup(_templates().get_template(template).render(**values))


def markup(html: str) -> Markup:
    """A string that is HTML already."""
    from markupsafe import Markup

    return Markup(html)


def table(heads: Sequence[Head], rows: Iterable[Sequence[object | Cell]], *, name: str,
          caption: str = "", filtered: bool = False) -> Markup:
    """A table that is sorted by its heads.

    rows: of cells, or texts and `Markup`. name: its id on the page.
    filtered: with a field above it in which rows are looked for.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    texts = [all(row[place].value is None for row in cells) for place in range(len(heads))]
    named = [(*((head, "") if isinstance(head, str) else head), text) for head, text in zip(heads, texts, strict=True)]
    return render("table.html", heads=named, rows=cells, name=name, caption=caption, filtered=filtered)


def number(value: float, digits: int = 2) -> str:
    """A number for people; a dash for what is none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def figure(drawn: Figure, alt: str, caption: str = "", *, broad: bool = False) -> Markup:
    """A figure of matplotlib as SVG, in which `INK` is the colour of the text.

    alt: what it shows, in words. broad: on a narrow screen it is scrolled, and not made too small to read.
    """
    from matplotlib import rc_context

    held = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        drawn.savefig(held, format="svg", transparent=True, dpi=DPI, metadata={"Date": None, "Creator": None})
    svg = held.getvalue()
    svg = svg[svg.index("<svg"):].replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    svg = PICTURE.sub(lambda found: _smaller(found[1]), svg)
    return render("figure.html", svg=markup(svg), alt=alt, caption=caption, broad=broad)


def image(pixels: np.ndarray, alt: str, caption: str = "") -> Markup:
    """A picture (height, width, 3) of bytes, the top row first, as PNG."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="PNG", optimize=True)
    return render("figure.html", source=_data(held.getvalue(), "image/png"), alt=alt, caption=caption, broad=False)


def player(wave: np.ndarray, sample_rate: int, label: str, *, small: bool = False) -> Markup:
    """A player of a waveform (N,). small: see `sound`."""
    return markup('<audio controls preload="metadata" aria-label="{}" src="{}"></audio>').format(
        label, sound(wave, sample_rate, small=small))


def sound(wave: np.ndarray, sample_rate: int, *, small: bool = False) -> str:
    """A waveform (N,) as the address of a sound that lies inside the page. small: as Vorbis, a tenth of the bytes, and
    not bit for bit."""
    import soundfile as sf

    held = io.BytesIO()
    form, subtype, kind = ("OGG", "VORBIS", "audio/ogg") if small else ("FLAC", "PCM_16", "audio/flac")
    if not small and len(wave) <= SHORT:
        form, kind = "WAV", "audio/wav"
    sf.write(held, np.clip(wave, -1, 1), sample_rate, format=form, subtype=subtype)
    return _data(held.getvalue(), kind)


def inked() -> dict[Any, Any]:
    """Settings of matplotlib with which all that is not data is drawn in `INK`, without a frame above and right."""
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(parts, INK) | {
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 9,
        "axes.titleweight": "bold", "axes.linewidth": 0.6, "font.family": "sans-serif", "legend.frameon": False}


def _smaller(encoded: str) -> str:
    """A picture inside a figure as WebP, a tenth of the bytes of PNG."""
    from PIL import Image

    held = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(encoded))).save(held, format="WEBP", quality=85)
    return _data(held.getvalue(), "image/webp")


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def own(name: str) -> Markup:
    """A file beside the templates, as it is."""
    return markup((resources.files(__package__) / "templates" / name).read_text("utf-8"))


@cache
def _templates() -> Any:
    try:
        import jinja2
    except ImportError:
        raise ImportError("reports need jinja2: pip install 'featstore[evaluate]'") from None
    return jinja2.Environment(loader=jinja2.PackageLoader(__package__ or "", "templates"), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
