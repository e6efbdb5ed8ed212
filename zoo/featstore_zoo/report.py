"""What `evaluate` found, as pages: a table of means, distributions, comparisons, and a page for each utterance."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from featstore_extractors.signal import LogMel

from . import page, recognition
from .measure import GROUPS, METRICS, TEXT, Job, Measured, Metric, Settings, Signal, curve, language_of
from .page import COLOURS, INK, Cell, number

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .evaluate import Evaluation, Summary

Array = np.ndarray

ARROWS = {"lower": "↓", "higher": "↑"}
STRIPS = 80        # utterances that are drawn as points; more as a shape
RANGE_DB = 80.0    # of a spectrogram
DIFFERENCE_DB = 30.0
LEAST = 6          # utterances: the smallest p of Wilcoxon's test, two-sided, is 2 / 2^n
FEW = 10           # utterances below which a percentile bootstrap is plainly too narrow
COLUMNS = 1200     # of a spectrogram: what a page has across


def index(found: Evaluation) -> str:
    """The page of an evaluation."""
    systems = found.systems
    body = page.render(
        "evaluation.html", lead=_lead(found), means=list(_means(found, "all")),
        groups=[table for by in ("speaker", "condition") if len(_groups(found, by)) > 1 for table in _means(found, by)],
        frechet=_frechet(found) if found.frechet else "",
        plots=[_distribution(found, name) for name in found.settings.names],
        comparison=_comparison(found) if len(systems) > 1 else "", utterances=_utterances(found),
        missing=list(missing(found)), settings=_settings(found), definitions=_definitions(found.settings),
        notes=list(_notes(found)))
    parts = [("Means", "means"), ("Groups", "groups"), ("Fréchet distances", "frechet"),
             ("Distributions", "distributions"), ("Comparison", "comparison"), ("Utterances", "utterances"),
             ("No value", "missing"), ("Method", "method")]
    links = [(text, f"#{name}") for text, name in parts if f'id="{name}"' in body]
    return page.page(f"Evaluation of {_and(systems)}", body, links=links, footer="a click on a head sorts its table")


def utterance(job: Job, settings: Settings, reference: Signal, signals: Mapping[str, Signal],
              paths: Mapping[str, Array | None], found: Sequence[Measured]) -> str:
    """The page of one utterance: players, spectrograms, f0, what was heard, metrics."""
    name, rate = job.pair.name, settings.sample_rate
    sounds = [(system, page.player(made.wave, rate, f"{name}, {system}", small=job.small))
              for system, made in signals.items()]
    language = language_of(job.pair.reference, settings)
    texts = []
    if settings.recogniser is not None:
        text = found[0].text or ""
        known = "Reference, as heard" if "" in job.heard else "Reference"
        texts = [(known, recognition.differences(text, text, language)),
                 *((one.system, recognition.differences(text, one.heard or "", language)) for one in found)]
    body = page.render(
        "utterance.html", speaker=job.pair.reference.speaker, sounds=sounds, texts=texts,
        gap="" if language in recognition.UNSPACED else " ",
        player=page.player(reference.wave, rate, f"{name}, reference", small=job.small),
        picture=page.figure(_spectra(reference, signals, paths), f"Spectrograms of {name}, of what was made of it, "
                            "their differences, and f0 over each other",
                            "Left: log-mel, its own time. Right: difference along the alignment, in the reference's "
                            "time; f0 in the same time.", broad=True), metrics=_values(found, settings))
    return page.page(name, body, links=[("All utterances", "../index.html#utterances")])


def _lead(found: Evaluation) -> str:
    count, systems = len({one.utterance for one in found.measured}), len(found.systems)
    seconds = sum(one.seconds for one in found.measured)
    said = [f"{count:,} utterance{'s' if count > 1 else ''}, {systems} system{'s' if systems > 1 else ''}, "
            f"{f'{seconds / 60:.1f} min' if seconds >= 60 else f'{seconds:.0f} s'} of converted sound."]
    if count > 1:
        said.append("Below each mean is its 95 % interval, from a bootstrap over utterances" +
                    (f"; of so few ({count}) it comes out too narrow." if count < FEW else "."))
    else:
        said.append("One utterance has no interval and no test: a manifest with start_s and end_s cuts a song into "
                    "phrases.")
    if systems > 1:
        said.append("The best value of a column is marked, whether or not the difference is significant.")
    return " ".join(said)


def _means(found: Evaluation, by: str) -> Iterator[Markup]:
    """A table for each group of metrics, a row for each system."""
    rows: dict[tuple[str, str], dict[str, Summary]] = {}
    for one in found.summaries:
        if one.by == by:
            rows.setdefault((one.group, one.system), {})[one.metric] = one
    grouped = by != "all"
    for place, of in enumerate(GROUPS):
        names = [name for name in found.settings.names if METRICS[name].of == of]
        if not names:
            continue
        best = {(group, name): _best([row[name] for (other, _), row in rows.items() if other == group], METRICS[name])
                for group in {group for group, _ in rows} for name in names}
        cells = [[*([group] if grouped else []), system, _count(row.values()),
                  *(_mean(row[name], best[group, name]) for name in names)] for (group, system), row in rows.items()]
        heads = [*_plain(*([by] if grouped else []), "system", "n"), *(_head(METRICS[name]) for name in names)]
        caption = f"{of.capitalize()}, by {by}" if grouped else of.capitalize()
        yield page.table(heads, cells, name=f"means-{by}-{place}", caption=caption)


def _groups(found: Evaluation, by: str) -> set[str]:
    return {one.group for one in found.summaries if one.by == by}


def _plain(*names: str) -> list[page.Head]:
    return list(names)


def _count(row: Iterable[Summary]) -> Cell:
    count = max(one.interval.count + one.missing for one in row)
    return Cell(f"{count:,}", value=count)


def _mean(one: Summary, best: float) -> Cell:
    metric, (mean, low, high, count) = METRICS[one.metric], one.interval
    lacking = f"{one.missing} of {count + one.missing} have no value" if one.missing else ""
    shown = number(mean, metric.digits)
    spans = [part for part in (_span(low, high, metric), f"n = {count}" if one.missing else "") if part]
    return Cell(shown, ", ".join(spans), mean, math.isfinite(best) and shown == number(best, metric.digits),
                lacking)


def _span(low: float, high: float, metric: Metric) -> str:
    return f"{number(low, metric.digits)} to {number(high, metric.digits)}" if math.isfinite(low) else ""


def _best(summaries: Sequence[Summary], metric: Metric) -> float:
    """The best mean of several systems; NaN for one, or where it is nobody's."""
    means = [one.interval.mean for one in summaries if math.isfinite(one.interval.mean)]
    if len(means) < 2 or min(means) == max(means):
        return math.nan
    return min(means) if metric.better == "lower" else max(means)


