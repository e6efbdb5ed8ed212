"""Model cards: what a run folder's README.md says, made from the run itself, and whether it says all of it.

A card has eight parts: metadata and parameter count; training data with its sources; training configuration and
hardware; evaluation against baselines; usage; a demo; licence; ethics. What training and import know stands in the
run's facts.json; what only a person knows (licence, what the recordings may be used for) is written there by hand, and
a card that lacks it says "not stated" and does not pass `problems`.
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featstore import Store
from featstore.splits import members

from .run import Run

FACTS = "facts.json"
SECTIONS = ("Model", "Training data", "Training configuration", "Evaluation", "Usage", "Demo", "Licence", "Ethics")
UNSAID = "not stated"
PLACEHOLDER = f"*{UNSAID}*"
ETHICS = ("Voices belong to people. Train on recordings, and convert to voices, only with the consent of those who "
          "sing; say of converted recordings that they are; withdraw a voice when its owner asks (`featstore rm STORE "
          "--speaker NAME`, then train without it).")


def facts(run: Run) -> dict[str, Any]:
    """What is known of a run beside its settings: data, hardware, evaluation, licence."""
    path = run.path / FACTS
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def note(run: Run, **more: Any) -> None:
    """Add to what is known of a run."""
    from .run import put_file

    put_file(run.path / FACTS, json.dumps(facts(run) | more, indent=1, ensure_ascii=False).encode())


def data_of(store: Store, keys: list[str]) -> dict[str, Any]:
    """What a card says of the utterances that a run was trained on: how much, by whom, from where, which licences."""
    found = [store.utterances[key] for key in keys]
    licences = Counter(str(u.extra.get("licence", u.extra.get("license", UNSAID))) for u in found)
    sources = Counter(str(u.extra.get("source_repo", Path(u.root).name if u.root else UNSAID)) for u in found)
    return {"utterances": len(found), "hours": round(sum(u.duration_s for u in found) / 3600, 3),
            "speakers": len({u.speaker for u in found}), "languages": sorted({u.language for u in found if u.language}),
            "licences": dict(licences.most_common()), "sources": dict(sources.most_common(20))}


def hardware(device: str) -> str:
    """The machine that trains, in words."""
    import torch

    if device.startswith("cuda"):
        used = [int(number) for number in (device.partition(":")[2] or "0").split(",")]
        return f"{len(used)} x {torch.cuda.get_device_name(used[0])}"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def render(run: Run) -> str:
    """The card as Markdown, with front matter as model hubs read it."""
    known = facts(run)
    model = run.network()
    count = sum(parameter.numel() for parameter in model.parameters())
    parts = [_model(run, count), _data(known.get("data", {})), _configuration(run, known),
             _evaluation(known.get("evaluation", {})), _usage(run), _demo(run), known.get("licence", PLACEHOLDER),
             known.get("ethics", ETHICS)]
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in zip(SECTIONS, parts, strict=True))
    return f"---\n{_front_matter(run, known, count)}\n---\n\n# {run.path.name}\n\n{body}\n"


def write(run: Run) -> Path:
    """Render the card into the run's README.md."""
    from .run import put_file

    path = run.path / "README.md"
    put_file(path, render(run).encode())
    return path


def problems(text: str) -> list[str]:
    """What a card lacks; an empty list for one that can be published."""
    import yaml

    parts = text.split("---\n", 2)
    if len(parts) != 3 or parts[0]:
        return ["it has no front matter between two lines of ---"]
    found = []
    try:
        front = yaml.safe_load(parts[1]) or {}
    except yaml.YAMLError as error:
        return [f"its front matter is not YAML: {error}"]
    found += [f"front matter has no {name}" for name in ("license", "library_name", "pipeline_tag", "tags")
              if not front.get(name)]
    sections = dict(_sections(parts[2]))
    for name in SECTIONS:
        if not sections.get(name, "").strip():
            found.append(f"section {name} is missing")
        elif UNSAID in sections[name]:
            found.append(f"section {name} has something that is {UNSAID}: write it into {FACTS}, or into the card")
    return found


def _sections(body: str) -> list[tuple[str, str]]:
    found = []
    for part in body.split("\n## ")[1:]:
        name, _, text = part.partition("\n")
        found.append((name.strip(), text))
    return found


