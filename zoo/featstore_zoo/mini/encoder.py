"""Training of the box's content encoder: phones of frames, one content whoever says it, nothing of voice or pitch.

Objectives, each with a weight of its own (`Weights`), so that an ablation is a matter of setting one to zero:

    phones      cross-entropy of each frame's phone, where synthesisers told it
    ctc         the phone sequence, for transcripts without times (Graves et al., 2006); its head is dropped at the end
    invariance  a frame of one voice finds the same moment of the sentence in another voice's rendition among all frames
                of other phones (InfoNCE, arXiv 1807.03748)
    real        recordings without transcripts: under noise, rooms and another vocal tract they stay what the network
                takes them for without (arXiv 2001.07685), and find their own frames
    voice       an adversary reads the voice from mean and deviation over time, behind a reversed gradient
                (Ganin et al., arXiv 1505.07818)
    pitch       another one reads log2 f0 of a frame
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featstore_extractors.convnext import ContentNet, Sizes

from . import speech
from .augment import Augment
from .phones import NUMBER, PHONES, SILENCE

Array = np.ndarray
FRAMES = 150          # of a crop: 3 s
PAIRS, REAL, READ = 6, 4, 6  # rows of a batch: sentences by two voices, recordings, recordings with phones
STEPS = 4000          # many small batches: in a given time they find far more phones than few large ones
RATE, LAST, WARM = 3e-3, 0.003, 0.02  # the last rate beside the first; part of the steps in which it rises
EASY, HARD, HARDENED = 0.2, 0.85, 0.3  # part of the rows that are augmented: at first, and from this progress on
WARPED = 0.5          # part of the rows with another vocal tract
DECAY = 0.998         # of the averaged weights, which are what is kept
SURE = 0.6            # what the network must hold of a phone for a recording to count as that
FREE = 50             # every so manieth sentence is left out of training, for validation
CHECKPOINT_S = 180.0


@dataclass(frozen=True)
class Weights:
    """Of the objectives; see the module's text."""

    phones: float = 1.0
    ctc: float = 0.2
    invariance: float = 0.4
    real: float = 0.5
    voice: float = 0.3
    pitch: float = 0.3


@dataclass
class Data:
    """All shards in memory: bands (all 2T, MELS), labels (all T,), f0 (all T,), and where each clip lies."""

    bands: Array
    labels: Array
    f0: Array
    clips: list[speech.Clip]
    starts: Array                       # first frame of each clip
    phones: list[Array]
    ends: list[Array]                   # of the phones, in frames, fractional
    voices: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Data:
        bands, f0, labels, clips, phones, ends = [], [], [], [], [], []
        for path in paths:
            found, parts = speech.read(path)
            bands.append(parts["bands"])
            f0.append(parts["f0"].astype(np.float32))
            first = 0
            for clip in found:
                numbers = parts["phones"][first : first + clip.phones].astype(np.int64)
                until = parts["ends"][first : first + clip.phones] / 320
                first += clip.phones
                centres = np.arange(clip.frames) + 0.5
                labels.append(numbers[np.minimum(np.searchsorted(until, centres), clip.phones - 1)] if clip.timed
                              else np.full(clip.frames, -1))
                clips.append(clip)
                phones.append(numbers)
                ends.append(until)
        starts = np.cumsum([0, *(clip.frames for clip in clips)])[:-1]
        names = sorted({clip.voice for clip in clips})
        return cls(np.concatenate(bands), np.concatenate(labels), np.concatenate(f0), clips, starts, phones, ends,
                   {name: number for number, name in enumerate(names)})

    def crop(self, clip: int, first: int) -> tuple[Array, Array, Array]:
        """Bands (2F, MELS), labels (F,), f0 (F,) of FRAMES frames from `first`; beyond the clip there is silence."""
        begin = int(self.starts[clip]) + first
        count = max(0, min(FRAMES, self.clips[clip].frames - first))
        silent = -16.1  # the floor of the bands: ln EPSILON
        bands = np.full((2 * FRAMES, self.bands.shape[1]), silent, np.float32)
        bands[: 2 * count] = self.bands[2 * begin : 2 * (begin + count)]
        labels, f0 = np.full(FRAMES, -1), np.full(FRAMES, -1.0, np.float32)
        labels[:count], f0[:count] = self.labels[begin : begin + count], self.f0[begin : begin + count]
        if self.clips[clip].timed:
            labels[count:] = NUMBER[SILENCE]
        return bands, labels, f0

    def moments(self, one: int, other: int, places: Array) -> Array:
        """Frames (fractional) of `other` that say what frames `places` of `one` say; phones must be the same."""
        return np.asarray(np.interp(places + 0.5, np.concatenate([[0], self.ends[one]]),
                                    np.concatenate([[0], self.ends[other]])) - 0.5)