def _head(metric: Metric) -> tuple[str, str]:
    return f"{metric.label}\N{NO-BREAK SPACE}{ARROWS[metric.better]}", metric.unit or "\N{NO-BREAK SPACE}"


def _frechet(found: Evaluation) -> Markup:
    rows = [[system, *(Cell(number(by[system], 3), value=by[system]) for by in found.frechet.values())]
            for system in found.systems]
    return page.table(["system", *(f"{name} ↓" for name in found.frechet)], rows, name="frechet-distances",
                      caption="Over all vectors of what is compared. Where they are fewer than a few times their "
                      "length it is biased upwards: compare only what has equally many.")


def _comparison(found: Evaluation) -> Markup:
    rows = []
    tested = [one for one in found.comparisons if math.isfinite(one.difference.p)]
    for one in tested:
        metric, gap = METRICS[one.metric], one.difference
        unit = {"%": " points", "": ""}.get(metric.unit, f" {metric.unit}") if math.isfinite(gap.mean) else ""
        sure = gap.corrected < 0.05
        rows.append([Cell(_named(metric)), one.one, one.other,
                     Cell(number(gap.mean, metric.digits) + unit, _span(gap.low, gap.high, metric), gap.mean),
                     Cell(_better(one.one, one.other, gap.mean, metric) if sure else "–"),
                     Cell(_probability(gap.p), value=gap.p),
                     Cell(_probability(gap.corrected), value=gap.corrected, best=sure),
                     Cell(f"{gap.count:,}", value=gap.count)])
    if not rows:
        return page.markup('<p class="note">{}</p>').format("A test needs two utterances that both systems have.")
    caption = ("Paired by utterance: mean difference with its 95 % interval; Wilcoxon's signed-rank test, two-sided, "
               f"corrected after Holm over the {len(tested)} tests of this page. Marked and called better below 0.05.")
    if max(one.difference.count for one in tested) < LEAST:
        caption += f" With fewer than {LEAST} utterances no p-value can be below 0.05."
    return page.table(["metric", "one", "other", "one − other", "better", "p", "p, corrected", "n"], rows,
                      name="comparisons", caption=caption)