def _front_matter(run: Run, known: Mapping[str, Any], count: int) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(language=known.get("data", {}).get("languages") or None, license=known.get("licence_id"),
                         library_name="featstore", pipeline_tag="audio-to-audio",
                         tags=["singing-voice-conversion", run.kind, run.settings.model], parameters=count)
    return str(data.to_yaml())


def _model(run: Run, count: int) -> str:
    contract = ", ".join(f"{name} {value}" for name, value in vars(run.settings.contract).items())
    said = _said(run)
    return (f"{said}\n\n| | |\n| --- | --- |\n| kind | {run.kind} |\n| model | `{run.settings.model}` |\n"
            f"| parameters | {count:,} |\n| steps | {run.steps:,} |\n"
            f"| reads | {', '.join(_reads(run)) or 'log-mel'} |\n| mel contract | {contract} |")


def _said(run: Run) -> str:
    """What the package's own card says first: what the model is. Its status is not that of a run."""
    home = Path(str(run.settings.package.__file__)).parent / "CARD.md"
    if not home.exists():
        return str(run.settings.package.__doc__ or "").strip()
    paragraphs = [part for part in home.read_text("utf-8").split("\n\n") if not part.startswith(("#", "**Status"))]
    return paragraphs[0].strip()


def _reads(run: Run) -> list[str]:
    return [f"`{read.request}` ({read.spec.identity[:9]})" for items in run.settings.reads.values() for read in items]


def _data(data: Mapping[str, Any]) -> str:
    if not data:
        return PLACEHOLDER
    licences = ", ".join(f"{name} ({count:,})" for name, count in data["licences"].items())
    sources = ", ".join(f"{name} ({count:,})" for name, count in data["sources"].items())
    return (f"{data['utterances']:,} utterances, {data['hours']:g} hours, {data['speakers']} speakers. "
            f"Sources: {sources}. Licences: {licences}.")


def _configuration(run: Run, known: Mapping[str, Any]) -> str:
    if not run.settings.training:
        return known.get("training", PLACEHOLDER)
    shown = {name: value for name, value in run.settings.training.items() if name != "held_out"}
    lines = "\n".join(f"{name} = {value}" for name, value in shown.items())
    hours = f", {known['hours']:.2f} hours" if "hours" in known else ""
    return f"Hardware: {known.get('hardware', UNSAID)}{hours}.\n\n```\n{lines}\n```"


def _evaluation(results: Mapping[str, Any]) -> str:
    """A column a system: this run and what it is compared with."""
    if not results:
        return PLACEHOLDER
    systems = list(results["systems"])
    names = list(dict.fromkeys(name for values in results["systems"].values() for name in values))
    head = f"| metric | {' | '.join(systems)} |\n| --- |{' ---: |' * len(systems)}\n"
    rows = [f"| {name} | " + " | ".join(_number(results["systems"][s].get(name)) for s in systems) + " |"
            for name in names]
    return f"{results['of']}.\n\n{head}" + "\n".join(rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _usage(run: Run) -> str:
    name = run.path.name
    if run.kind == "vocoder":
        return (f"```bash\nfeatstore vocode song.wav --vocoder {name} -o out.wav\n```\n\n```python\n"
                f"from featstore_zoo import run, vocode\nmodel = run.load({name!r}).model\n"
                "wave = vocode.synthesise(model, log_mel)      # (T, n_mels) -> (T * hop,)\n```")
    return f"```bash\nfeatstore convert song.wav --to SINGER --run {name} -o out.wav\n```"


def _demo(run: Run) -> str:
    samples = run.path / "samples"
    steps = sorted(p for p in samples.iterdir() if p.name.isdigit()) if samples.is_dir() else []
    if not steps:
        return "No samples were kept with this run; the command above makes one from any recording."
    files = sorted(path.name for path in steps[-1].glob("*.flac"))
    return f"Beside this card: the recordings in `samples/reference/`, and what the model made of them in " \
           f"`samples/{steps[-1].name}/`: {', '.join(files)}."


def trained(run: Run, store: Store, device: str, seconds: float) -> None:
    """Note what a training was done with, and renew the card."""
    held_out = set(run.settings.training.get("held_out", ()))
    split = run.settings.training.get("split")
    keys = members(store, f"{split}/train", store.utterances) if split else [
        key for key in store.utterances if key not in held_out]
    before = float(facts(run).get("hours", 0.0))
    note(run, data=data_of(store, keys), hardware=hardware(device), hours=before + seconds / 3600)
    write(run)
