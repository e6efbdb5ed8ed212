"""Commands about corpora and stores: scan extract status why use info ls plot split verify rm compact copy export
import."""

from __future__ import annotations

import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import cli, display
from .request import (
    PlaceType,
    all_requests,
    extractors_of,
    json_option,
    names_option,
    open_store,
    requests_option,
    specs_of,
    ways_out,
)

if TYPE_CHECKING:
    from featstore import Extractor, Feature, Plan, Report, Spec, Split, Store, StoredUtterance
    from featstore.storage import Place

STORE = click.argument("store", type=PlaceType())
CORPUS = click.argument("corpus", type=click.Path(path_type=Path, exists=True))
GRACE_H = 24.0


@cli.command()
@CORPUS
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="JSONL file to write.")
@click.option("--pattern", help="Fields from each path: '{speaker}/{song}_*'.")
@click.option("--speaker", help="Speaker of every utterance; fields are filled in.")
@click.option("--key", help="Key of every utterance: '{speaker}/{utterance}'.")
@click.option("--slice", "slice_s", type=float, metavar="SECONDS", help="Cut at silences into rows of 3 s to this.")
def scan(corpus: Path, out: Path, pattern: str | None, speaker: str | None, key: str | None,
         slice_s: float | None) -> None:
    """List the utterances of CORPUS in a JSONL file that the other commands take.

    CORPUS is a folder of recordings, a .csv or .jsonl manifest, a Kaldi data folder or a lhotse manifest.

    \b
    Example: featstore scan wavs/ -o corpus.jsonl --pattern '{speaker}/{song}_*'
    """
    import featstore as fs
    from featstore.corpus import write

    if not out.absolute().parent.is_dir():
        raise click.UsageError(f"the folder {out.parent} does not exist; make it first")
    found = fs.corpus(corpus, pattern=pattern, speaker=speaker, key=key, slice_s=slice_s)
    write(found, out)
    speakers = len({u.speaker for u in found if u.speaker})
    display.say(f"{len(found):,} utterances, {speakers:,} speakers: {out}")
    for problem in found.problems:
        click.echo(display.visible(f"  left out: {problem.path}: {problem.reason}"), err=True)
    if found.problems:
        raise click.exceptions.Exit(1)


@cli.command()
@CORPUS
@STORE
@requests_option(required=True)
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--replace", is_flag=True, help="Let names that stand for other settings stand for these.")
@click.option("--shard", metavar="I/N", help="Extract the I-th of N parts, I from 1: one per task of a job array.")
@click.option("--engine", type=click.Choice(["local", "ray", "ray:local"]), default="local", show_default=True,
              help="This machine, the Ray cluster that runs, or Ray here.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE",
              help="Where encoders run: cpu, cuda, cuda:0,1 (both share the work), mps.")
@click.option("--workers", type=click.IntRange(0), help="Processes.  [default: one per core, or as memory allows]")
@click.option("--commit-every", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True,
              metavar="SECONDS", help="What a killed run loses at most.")
@click.option("--allow-failures", default="0", show_default=True, metavar="N|P%",
              help="Recordings that may fail with exit status 0 still.")