@dataclass(frozen=True)
class Batch:
    """bands (B, 2F, MELS); labels, f0 (B, F); voice (B,), -1 unknown; twin (P, F): frame of row P + p that row p's
    frame corresponds to, -1 none; lines: (row, phones) for CTC. Rows: P, their twins, recordings, those with phones."""

    bands: Tensor
    labels: Tensor
    f0: Tensor
    voice: Tensor
    twin: Tensor
    lines: list[tuple[int, Array]]


class Batches:
    """Batch of a step, by seed and step alone."""

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self.seed = data, seed
        groups: dict[int, list[int]] = {}
        for number, clip in enumerate(data.clips):
            if clip.timed and clip.engine != "real" and clip.sentence % FREE:
                groups.setdefault(clip.sentence, []).append(number)
        self.groups = [group for group in groups.values() if len(group) > 1]
        self.free = [n for n, clip in enumerate(data.clips)
                     if clip.timed and clip.engine != "real" and clip.sentence % FREE == 0]
        recorded = [n for n, clip in enumerate(data.clips) if clip.engine == "real"]
        self.readers = _readers(data, recorded)
        self.read = _readers(data, [n for n in recorded if data.clips[n].timed or (
            data.clips[n].phones and data.clips[n].frames <= FRAMES)])

    def at(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, step))
        data = self.data
        rows: list[tuple[int, int]] = []
        twins: list[tuple[int, int]] = []
        twin = np.full((PAIRS, FRAMES), -1)
        for number, pick in enumerate(rng.choice(len(self.groups), PAIRS, replace=False)):
            one, other = rng.permutation(self.groups[pick])[:2].tolist()
            first = int(rng.integers(-10, max(1, data.clips[one].frames - FRAMES // 2)))
            first = max(first, 0)
            rows.append((one, first))
            if np.array_equal(data.phones[one], data.phones[other]):
                places = first + np.arange(min(FRAMES, data.clips[one].frames - first))
                found = np.round(data.moments(one, other, places)).astype(int)
                second = int(max(found[0], 0))
                found = found - second
                twin[number, : len(found)] = np.where((found >= 0) & (found < FRAMES), found, -1)
                twins.append((other, second))
            else:
                twins.append((other, int(rng.integers(0, max(1, data.clips[other].frames - FRAMES // 2)))))
        rows += twins
        for count, readers in ((REAL, self.readers), (READ, self.read)):
            for _ in range(count if readers else 0):
                clip = int(rng.choice(_one(readers, data, rng)))
                rows.append((clip, int(rng.integers(0, max(1, data.clips[clip].frames - FRAMES + 1)))))
        parts = [data.crop(*row) for row in rows]
        bands, labels, f0 = (np.stack(part) for part in zip(*parts, strict=True))
        voice = np.array([data.voices[data.clips[clip].voice] if not data.clips[clip].sung else -1 for clip, _ in rows])
        lines = [(row, self._line(clip, first, labels[row])) for row, (clip, first) in enumerate(rows)]
        return Batch(torch.from_numpy(bands), torch.from_numpy(labels), torch.from_numpy(f0), torch.from_numpy(voice),
                     torch.from_numpy(twin), [(row, line) for row, line in lines if len(line)])

    def _line(self, clip: int, first: int, labels: Array) -> Array:
        """The phones of a row without silences: those of its frames, or of a transcript that it holds whole."""
        if self.data.clips[clip].timed:
            inside = labels[: max(0, self.data.clips[clip].frames - first)]
            line = inside[np.flatnonzero(np.diff(inside, prepend=-1))] if len(inside) else inside
        else:
            line = self.data.phones[clip] if first == 0 and self.data.clips[clip].frames <= FRAMES else labels[:0]
        return np.asarray(line[line != NUMBER[SILENCE]])


def _readers(data: Data, clips: Sequence[int]) -> list[list[int]]:
    """Clips by their voice."""
    return [[n for n in clips if data.clips[n].voice == name] for name in sorted({data.clips[n].voice for n in clips})]


def _one(readers: Sequence[list[int]], data: Data, rng: np.random.Generator) -> list[int]:
    """One reader's clips. Who has much counts more than who has a sentence, but not by as much as there is more."""
    shares = np.sqrt([sum(data.clips[n].frames for n in reader) for reader in readers])
    return readers[int(rng.choice(len(readers), p=shares / shares.sum()))]


class Reversed(torch.autograd.Function):
    """The same forward; the gradient comes back with its sign turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: float) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.size * gradient, None


class Learner(nn.Module):
    """The network and what only training needs."""

    def __init__(self, voices: int, sizes: Sizes) -> None:
        super().__init__()
        self.network = ContentNet(sizes)
        self.ctc = nn.Linear(sizes.dim, len(PHONES) + 1)  # the last is the blank
        self.voice = nn.Sequential(nn.Linear(2 * sizes.dim, 256), nn.GELU(), nn.Linear(256, voices))
        self.pitch = nn.Sequential(nn.Linear(sizes.dim, 128), nn.GELU(), nn.Linear(128, 1))

    def losses(self, batch: Batch, augment: Augment, weights: Weights, progress: float) -> dict[str, Tensor]:
        """progress: part of the training that is done; adversaries and what the network believes come in with it."""
        rows, pairs = len(batch.bands), len(batch.twin)
        warped = torch.rand(rows, generator=augment.generator) < WARPED
        content = self.network(augment(batch.bands, warped)).float()
        said = self.network.phones(content)
        timed = batch.labels >= 0
        found = {"phones": F.cross_entropy(said[timed], batch.labels[timed], label_smoothing=0.1)}
        if weights.ctc:
            found["ctc"] = self._ctc(content, batch.lines)
        if weights.invariance:
            found["invariance"] = _contrast(*_twins(content, batch, augment.generator))
        recordings = slice(2 * pairs, 2 * pairs + REAL)
        if weights.real and rows > 2 * pairs and progress > 0.1:
            found["real"] = self._real(batch.bands[recordings], content[recordings], said[recordings],
                                       augment.generator)
        size = min(1.0, max(0.0, progress - 0.05) / 0.3)
        kept = ~warped & (batch.voice >= 0)
        if weights.voice and kept.any():
            turned = Reversed.apply(content[kept], size)
            pooled = torch.cat([turned.mean(1), turned.std(1)], dim=1)
            found["voice"] = F.cross_entropy(self.voice(pooled), batch.voice[kept])
        sung = (batch.f0 > 0) & ~warped[:, None]
        if weights.pitch and sung.any():
            octaves = batch.f0[sung].log2() - 7.6
            found["pitch"] = F.smooth_l1_loss(self.pitch(Reversed.apply(content[sung], size))[:, 0], octaves)
        return found

    def _ctc(self, content: Tensor, lines: Sequence[tuple[int, Array]]) -> Tensor:
        rows = torch.tensor([row for row, _ in lines])
        scores = self.ctc(content[rows]).log_softmax(-1).transpose(0, 1)          # (F, B, phones + 1)
        targets = torch.from_numpy(np.concatenate([line for _, line in lines]))
        return F.ctc_loss(scores, targets, torch.full((len(rows),), FRAMES), torch.tensor([len(x) for _, x in lines]),
                          blank=len(PHONES), zero_infinity=True)

    def _real(self, bands: Tensor, content: Tensor, said: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            clean = self.network(bands).float()
            sure, taken = self.network.phones(clean).softmax(-1).max(-1)
        kept = sure > SURE
        same = F.cross_entropy(said[kept], taken[kept]) if kept.any() else said.sum() * 0
        heard = (taken != NUMBER[SILENCE]).flatten().nonzero()[:, 0]
        chosen = heard[torch.randperm(len(heard), generator=generator)[:256]]
        return same + 0.3 * _contrast(content.flatten(0, 1)[chosen], clean.flatten(0, 1)[chosen],
                                      taken.flatten()[chosen])


def _twins(content: Tensor, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (n, D) of one voice, the same moments (n, D) of another, and their phones (n,): 512 drawn."""
    pairs = len(batch.twin)
    row, frame = ((batch.twin >= 0) & (batch.labels[:pairs] > 0)).nonzero(as_tuple=True)
    chosen = torch.randperm(len(row), generator=generator)[:512]
    row, frame = row[chosen], frame[chosen]
    return content[row, frame], content[pairs + row, batch.twin[row, frame]], batch.labels[row, frame]


def _contrast(one: Tensor, other: Tensor, phones: Tensor) -> Tensor:
    """How ill each frame of one finds its own among the other's frames of other phones."""
    if len(one) < 2:
        return one.sum() * 0
    near = F.normalize(one, dim=1) @ F.normalize(other, dim=1).T / 0.1
    rivals = (phones[:, None] == phones) & ~torch.eye(len(phones), dtype=torch.bool)
    near = near.masked_fill(rivals, -1e4)
    own = torch.arange(len(one))
    return (F.cross_entropy(near, own) + F.cross_entropy(near.T, own)) / 2


def _optimisers(learner: Learner) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the network, AdamW for all else."""
    matrices = [p for name, p in learner.network.named_parameters() if p.ndim == 2 and not name.startswith("phones.")]
    chosen = {id(p) for p in matrices}
    rest = [p for p in learner.parameters() if id(p) not in chosen]
    return [torch.optim.Muon(matrices, RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, RATE, betas=(0.9, 0.98), weight_decay=0.02, fused=True)]


class Training:
    """A run of the encoder: its folder holds checkpoint, log and settings, and it goes on from there."""

    def __init__(self, out: Path, data: Data, weights: Weights, steps: int = STEPS, seed: int = 0,
                 sizes: Sizes | None = None) -> None:
        self.out, self.data, self.weights, self.steps, self.seed = out, data, weights, steps, seed
        torch.manual_seed(seed)
        self.learner = Learner(len(data.voices), sizes or Sizes(phones=len(PHONES)))
        self.mean = ContentNet(self.learner.network.sizes)
        self.mean.load_state_dict(self.learner.network.state_dict())
        self.optimisers = _optimisers(self.learner)
        self.batches = Batches(data, seed)
        self.step, self.spent = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def run(self, minutes: float = 90.0, told: Callable[[str], None] = print) -> bool:
        """Up to `minutes` more; True when all steps are done."""
        begun = saved = time.monotonic()
        before, count = self.spent, 0
        sums: dict[str, float] = {}
        while self.step < self.steps and time.monotonic() - begun < minutes * 60:
            for name, value in self._advance().items():
                sums[name] = sums.get(name, 0.0) + value
            count += 1
            self.spent = before + time.monotonic() - begun
            if self.step % 50 == 0 or self.step == self.steps:
                row = {name: value / count for name, value in sums.items()}
                if self.step % 200 == 0 or self.step == self.steps:
                    row |= self.validate()
                told(self._log(row))
                sums, count = {}, 0
            if time.monotonic() - saved > CHECKPOINT_S:
                self._save()
                saved = time.monotonic()
        self._save()
        return self.step >= self.steps

    def _advance(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        progress = self.step / self.steps
        rise = min(1.0, progress / WARM)
        fall = LAST + (1 - LAST) * (1 + math.cos(math.pi * max(0.0, progress - WARM) / (1 - WARM))) / 2
        for group in (group for optimiser in self.optimisers for group in optimiser.param_groups):
            group["lr"] = RATE * (rise if rise < 1 else fall)
        augment = Augment(generator, EASY + (HARD - EASY) * min(1.0, progress / HARDENED))
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.learner.losses(self.batches.at(self.step), augment, self.weights, progress)
        total = torch.stack([getattr(self.weights, name) * loss.float() for name, loss in losses.items()]).sum()
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step += 1
        decay = min(DECAY, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, now in zip(self.mean.parameters(), self.learner.network.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def validate(self) -> dict[str, float]:
        """Part of the frames of sentences left out of which the phone is found: spoken, sung."""
        right: dict[str, list[Array]] = {}
        chosen = self.batches.free[:: max(1, len(self.batches.free) // 96)]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for clip in chosen:
                bands, labels, _ = self.data.crop(clip, 0)
                found = self.mean.phones(self.mean(torch.from_numpy(bands)[None]))[0].argmax(-1).numpy()
                spoken = labels > 0
                kind = "sung" if self.data.clips[clip].sung else "spoken"
                right.setdefault(kind, []).append(found[spoken] == labels[spoken])
        return {f"right_{kind}": float(np.concatenate(parts).mean()) for kind, parts in sorted(right.items())}

    def _log(self, row: dict[str, float]) -> str:
        names = ["step", "seconds", *(f.name for f in fields(Weights)), "right_spoken", "right_sung"]
        values = {"step": self.step, "seconds": round(self.spent, 1), **{k: round(v, 5) for k, v in row.items()}}
        path = self.out / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names)
            if new:
                writer.writeheader()
            writer.writerow(values)
        return " ".join(f"{name} {value:g}" for name, value in values.items())

    def _save(self) -> None:
        state = {"step": self.step, "spent": self.spent, "learner": self.learner.state_dict(),
                 "mean": self.mean.state_dict(), "optimisers": [one.state_dict() for one in self.optimisers]}
        new = self.checkpoint.with_suffix(".tmp")
        torch.save(state, new)
        new.replace(self.checkpoint)
        settings = {"steps": self.steps, "seed": self.seed, "weights": asdict(self.weights),
                    "voices": len(self.data.voices), "clips": len(self.data.clips),
                    "hours": round(len(self.data.labels) / 50 / 3600, 3)}
        (self.out / "settings.json").write_text(json.dumps(settings, indent=1), "utf-8")

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.step, self.spent = state["step"], state["spent"]
        self.learner.load_state_dict(state["learner"])
        self.mean.load_state_dict(state["mean"])
        for optimiser, own in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)


def without(names: Sequence[str]) -> Weights:
    """All objectives but those named. ValueError for a name that there is not."""
    known = [f.name for f in fields(Weights)]
    for name in names:
        if name not in known:
            raise ValueError(f"no objective {name!r}; there are {', '.join(known)}")
    return Weights(**dict.fromkeys(names, 0.0))
