"""What training is told of itself: metrics on held-out utterances, sounds, pictures, TensorBoard's log.

    log/       TensorBoard: `tensorboard --logdir RUN/log`
    samples/   STEP/KEY.flac and .png of the utterances validated on; reference/ the recordings themselves
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from featstore_extractors.signal import LogMel, MelContract

from . import card, metrics
from .run import Run
from .vocode import griffin_lim, synthesise

if TYPE_CHECKING:
    from .examples import Examples

Array = np.ndarray
BASELINE = "Griffin-Lim"
PICTURES = 4  # utterances of which sounds and pictures are kept


class Log:
    """TensorBoard's log of a run, and its folder of samples."""

    def __init__(self, root: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.root = root
        self._writer = SummaryWriter(str(root / "log"), max_queue=50, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def sample(self, step: int, key: str, reference: Array, made: Array, contract: MelContract) -> None:
        """Sounds and spectrograms of one utterance, in the log and as files."""
        import soundfile as sf

        name = re.sub(r"[^\w.-]+", "_", key)
        home, recorded = self.root / "samples" / f"{step:08d}", self.root / "samples" / "reference"
        for folder in (home, recorded):
            folder.mkdir(parents=True, exist_ok=True)
        sf.write(home / f"{name}.flac", np.clip(made, -1, 1), contract.sample_rate)
        if not (recorded / f"{name}.flac").exists():
            sf.write(recorded / f"{name}.flac", np.clip(reference, -1, 1), contract.sample_rate)
        self._writer.add_audio(key, torch.from_numpy(made.copy())[None], step, contract.sample_rate)
        picture = spectrograms(reference, made, contract)
        picture.savefig(home / f"{name}.png", dpi=100)
        self._writer.add_figure(key, picture, step, close=True)

    def close(self) -> None:
        self._writer.close()


def validate(run: Run, model: nn.Module, examples: Examples, step: int, log: Log) -> dict[str, float]:
    """Metrics of a vocoder over the held-out utterances, each a mean; "score" is what is to be least.

    The score is the mean absolute difference of log-mels, which every vocoder has; where nothing is held out, NaN.
    The means go to the model card, beside those of Griffin and Lim's algorithm on the same utterances.
    """
    contract, training = run.settings.contract, run.settings.training
    found = []
    was_training = model.training
    model.eval()
    try:
        for number, (key, parts) in enumerate(_held_out(run, examples).items()):
            made = synthesise(model, parts["log-mel"], parts.get("f0"), seed=int(training.get("seed", 0)))
            found.append(compare(parts["wave"], made, contract))
            if number < PICTURES:
                log.sample(step, key, parts["wave"], made, contract)
    finally:
        model.train(was_training)
    means = _means(found)
    if found:
        _tell_card(run, examples, step, means)
    log.scalars(step, means, "valid")
    return means | {"score": means.get("log-mel L1", math.nan)}


def _held_out(run: Run, examples: Examples) -> dict[str, dict[str, Array]]:
    """Key -> features by role of the utterances to validate on, each cut to `valid_s`."""
    training, view = run.settings.training, examples.held_out
    most = int(training.get("valid_s", 8.0) * run.settings.contract.frame_rate)
    keys = list(view)[:int(training.get("valid_utterances", 8))]
    return {key: examples.named(view.crop(key, start=0, frames=min(view.length(key), most))) for key in keys}


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the utterances for which it is a number."""
    each = {name: np.array([values[name] for values in found]) for name in (found[0] if found else ())}
    return {name: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan
            for name, values in each.items()}


def _tell_card(run: Run, examples: Examples, step: int, means: Mapping[str, float]) -> None:
    """Note the evaluation for the model card. The baseline does not change, and is made once."""
    held_out = _held_out(run, examples)
    before = card.facts(run).get("evaluation", {}).get("systems", {}).get(BASELINE)
    baseline = before or _means([compare(parts["wave"], griffin_lim(parts["log-mel"], run.settings.contract),
                                         run.settings.contract) for parts in held_out.values()])
    seconds = float(run.settings.training.get("valid_s", 8.0))
    of = f"Means over {len(held_out)} held-out utterances, the first {seconds:g} s of each, after {step:,} steps"
    systems = {"this model": means, BASELINE: baseline}
    card.note(run, evaluation={"of": of, "systems": {
        system: {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        for system, values in systems.items()}})  # JSON has no NaN


def compare(reference: Array, made: Array, contract: MelContract) -> dict[str, float]:
    """How far a waveform (N,) is from the recording it was made from: of equal length and timing."""
    rate = contract.sample_rate
    found = {"log-mel L1": log_mel_l1(reference, made, contract),
             "multi-resolution STFT": metrics.multi_resolution_stft(reference, made),
             "MCD dB": metrics.mel_cepstral_distortion(reference, made, rate, align="none")}
    one, other = f0_of(reference, rate), f0_of(made, rate)
    found |= {"F0CORR": metrics.f0_correlation(one, other), "F0RMSE cents": metrics.f0_rmse(one, other)}
    try:
        found["PESQ"] = metrics.pesq(reference, made, rate)
    except ImportError:  # an extra of its own; everything else is there
        found["PESQ"] = math.nan
    return found


def log_mel_l1(reference: Array, made: Array, contract: MelContract) -> float:
    """Mean absolute difference of two waveforms' log-mels."""
    one, other = _log_mels(reference, made, contract)
    return float(np.abs(one - other).mean())


def _log_mels(reference: Array, made: Array, contract: MelContract) -> list[Array]:
    """Both log-mels (T, n_mels). What is shorter than a window is followed by silence, which all of it needs."""
    short = max(0, contract.n_fft - len(reference))
    return LogMel(**vars(contract)).load("cpu")([np.pad(np.asarray(wave, np.float32), (0, short))
                                                 for wave in (reference, made)])


def f0_of(wave: Array, sample_rate: int) -> Array:
    """f0 (T,) in Hz every 5 ms by WORLD's DIO and StoneMask: quick, and the same for both of a pair."""
    pyworld = metrics.world()
    x = np.ascontiguousarray(wave, np.float64)
    f0, times = pyworld.dio(x, sample_rate)
    return np.asarray(pyworld.stonemask(x, f0, times, sample_rate))


def spectrograms(reference: Array, made: Array, contract: MelContract) -> Any:
    """A figure: log-mels of the recording and of what was made of it, one colour scale."""
    from matplotlib.figure import Figure

    pair = _log_mels(reference, made, contract)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    low, high = float(np.percentile(pair[0], 1)), float(pair[0].max())
    for axis, log_mel, title in zip(axes, pair, ("recording", "made"), strict=True):
        seconds = len(log_mel) / float(contract.frame_rate)
        axis.imshow(log_mel.T, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                    extent=(0, seconds, 0, contract.n_mels))
        axis.set_ylabel(f"{title}: mel band")
    axes[-1].set_xlabel("seconds")
    return figure