@click.option("--strict", is_flag=True, help="Stop at the first failure.")
@click.option("--rehash", is_flag=True, help="Do not trust files' sizes and times.")
@json_option
def extract(corpus: Path, store: Place, requests: tuple[str, ...], recipe: Path | None, only_plan: bool, replace: bool,
            shard: str | None, engine: str, device: str, workers: int | None, commit_every: float, allow_failures: str,
            strict: bool, rehash: bool, as_json: bool) -> None:
    """Extract features of CORPUS into STORE; what is fresh is skipped.

    \b
    Example: featstore extract wavs/ songs.zarr -f log-mel -f f0 -f mel44=log-mel:44k-128
    """
    import featstore as fs
    from featstore.devices import names_of
    from featstore.extract import allowance
    from featstore.shares import shard as part
    from featstore.shares import shard_named
    from featstore.store import open_or_create

    share = shard_named(shard) if shard is not None else None
    extractors = extractors_of(requests, recipe)
    if not extractors:
        raise click.UsageError("nothing to extract: give -f REQUEST, such as -f log-mel -f f0, or -r RECIPE")
    names_of(device)
    found = fs.corpus(corpus)
    allowance(allow_failures, len(found))
    opened = None if not store.exists() else fs.open(store) if only_plan else open_or_create(store)
    specs = specs_of(extractors, download=not only_plan)  # what is missing is said before a store is made
    try:
        if only_plan:
            found = found if share is None else part(found, *share)
            _say_plan(fs.plan(found, opened, specs, replace=replace, rehash=rehash), as_json)
            return
        with display.ExtractProgress() as progress:
            report = fs.extract(found, opened or open_or_create(store), extractors, replace=replace, device=device,
                                workers=workers, commit_every_s=commit_every, allow_failures=allow_failures,
                                strict=strict, rehash=rehash, shard=share, engine=engine, progress=progress)
    except fs.errors.IdentityMismatch as refused:
        texts = zip(all_requests(requests, recipe), extractors.values(), strict=True)
        asked = dict(zip(extractors, texts, strict=True))
        raise fs.errors.IdentityMismatch(ways_out(refused, fs.open(store), asked)) from None
    _say_report(report, store, as_json)
    if report.interrupted:
        raise click.exceptions.Exit(130)
    if not report.ok:
        raise click.exceptions.Exit(1)


@cli.command()
@CORPUS
@STORE
@requests_option(required=False)
@click.option("--rehash", is_flag=True, help="Do not trust files' sizes and times.")
@json_option
def status(corpus: Path, store: Place, requests: tuple[str, ...], recipe: Path | None, rehash: bool,
           as_json: bool) -> None:
    """How much of STORE is up to date with CORPUS. Exit status 1 if not all is fresh.

    \b
    Example: featstore status wavs/ songs.zarr
    """
    import featstore as fs

    opened = open_store(store)
    asked: dict[str, Any] = dict(specs_of(extractors_of(requests, recipe), download=False))
    wanted = asked or {name: feature.spec for name, feature in opened.features.items()}
    plan = fs.plan(fs.corpus(corpus), opened, wanted, rehash=rehash, failures=fs.failures(opened), refuse=False)
    rows = [_status_row(item, plan.utterances) for item in plan.features.values()]
    if as_json:
        heads = ("feature", "fresh", "stale", "missing", "failed", "imported")
        display.say_json({"utterances": plan.utterances, "orphans": plan.orphans,
                          "features": [dict(zip(heads, row[:6], strict=True)) for row in rows]})
    else:
        display.table([[*row[:1], *(f"{n:,}" for n in row[1:6]), row[6]] for row in rows],
                      ["feature", "fresh", "stale", "missing", "failed", "imported", "why"])
        if plan.orphans:
            display.say(f"{len(plan.orphans):,} utterances of the store are not in the corpus, such as "
                        f"{display.visible(plan.orphans[0])}")
    if any(item.todo and not item.imported for item in plan.features.values()) or not plan.features:
        raise click.exceptions.Exit(1)


