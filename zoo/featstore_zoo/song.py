"""A whole song through an acoustic model, in windows that join without a seam: memory does not grow with the network.

What looks a known number of frames far (`local`) is run on windows with just those frames on either side, and gives
what the whole gives at once. What looks so far in each of many steps takes each step over all windows before the next,
so that what a frame depends on does not widen: steps of sampling (`in_windows`), layers of a transformer (`attended`).
Only what goes from step to step is kept for the whole song, some kB a frame.

What attends to everything it is given, or counts frames from where it begins, is run on windows with some context, each
of which fades into the next (`faded`), and gives nearly what the whole does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor

from .acoustic import Batch

__all__ = ["CONTEXT", "FADE", "LEAST", "WINDOW", "Features", "Told", "attended", "conditioned", "faded", "in_windows",
           "joined", "local", "part", "untold"]

WINDOW = 1024  # frames of a window, some 11 s: twice what models learn from at a time
LEAST = 64     # frames of the smallest window that is tried where memory is short
CONTEXT = 128  # frames on either side of a window that fades
FADE = 32      # frames over which one such window fades into the next

Features = Callable[[int, int], Batch]      # frames [begin, end) of a song as a batch of one, on the model's device
Windowed = Callable[[int, int], Tensor]     # what is made of frames [begin, end), (1, end - begin, D)
Told = Callable[[float], None]              # is told the share of the work that is done, 0 to 1


def untold(share: float) -> None:
    """Where nobody asks how far a song is."""


def part(told: Told, number: int, count: int) -> Told:
    """Tells of all the work what is done of its part `number`, from 0, of `count`."""
    return lambda share: told((number + share) / count)


def local(made: Windowed, frames: int, size: int, reach: int) -> Iterator[Tensor]:
    """Pieces (1, t, D) of a song of `frames`, in order, by what depends on `reach` frames to either side."""
    for start, stop in _bounds(frames, size):
        begin = max(0, start - reach)
        yield made(begin, min(frames, stop + reach))[:, start - begin:stop - begin]


def faded(made: Windowed, frames: int, size: int, context: int = CONTEXT, fade: int = FADE) -> Iterator[Tensor]:
    """Pieces (1, t, D) of a song of `frames`, in order, by what depends on all that it is given.

    Windows have `context` frames more at either side, and each fades into the next over `fade` frames, half of them on
    either side of where they meet.
    """
    half, bounds = fade // 2, _bounds(frames, max(size, 2 * fade))
    rise = ((torch.arange(2 * half) + 0.5) / (2 * half))[:, None]
    before: Tensor | None = None  # of the window before, around where it meets this one
    for start, stop in bounds:
        begin, end = max(0, start - context), min(frames, stop + context)
        window = made(begin, end)
        first, last = (start - half if before is not None else start), (stop - half if stop < frames else stop)
        piece = window[:, first - begin:last - begin]
        if before is not None:
            ramp = rise.to(piece)
            blended = before * (1 - ramp) + piece[:, :2 * half] * ramp
            piece = torch.cat([blended, piece[:, 2 * half:]], 1)
        before = window[:, stop - half - begin:stop + half - begin] if stop < frames else None
        yield piece


def joined(pieces: Iterator[Tensor], frames: int, told: Told = untold) -> Tensor:
    """The pieces (1, t, D) as one (1, frames, D) on the CPU."""
    whole, done = torch.empty(0), 0
    for piece in pieces:
        if not done:
            whole = torch.empty(1, frames, *piece.shape[2:])
        whole[:, done:done + piece.shape[1]] = piece
        done += piece.shape[1]
        told(done / frames)
    return whole


def conditioned(encoder: Any, features: Features, frames: int, size: int) -> Tensor:
    """The condition (1, frames, D) of a song, on the CPU, by a `Conditioner`."""
    def made(begin: int, end: int) -> Tensor:
        told: Tensor = encoder(features(begin, end))
        return told

    return joined(faded(made, frames, size) if encoder.config.conformer else local(made, frames, size, 0), frames)


def attended(transformer: Any, x: Tensor, size: int, told: Told = untold) -> Tensor:
    """(1, T, C) of a `RelativeTransformer` for x (1, T, C), both on the CPU."""
    device, frames, layers = next(transformer.parameters()).device, x.shape[1], len(transformer.attn_layers)
    for number in range(layers):
        before = x

        def made(begin: int, end: int, before: Tensor = before, number: int = number) -> Tensor:
            heard: Tensor = transformer.layer(number, before[:, begin:end].to(device).transpose(1, 2))
            return heard.transpose(1, 2)

        x = joined(local(made, frames, size, transformer.reach), frames, part(told, number, layers))
    return x


def in_windows(network: Any, condition: Tensor, size: int, calls: int = 1, told: Told = untold
               ) -> Callable[[Tensor, Tensor | float], Tensor]:
    """(x, step) -> what a `Denoiser` gives for x (1, T, D) and a condition (1, T, K), both on the CPU as is the result.

    What the network makes of the condition is made anew for each window and step: for a song it would be gigabytes.

    calls: how often it will be asked, of which `told` hears.
    """
    device, frames, numbers = next(network.parameters()).device, condition.shape[1], count()
    once = network.hearing(condition.to(device)) if frames <= size else None

    def noise_of(x: Tensor, step: Tensor | float) -> Tensor:
        def made(begin: int, end: int) -> Tensor:
            hear = once or network.hearing(condition[:, begin:end].to(device))
            found: Tensor = hear(x[:, begin:end].to(device), _moved(step, device))
            return found

        return joined(local(made, frames, size, network.reach), frames, part(told, next(numbers), calls))

    return noise_of


def _moved(step: Tensor | float, device: torch.device) -> Tensor | float:
    return step.to(device) if isinstance(step, Tensor) else step


def _bounds(frames: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) of windows of nearly one length, at most `size`."""
    count = max(1, -(-frames // size))
    ends = [frames * i // count for i in range(count + 1)]
    return list(pairwise(ends))
