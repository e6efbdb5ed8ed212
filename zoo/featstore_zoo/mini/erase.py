"""What is left of voice and pitch in the content, taken out by a linear map that is folded into the last layer.

Training with adversaries leaves what they were too weak to find. Here the directions in which the means of voices
differ within a phone, and those along which f0 is read, are found on the training data, beside all that varies, and the
strongest are removed (nuisance attribute projection, Solomonoff et al., 2005, in the metric of the whole variance).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featstore_extractors.convnext import ContentNet, Sizes

from .encoder import SURE, Data, Training
from .phones import NUMBER, PHONES, SILENCE

Array = np.ndarray
CLIPS = 1600          # synthetic clips that are looked at; of recordings all
FEWEST = 20           # frames of a phone by a voice whose mean counts
REMOVED = 64          # directions; of 256, more cost phones and hide hardly more of the voice
FIT_STEPS, FIT_BATCH = 1500, 4096
RIDGE = 1e-3


@dataclass(frozen=True)
class Frames:
    """Content (N, D), phone (N,), voice (N,) and log2 f0 (N,), NaN where it is unknown or unvoiced; real (N,)."""

    content: Array
    phone: Array
    voice: Array
    octave: Array
    real: Array


def frames_of(network: ContentNet, data: Data, clips: Sequence[int]) -> Frames:
    """Of clips as they are; phones of recordings without any are those that the network is sure of."""
    parts: list[tuple[Array, ...]] = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for number in clips:
            clip, begin = data.clips[number], int(data.starts[number])
            bands = torch.from_numpy(data.bands[2 * begin : 2 * (begin + clip.frames)].astype(np.float32))
            content = network(bands[None])[0].float()
            sure, taken = network.phones(content).float().softmax(-1).max(-1)
            phone = data.labels[begin : begin + clip.frames].copy()
            if not clip.timed:
                phone = np.where(sure.numpy() > SURE, taken.numpy(), -1)
            f0 = data.f0[begin : begin + clip.frames]
            octave = np.where(f0 > 0, np.log2(np.maximum(f0, 1.0)), np.nan)
            voice = data.voices[clip.voice] if not clip.sung else -1
            kept = phone >= 0
            parts.append((content.numpy()[kept], phone[kept], np.full(kept.sum(), voice), octave[kept],
                          np.full(kept.sum(), clip.engine == "real")))
    return Frames(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def nuisance(frames: Frames) -> Array:
    """(D, D): scatter of voices' means within phones, synthetic voices and readers alike, and of f0's direction."""
    dim = frames.content.shape[1]
    within, pitch = np.zeros((2, dim, dim)), np.zeros((dim, dim))
    for phone in np.unique(frames.phone[frames.phone != NUMBER[SILENCE]]):
        own = frames.phone == phone
        rows = frames.content[own].astype(np.float64)
        voices, octave, real = frames.voice[own], frames.octave[own], frames.real[own]
        for kind in (0, 1):
            means = [rows[voices == v].mean(0) for v in np.unique(voices[(real == kind) & (voices >= 0)])
                     if (voices == v).sum() >= FEWEST]
            if len(means) > 2:
                centred = np.array(means) - np.mean(means, 0)
                within[kind] += centred.T @ centred / len(means) * own.sum()
        voiced = np.isfinite(octave)
        if voiced.sum() > FEWEST:
            x, y = rows[voiced] - rows[voiced].mean(0), octave[voiced] - octave[voiced].mean()
            along = x.T @ y / max(np.sqrt((y**2).sum()), 1e-9)
            pitch += np.outer(along, along)
    both = sum(part / max(np.trace(part), 1e-9) for part in within)
    return np.asarray(both + pitch / max(np.trace(pitch), 1e-9))


def directions(frames: Frames, removed: int) -> Array:
    """(D, D - removed): a map of centred content onto what is kept, its main axes first."""
    rows = frames.content.astype(np.float64)
    total = np.cov(rows.T)
    total += RIDGE * np.trace(total) / len(total) * np.eye(len(total))
    half = np.linalg.cholesky(total)
    turned = np.linalg.solve(half, np.linalg.solve(half, nuisance(frames)).T)
    _, axes = np.linalg.eigh((turned + turned.T) / 2)
    worst = np.linalg.solve(half.T, axes[:, len(axes) - removed :])       # (D, removed), orthonormal in `total`
    clean = np.eye(len(total)) - worst @ worst.T @ total                  # row @ clean: nothing left along them
    kept, main = np.linalg.eigh(clean.T @ total @ clean)
    return np.asarray(clean @ main[:, np.argsort(-kept)[: len(total) - removed]])


def erased(network: ContentNet, frames: Frames, removed: int = REMOVED, seed: int = 0) -> ContentNet:
    """The same encoder with `removed` channels fewer, and phones fitted anew to what is left."""
    shape = network.sizes
    found = ContentNet(Sizes(shape.width, shape.blocks, shape.expansion, shape.dim - removed, shape.phones))
    found.load_state_dict({name: value for name, value in network.state_dict().items()
                           if not name.startswith(("content.", "phones."))}, strict=False)
    kept, mean = directions(frames, removed), frames.content.mean(0, dtype=np.float64)
    scale = 1.0 / (frames.content @ kept).std()
    with torch.no_grad():
        turn = torch.from_numpy(kept.T * scale)
        found.content.weight.copy_(turn @ network.content.weight.double())
        found.content.bias.copy_(turn @ (network.content.bias.double() - torch.from_numpy(mean)))
    _fit(found.phones, torch.from_numpy(((frames.content - mean) @ kept * scale).astype(np.float32)), frames, seed)
    return found.eval()


def _fit(head: nn.Linear, content: Tensor, frames: Frames, seed: int) -> None:
    """Phones of frames by cross-entropy; a recording's count as those of its kind do together."""
    generator = torch.Generator().manual_seed(seed)
    phones = torch.from_numpy(frames.phone)
    optimiser = torch.optim.AdamW(head.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, FIT_STEPS)
    for _ in range(FIT_STEPS):
        chosen = torch.randint(len(phones), (FIT_BATCH,), generator=generator)
        loss = F.cross_entropy(head(content[chosen]), phones[chosen], label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def finish(run: Training, removed: int = REMOVED) -> Path:
    """The encoder of a finished training, its averaged weights, as the box has it: OUT/mini.safetensors, in float16."""
    made = [number for number, clip in enumerate(run.data.clips) if clip.engine != "real"]
    recorded = [number for number, clip in enumerate(run.data.clips) if clip.engine == "real"]
    chosen = [*made[:: max(1, len(made) // CLIPS)], *recorded]
    network = run.mean.eval()
    found = erased(network, frames_of(network, run.data, chosen), removed, run.seed)
    path = run.out / "mini.safetensors"
    save(found, path)
    return path


def save(network: ContentNet, path: Path) -> None:
    """Tensors in float16, with sizes and phones in the header."""
    from safetensors.torch import save_file

    tensors = {name: tensor.half().contiguous() for name, tensor in sorted(network.state_dict().items())}
    save_file(tensors, path, {"sizes": json.dumps(asdict(network.sizes)), "phones": json.dumps(PHONES)})