@cli.command()
@STORE
@click.argument("utterance")
@click.argument("feature")
@requests_option(required=False)
@click.option("--like", metavar="NAME", help="Say what a frame is made of when aligned to the frames of NAME.")
@click.option("--frame", type=click.IntRange(0), help="Which frame of NAME's grid.  [default: 0]")
@click.option("--timing", type=click.Choice(["edges", "centres"]), help="How frames are aligned.  [default: edges]")
@json_option
def why(store: Place, utterance: str, feature: str, requests: tuple[str, ...], recipe: Path | None, like: str | None,
        frame: int | None, timing: Any, as_json: bool) -> None:
    """Why FEATURE of UTTERANCE is or is not up to date: settings, weights, version, audio. Exit status 1 if it is not.

    Without -f it is compared with what is stored under its name; the recording is read again where it can be found.
    With --like it says instead which stored frames make one frame of an aligned view, and with what weights.

    \b
    Example: featstore why songs.zarr alto1/nino_dios f0 -f f0:dio
             featstore why songs.zarr alto1/nino_dios whisper --like log-mel --frame 100
    """
    if like is not None:
        if requests or recipe is not None:
            raise click.UsageError("--like looks at stored frames, -f and -r at settings: give one of them")
        _say_taps(open_store(store), utterance, feature, like, frame or 0, timing or "edges", as_json)
        return
    if frame is not None or timing is not None:
        raise click.UsageError("--frame and --timing are of the grid that --like NAME gives; give --like as well")
    opened = open_store(store)
    asked = extractors_of(requests, recipe)
    if len(asked) > 1:
        raise click.UsageError("give one -f REQUEST: what FEATURE should be made of")
    spec = next(iter(specs_of(asked, download=False).values()), None)
    source, path = _source_now(opened.utterances[utterance])
    found = opened.why(utterance, feature, spec, source)
    if as_json:
        display.say_json(dataclasses.asdict(found) | {"audio": path, "audio_checked": source is not None})
    else:
        display.say(display.visible(f"{utterance} {feature}: {found.state}. {found.reason}"))
        for name, (old, new) in found.differs.items():
            if name != "weights" or spec is None or not spec.weights:
                display.say(f"  {name}: stored {old!r}, now {new!r}")
        if spec is not None and spec.weights:
            file = _weights_file(next(iter(asked.values())))
            display.say(display.visible(_weights_line(opened.feature(feature).spec.weights, spec.weights, file)))
        elif spec is None and (stored := opened.feature(feature).spec.weights):
            display.say(f"{_weights_line(stored, stored, None)} (stored; -f REQUEST compares with those of now)")
        display.say(display.visible(f"  audio {path}: " + ("read again" if source else "not found here, not compared")))
    if found.state not in ("fresh", "imported"):
        raise click.exceptions.Exit(1)


def _say_taps(store: Store, utterance: str, feature: str, like: str, frame: int, timing: Any, as_json: bool) -> None:
    """Which stored frames make one frame of a view."""
    try:
        view = store.view([feature], like=like, timing=timing, utterances=[utterance])
        taps = view.taps(utterance, feature, frame)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if as_json:
        display.say_json({"utterance": utterance, "feature": feature, "like": like, "frame": frame, "timing": timing,
                          "taps": [[source, str(weight)] for source, weight in taps]})
        return
    at = float(view.centre_s + frame / view.rate)
    display.say(display.visible(f"{utterance}: frame {frame} of {like}, centred at {at:.4f} s, by {timing}"))
    if store.feature(feature).kind == "samples":
        display.say(f"  {feature}: samples {taps[0][0]} to {taps[-1][0]}")
        return
    for source, weight in taps:
        display.say(f"  {feature}[{source}] x {weight} ({float(weight):.4f})")
    if not taps:
        display.say(f"  {feature} is one vector for the whole utterance")


@cli.command()
@STORE
@click.argument("feature", metavar="NAME@ID")
def use(store: Place, feature: str) -> None:
    """Let a feature's name stand for another of its identities (`info` lists them).

    \b
    Example: featstore use songs.zarr whisper@3f2a91
    """
    from featstore.store import serve

    opened = open_store(store)
    name, _, prefix = feature.partition("@")
    if not prefix:
        raise click.UsageError(f"{feature}: expected NAME@ID; {store} has {name} as "
                               + ", ".join(f"{name}@{i[:9]}" for i in opened.identities(name)))
    chosen = opened.feature(feature)
    serve(opened.path, name, chosen.short)
    display.say(f"{name} is now {name}@{chosen.label} ({len(chosen):,} utterances)")


@cli.command()
@STORE
@json_option
def info(store: Place, as_json: bool) -> None:
    """What a store holds: features, identities, settings, sizes; splits.

    \b
    Example: featstore info songs.zarr
    """
    opened = open_store(store)
    kept = [opened.feature(f"{name}@{identity}") for name in _names(opened) for identity in opened.identities(name)]
    if as_json:
        display.say_json({"path": str(store), "utterances": len(opened.utterances), "hours": opened.utterances.hours,
                          "speakers": sorted(opened.utterances.speakers()),
                          "features": [_facts(opened, feature) for feature in kept],
                          "splits": [_split_facts(found) for found in opened.splits.values()]})
        return
    display.say(repr(opened))
    display.table([_info_row(opened, feature) for feature in kept],
                  ["feature", "kind", "rate", "dim", "dtype", "utterances", "size", "made by"])
    for found in opened.splits.values():
        parts = ", ".join(f"{part} {it.utterances:,}" for part, it in found.parts.items())
        display.say(f"split {found.name} by {found.by}: {parts}")