def _named(metric: Metric) -> str:
    return metric.label + (f", {metric.unit}" if metric.unit else "")


def _better(one: str, other: str, gap: float, metric: Metric) -> str:
    if not gap or not metric.better:
        return "–"
    return one if (gap < 0) == (metric.better == "lower") else other


def _probability(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _utterances(found: Evaluation) -> Markup:
    names = list(dict.fromkeys(one.utterance for one in found.measured))
    pages = {name: f"utterances/{place + 1:04d}.html" for place, name in enumerate(names)}
    link = page.markup('<a href="{}">{}</a>')
    rows = [[link.format(pages[one.utterance], one.utterance), one.system, *_row(one, found.settings.names)]
            for one in found.measured]
    heads = [*_plain("utterance", "system"), *(_head(METRICS[name]) for name in found.settings.names)]
    return page.table(heads, rows, name="by-utterance", caption="Every utterance; its page has sounds and spectra.",
                      filtered=len(rows) > 10)


def _row(one: Measured, names: Iterable[str]) -> Iterator[Cell]:
    for name in names:
        value = one.values[name]
        yield Cell(number(value, METRICS[name].digits), value=value, title=one.reasons.get(name, ""))


def _values(found: Sequence[Measured], settings: Settings) -> Markup:
    """Metrics of one utterance, a row each."""
    rows = []
    for name in settings.names:
        metric = METRICS[name]
        known = [one.values[name] for one in found if math.isfinite(one.values[name])]
        best = (min(known) if metric.better == "lower" else max(known)) if len(set(known)) > 1 else math.nan
        cells = [Cell(number(one.values[name], metric.digits), one.reasons.get(name, ""), one.values[name],
                      one.values[name] == best) for one in found]
        rows.append([Cell(f"{_named(metric)}\N{NO-BREAK SPACE}{ARROWS[metric.better]}"), *cells])
    return page.table(["metric", *(one.system for one in found)], rows, name="metrics")


def missing(found: Evaluation) -> Iterator[str]:
    """Why values are missing, most often first: a line for each system and reason."""
    counts = Counter((one.system, why) for one in found.measured for why in set(one.reasons.values()))
    for (system, why), count in counts.most_common():
        lacking = {name for one in found.measured if one.system == system
                   for name, reason in one.reasons.items() if reason == why}
        known = [name for name in found.settings.names if name not in TEXT]  # of silence, too, there are words: none
        names = "all metrics" if len(known) > 1 and lacking >= set(known) else \
            ", ".join(sorted({METRICS[name].label for name in lacking}))
        yield f"{system}: {why} ({count:,} utterance{'s' if count > 1 else ''}: {names})"


def _settings(found: Evaluation) -> list[tuple[str, str]]:
    about, settings = found.about, found.settings
    converted = "; ".join(f"{system} = {place}" for system, place in about["converted"].items())
    aligned = {"dtw": "dynamic time warping of mel-cepstra c1 to c24, frames of 5 ms", "none": "by equal times"}
    recordings = [("reference", about["reference"]), ("converted", converted), ("target", about["target"]),
                  ("split", about["split"]), ("pairs", about["pairs"] or "by name")]
    made = [("sample rate", f"{settings.sample_rate} Hz, the lowest of all recordings unless it was given"),
            ("alignment", aligned[settings.align]), ("f0", _extractor(settings.f0)),
            ("speaker embedding", _extractor(settings.speaker)), ("recogniser", settings.recogniser),
            ("errors of text against", _texts(found) if settings.recogniser else ""),
            ("seed of the bootstrap", str(about["seed"]))]
    return [(name, text) for name, text in (*recordings, *made) if text]


def _texts(found: Evaluation) -> str:
    """Against what CER and WER were taken."""
    heard, count = found.about["texts_as_heard"], len({one.utterance for one in found.measured})
    if not heard:
        return "transcripts of the reference"
    where = f"{heard} of {count} references, else transcripts" if heard < count else "every reference"
    return f"what the recogniser heard, with its own errors, in {where}"


def _notes(found: Evaluation) -> Iterator[str]:
    """What a reader of the numbers should know who did not make them."""
    equal = [METRICS[name].label for name in ("stft", "si_sdr", "stoi", "pesq") if name in found.settings.names]
    if equal:
        yield (f"{_and(equal)} compare{'s' if len(equal) == 1 else ''} equal times, which resynthesis and noisy copies "
               "keep: of other takes, and of conversions with a time of their own, the values say little.")


def _extractor(request: str) -> str:
    """What an extractor is, and by which request."""
    known = {"f0:swift": "SwiftF0", "speaker": "d-vector of Resemblyzer", "speaker:wavlm": "x-vector of WavLM"}
    return f"{known[request]}; {request}" if request in known else request


def _definitions(settings: Settings) -> list[tuple[str, str]]:
    return [(_named(METRICS[name]), METRICS[name].says)
            for name in settings.names]


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _distribution(found: Evaluation, name: str) -> Markup:
    """Values of a metric, a line for each system."""
    from matplotlib import rc_context

    metric, systems = METRICS[name], found.systems
    with rc_context(page.inked()):
        drawn = _figure(3.6, 0.62 + 0.36 * len(systems))
        axes = drawn.subplots()
        for place, system in enumerate(systems):
            values = np.array([one.values[name] for one in found.measured if one.system == system])
            _strip(axes, values[np.isfinite(values)], place, COLOURS[place % len(COLOURS)])
            mean, low, high, _ = found.summary(system, name).interval
            if math.isfinite(mean):
                spread = [[max(0.0, mean - low)], [max(0.0, high - mean)]] if math.isfinite(low) else None
                axes.errorbar([mean], [place], xerr=spread, fmt="D", color=INK, markersize=3.5, capsize=3)
        axes.set_yticks(range(len(systems)), systems)
        axes.set_ylim(len(systems) - 0.5, -0.5)
        axes.set_title(_head(metric)[0] + (f" ({metric.unit})" if metric.unit else ""), loc="left", parse_math=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return page.figure(drawn, f"{metric.label} of {_and(systems)}")


def _strip(axes: Axes, values: Array, place: float, colour: str) -> None:
    if len(values) > STRIPS and np.ptp(values) > 0:
        shapes: Any = axes.violinplot(values, [place], orientation="horizontal", widths=0.8, showextrema=False)
        for body in shapes["bodies"]:
            body.set(facecolor=colour, alpha=0.35, edgecolor="none")
        return
    jitter = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.36  # the golden ratio: neighbours far from each other
    axes.plot(values, place + jitter, "o", color=colour, markersize=3.5, alpha=0.6, markeredgewidth=0)


def _spectra(reference: Signal, signals: Mapping[str, Signal], paths: Mapping[str, Array | None]) -> Figure:
    """The reference's log-mel and all f0; below, of each system its log-mel and how it differs."""
    from matplotlib import rc_context

    with rc_context(page.inked()):
        drawn = _figure(11, 2.0 + 1.9 * len(signals))
        axes = drawn.subplots(1 + len(signals), 2, squeeze=False)
        mel = _log_mel(reference)
        top = float(mel.max())
        _image(axes[0, 0], mel, "reference, dB", "magma", (top - RANGE_DB, top), reference.rate)
        _f0(axes[0, 1], reference, signals, paths)
        for row, (system, made) in zip(axes[1:], signals.items(), strict=True):
            own = _log_mel(made)
            _image(row[0], own, f"{system}, dB", "magma", (top - RANGE_DB, top), made.rate)
            pairs = paths[system]
            if pairs is None:
                row[1].set_axis_off()
                continue
            count = min(len(mel), int(pairs[-1, 0]) + 1)
            gap = _warped(own, pairs)[:count] - mel[:count]
            _image(row[1], gap, f"{system} − reference, dB", "RdBu_r", (-DIFFERENCE_DB, DIFFERENCE_DB), made.rate)
        for axis in axes[-1]:
            axis.set_xlabel("seconds")
    return drawn


def _log_mel(signal: Signal) -> Array:
    """(T, 80) in dB every 5 ms."""
    rate = signal.rate
    size = 1 << math.ceil(math.log2(0.04 * rate))
    extractor = LogMel(sample_rate=rate, n_fft=size, win_length=size, hop_length=round(rate / 200), n_mels=80,
                       fmax=min(rate / 2, 12000.0), padding="centre")
    wave = np.pad(signal.wave, (0, max(0, size - len(signal.wave))))
    return extractor.load("cpu")([wave])[0] * (20 / math.log(10))


def _image(axes: Axes, values: Array, title: str, colours: str, span: tuple[float, float], rate: int) -> None:
    """(T, bands) with seconds across; long ones are thinned out to what a page shows."""
    seconds = len(values) * round(rate / 200) / rate
    shown = values[::max(1, len(values) // COLUMNS)]
    drawn = axes.imshow(shown.T, origin="lower", aspect="auto", vmin=span[0], vmax=span[1], cmap=colours,
                        extent=(0, seconds, 0, values.shape[1]), interpolation="nearest")
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_yticks([])
    bar = axes.figure.colorbar(drawn, ax=axes, fraction=0.025, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=2)


def _f0(axes: Axes, reference: Signal, signals: Mapping[str, Signal], paths: Mapping[str, Array | None]) -> None:
    curves = [("reference", reference.f0, INK, 1.6)]
    for place, (system, made) in enumerate(signals.items()):
        if (pairs := paths[system]) is not None:
            curves.append((system, _warped(made.f0, pairs), COLOURS[place % len(COLOURS)], 1.1))
    for name, f0, colour, width in curves:
        axes.plot(np.arange(len(f0)) / 200, np.where(f0 > 0, f0, np.nan), color=colour, linewidth=width, label=name)
    voiced = np.concatenate([f0[f0 > 0] for _, f0, _, _ in curves])
    axes.set_title("f0, Hz", loc="left")
    if len(voiced):
        axes.set_yscale("log", base=2)
        low, high = float(voiced.min()), float(voiced.max())
        marks = [hz for hz in (55, 82.5, 110, 165, 220, 330, 440, 660, 880) if low / 1.3 <= hz <= high * 1.3]
        axes.set_yticks(marks, [f"{hz:g}" for hz in marks])
        axes.minorticks_off()
        axes.set_ylim(low / 1.1, high * 1.1)
    axes.set_xlim(0, len(reference.f0) / 200)
    axes.legend(loc="upper right", bbox_to_anchor=(1, 1.2), ncols=len(curves), fontsize=7, handlelength=1.2)


def _warped(values: Array, pairs: Array) -> Array:
    """A curve or image of a converted recording in the reference's time: of each of its frames the first partner."""
    count = int(pairs[-1, 0]) + 1
    first = np.searchsorted(pairs[:, 0], np.arange(count))
    warped: Array = curve(values, pairs[first], 1)
    return warped