@cli.command(name="ls")
@STORE
@click.argument("feature", required=False)
@json_option
def list_rows(store: Place, feature: str | None, as_json: bool) -> None:
    """List the utterances of a store, or those that have FEATURE.

    \b
    Example: featstore ls songs.zarr f0
    """
    opened = open_store(store)
    rows: list[dict[str, Any]] = []
    held = opened.feature(feature) if feature else None
    for key, utterance in opened.utterances.items():
        if held is not None and key not in held:
            continue
        frames = {"frames": held[key].shape[0]} if held is not None else {}
        rows.append({"utterance": key, "speaker": utterance.speaker or "", "seconds": round(utterance.duration_s, 3),
                     **frames, "flags": " ".join(utterance.flags)})
    if as_json:
        display.say_json(rows)
    elif rows:
        display.table([[f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows],
                      list(rows[0]))


@cli.command()
@STORE
@click.argument("utterance")
@names_option("Feature to draw; again for more.  [default: all]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="PNG file to write.")
def plot(store: Place, utterance: str, names: tuple[str, ...], out: Path) -> None:
    """Draw UTTERANCE on one time axis: waveform, log-mel with f0 over it, energy, any feature as an image.

    \b
    Example: featstore plot songs.zarr alto1/nino_dios -o nino.png
    """
    from featstore.plot import plot as draw

    draw(open_store(store), utterance, out, names)
    display.say(str(out))


@cli.command()
@STORE
@click.argument("name")
@click.option("--by", required=True, type=click.Choice(["song", "speaker", "utterance"]), help="What is never divided.")
@click.option("--valid", default="0%", show_default=True, metavar="P%", help="Part of the duration to validate on.")
@click.option("--test", default="0%", show_default=True, metavar="P%", help="Part of the duration to test on.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other parts.")
@json_option
def split(store: Place, name: str, by: str, valid: str, test: str, seed: int, as_json: bool) -> None:
    """Divide the utterances of STORE into train, valid and test, and keep that under NAME; it never changes.

    Songs, speakers and identical recordings stay whole. A song is the field `song` of the corpus; cuts of one recording
    are of one song where they have no such field. What is added later is in no part.

    \b
    Example: featstore split songs.zarr main --by song --valid 5% --test 5%
             store.view(["f0", "log-mel"], like="log-mel", split="main/train")
    """
    import featstore as fs

    made = fs.split(open_store(store), name, by=by, valid=valid, test=test, seed=seed)  # type: ignore[arg-type]
    if as_json:
        display.say_json(_split_facts(made))
        return
    rows = [[part, f"{found.utterances:,}", display.length(found.hours * 3600), f"{made.shares[part]:.1%}",
             f"{found.groups:,}"] for part, found in made.parts.items()]
    display.table(rows, ["part", "utterances", "duration", "share", {"utterance": "groups"}.get(by, f"{by}s")])


@cli.command()
@STORE
@click.option("--repair", is_flag=True, help="Give up what is damaged, so that extract makes it again; free space.")
@click.option("--grace", "grace_h", type=click.FloatRange(0), default=GRACE_H, show_default=True, metavar="HOURS",
              help="Leave alone what is younger: it may belong to a reader or writer.")
@json_option
def verify(store: Place, repair: bool, grace_h: float, as_json: bool) -> None:
    """Check every byte of a store against its checksums. Exit status 1 if something is damaged.

    \b
    Example: featstore verify songs.zarr
    """
    from featstore import upkeep
    from featstore.verify import verify as verify_store

    opened = open_store(store)
    found = verify_store(opened, progress=display.bytes_progress("verify"))
    freed = upkeep.repair(opened, found, grace_s=grace_h * 3600) if repair else 0
    if as_json:
        names = ("feature", "utterance", "segment", "reason")
        display.say_json({"rows": found.rows, "bytes": found.bytes, "freed": freed,
                          "damages": [{n: getattr(damage, n) for n in names} for damage in found.damages]})
    else:
        for damage in found.damages:
            display.say(display.visible(f"damaged: {damage.utterance or damage.segment} {damage.feature}: "
                                        f"{damage.reason}"))
        display.say(f"{found.rows:,} rows, {display.size(found.bytes)} checked, {len(found.damages):,} damaged; "
                    f"{found.replaced + found.uncommitted:,} segments replaced or never committed "
                    f"({display.size(found.replaced_bytes + found.uncommitted_bytes)})")
        if repair:
            display.say(f"{display.size(freed)} freed" + (
                "; what was damaged is given up, extract makes it again" if found.damages else ""))
    if found.damages and not repair:
        raise click.exceptions.Exit(1)


@cli.command()
@STORE
@click.option("-f", "--feature", help="NAME or NAME@ID.")
@click.option("--speaker", help="Every utterance of this speaker, with all features.")
@click.option("--utterance", "utterances", multiple=True, help="An utterance, with all features; again for more.")
def rm(store: Place, feature: str | None, speaker: str | None, utterances: tuple[str, ...]) -> None:
    """Remove a feature, a speaker or utterances. The space is freed by `compact --purge`, a day later.

    For good, once nothing else uses the store (consent withdrawn): featstore compact STORE --purge --grace 0

    \b
    Example: featstore rm songs.zarr -f whisper@3f2a91
    """
    if (feature is not None) + (speaker is not None) + bool(utterances) != 1:
        raise click.UsageError("give one of -f FEATURE, --speaker SPEAKER and --utterance UTTERANCE")
    from featstore import upkeep

    removed = upkeep.remove(open_store(store), feature=feature, speaker=speaker, utterances=utterances)
    failed = f" {removed.failures:,} failures forgotten." if removed.failures else ""
    display.say(f"{removed.rows:,} rows removed.{failed}")
    display.say(f"Their bytes are freed by: featstore compact {store} --purge (what is younger than {GRACE_H:g} h "
                "stays; --grace 0 frees it now, if nothing else uses the store)")


@cli.command()
@STORE
@click.option("--purge", is_flag=True, help="Leave nothing of what cannot answer any more; remove what was replaced.")
@click.option("--grace", "grace_h", type=click.FloatRange(0), default=GRACE_H, show_default=True, metavar="HOURS",
              help="What --purge leaves alone if it is younger. 0 leaves no byte of what was removed, and breaks "
                   "readers and writers at work: stop them first.")
@json_option
def compact(store: Place, purge: bool, grace_h: float, as_json: bool) -> None:
    """Merge the many small segments of a store into few. Readers and writers may be at work.

    What is interrupted goes on with the same command. Exit status 1 if something damaged was left as it is.

    \b
    Example: featstore compact songs.zarr --purge
    """
    from featstore.compact import compact as compact_store

    if not purge and grace_h != GRACE_H:
        raise click.UsageError("--grace says what --purge leaves alone; give --purge as well")
    done = compact_store(open_store(store), purge=purge, grace_s=grace_h * 3600,
                         progress=display.bytes_progress("compact"))
    if as_json:
        names = ("feature", "utterance", "segment", "reason")
        display.say_json({**vars(done), "damages": [{n: getattr(d, n) for n in names} for d in done.damages]})
    else:
        for damage in done.damages:
            display.say(display.visible(f"damaged: {damage.utterance or damage.segment} {damage.feature}: "
                                        f"{damage.reason}"))
        display.say(f"{done.segments_before:,} segments, {display.size(done.bytes_before)}: now "
                    f"{done.segments_after:,}, {display.size(done.bytes_after)}; {display.size(done.copied)} copied, "
                    f"{display.size(done.freed)} freed.")
        if done.waiting:
            display.say(f"{display.size(done.waiting)} were replaced and stay for readers at work; featstore compact "
                        f"{store} --purge frees what is older than {GRACE_H:g} h.")
    if done.damages:
        display.say_error(f"what is damaged was left as it is; featstore verify {store} --repair gives it up")
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("source", type=PlaceType())
@click.argument("destination", type=PlaceType())
@names_option("Feature to copy, NAME or NAME@ID; again for more.  [default: all]")
def copy(source: Place, destination: Place, names: tuple[str, ...]) -> None:
    """Copy features and utterances into a new store, or into one that exists; what is there already is skipped.

    \b
    Example: featstore copy songs.zarr s3://bucket/songs.zarr -f f0 -f log-mel
    """
    from featstore import upkeep

    count = upkeep.copy(open_store(source), destination, names or None, progress=display.bytes_progress("copy"))
    display.say(f"{count:,} rows copied to {destination}")


@cli.command(name="export")
@STORE
@names_option("Feature to export; again for more.  [default: all]")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--layout", type=click.Choice(["npy", "kaldi"]), default="npy", show_default=True)
def export_rows(store: Place, names: tuple[str, ...], out: Path, layout: str) -> None:
    """Write features as .npy files or Kaldi archives.

    \b
    Example: featstore export songs.zarr -f f0 -o features/ --layout npy
    """
    from featstore import exchange

    count = exchange.export_tree(open_store(store), out, layout, names)  # type: ignore[arg-type]
    display.say(f"{count:,} arrays written to {out}")


@cli.command(name="import")
@click.argument("tree", type=click.Path(path_type=Path, exists=True))
@STORE
@click.option("--layout", type=click.Choice(["npy", "kaldi", "amphion"]), required=True)
@names_option("Feature to import; again for more.  [default: all]")
@click.option("--rate", type=Fraction, help="Frames per second: 50, 24000/256.")
@click.option("--kind", type=click.Choice(["continuous", "f0", "discrete", "samples", "global"]), default="continuous",
              show_default=True)
@click.option("--replace", is_flag=True, help="Let names that stand for something else stand for these.")
def import_rows(tree: Path, store: Place, layout: str, names: tuple[str, ...], rate: Fraction | None, kind: str,
                replace: bool) -> None:
    """Take arrays that were made elsewhere into a store; nothing can tell whether they are up to date.

    \b
    Example: featstore import processed/m4singer songs.zarr --layout amphion -f whisper
    """
    import featstore as fs
    from featstore import exchange

    opened = fs.open(store) if store.exists() else fs.create(store)
    done = exchange.import_tree(tree, opened, layout, names, rate=rate, kind=kind,  # type: ignore[arg-type]
                                replace=replace)
    for name, count in done.features.items():
        display.say(f"{name}: {count:,} arrays imported")
    if done.fresh:
        display.say(f"{done.fresh:,} were there already")
    for failure in done.failures:
        click.echo(display.visible(f"  failed: {failure.path}: {failure.reason}"), err=True)
    if done.failures:
        raise click.exceptions.Exit(1)


def _names(store: Store) -> list[str]:
    from featstore.store import feature_names

    return feature_names(store.path)


def _say_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        display.say_json({"utterances": plan.utterances, "hours": plan.hours, "bytes_needed": plan.bytes_needed,
                          "features": {name: {"fresh": item.fresh, "stale": item.stale, "missing": item.missing,
                                              "bytes": item.bytes} for name, item in plan.features.items()}})
        return
    parts = [f"{item.name} {item.todo:,} to do ({display.size(item.bytes)})" if item.todo else f"{item.name} fresh"
             for item in plan.features.values()]
    display.say(f"{plan.utterances:,} utterances; {display.length(plan.hours * 3600)} of audio to do.  "
                + ", ".join(parts) + ".")
    free = f", {display.size(plan.bytes_free)} free" if plan.bytes_free else ""
    display.say(f"{display.size(plan.bytes_needed)} needed{free}. Nothing written.")


def _say_report(report: Report, store: Place, as_json: bool) -> None:
    if as_json:
        display.say_json(dataclasses.asdict(report))
        return
    if report.interrupted:
        display.say(f"Interrupted: {report.fresh + report.done:,} of {report.utterances:,} utterances done and kept. "
                    "The same command goes on from here.")
    elif report.done or report.elsewhere:
        others = f"; {report.elsewhere:,} were done by other processes" if report.elsewhere else ""
        pace = f", {report.elapsed_s / report.audio_s:.3f} x real time" if report.audio_s else ""
        display.say(f"{report.done:,} utterances, {display.length(report.audio_s)} of audio in "
                    f"{display.length(report.elapsed_s)}{pace}; {report.fresh:,} were fresh{others}.")
    else:
        display.say(f"Nothing to do: all {report.fresh:,} utterances are fresh.")
    display.flags(report.flags)
    display.failures(report.failures, f"{store}.failures.jsonl")
    for name in report.to_use:
        display.say(f"Once all shards are done: featstore use {store} {name}")
    if not report.interrupted:
        display.say(repr(open_store(store)))


def _status_row(item: Any, utterances: int) -> tuple[Any, ...]:
    if item.imported:
        return item.name, 0, 0, item.missing, 0, utterances - item.missing, ""
    from featstore.store import brief

    reason = ", ".join(f"{field}={brief(old)!r} (now {brief(new)!r})" for field, (old, new) in item.differs.items())
    return item.name, item.fresh, item.stale, item.missing, item.failed, 0, reason


def _source_now(utterance: StoredUtterance) -> tuple[bytes | None, str]:
    """The digest of an utterance's recording as it is now (None: it cannot be read), and where it was looked for."""
    from featstore import audio, errors

    if utterance.audio is None:
        return None, "(none recorded)"
    path = Path(utterance.root or ".", utterance.audio)
    try:
        return audio.source_digest(audio.file_digest(path), utterance.start_s, utterance.end_s), str(path)
    except errors.BadAudio:
        return None, str(path)


def _weights_line(stored: str | None, now: str, file: Path | None) -> str:
    """Two digests, cut to what tells them apart, and the file that the one is of that would be used now."""
    was, found = (f"{digest[:19]}{'...' * (len(digest) > 19)}" if digest else "none" for digest in (stored, now))
    return f"  weights: {was}" + (f" (stored) is now {found}" if stored != now else "") + (f" ({file})" if file else "")


def _weights_file(extractor: Extractor) -> Path | None:
    """The first file of an extractor's weights, or their folder where it has a layout of its own."""
    from featstore_extractors.weights import tensor_files

    path: Path | None = getattr(extractor, "path", None)
    with contextlib.suppress(OSError, ValueError):
        path = tensor_files(path)[0] if path is not None else None
    return path


def _served(store: Store, feature: Feature) -> bool:
    served = store.features.get(feature.name)
    return served is not None and served.short == feature.short


def _settings(spec: Spec) -> str:
    from featstore.int8 import is_int8
    from featstore.spec import Spec

    if is_int8(spec):
        return f"{spec.made_by} v{spec.version} of {_settings(Spec.from_json(spec.settings['of']))}"
    hidden = ("audio", "window")
    settings = [f"{name}={value}" for name, value in spec.settings.items() if name not in hidden and value != ""]
    weights = [f"weights={spec.weights.removeprefix('sha256:')[:9]}"] if spec.weights else []
    return f"{spec.made_by} v{spec.version} " + " ".join(settings + weights)


def _info_row(store: Store, feature: Feature) -> list[str]:
    rate = f"{float(feature.frame_rate):g} Hz" if feature.frame_rate else "-"
    label = f"{feature.name}@{feature.label}" + ("" if _served(store, feature) else " (kept)")
    return [label, feature.kind, rate, str(feature.dim), _stored_as(feature), f"{len(feature):,}",
            display.size(feature.nbytes), _settings(feature.spec)]


def _stored_as(feature: Feature) -> str:
    codec = "" if feature.codec == "raw" else f" {feature.codec}"
    return f"{feature.stored_dtype}{codec}" + (f" ({feature.dtype})" if feature.stored_dtype != feature.dtype else "")


def _split_facts(split: Split) -> dict[str, Any]:
    return {"name": split.name, "by": split.by, "seed": split.seed, "percent": dict(split.percent),
            "parts": {part: dataclasses.asdict(found) for part, found in split.parts.items()}}


def _facts(store: Store, feature: Feature) -> dict[str, Any]:
    return {"name": feature.name, "identity": feature.identity, "served": _served(store, feature),
            "imported": feature.imported, "utterances": len(feature), "bytes": feature.nbytes, "codec": feature.codec,
            "spec": feature.spec.to_json()}
