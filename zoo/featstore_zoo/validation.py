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
from .hearing import statistics_of
from .run import Run
from .vocode import griffin_lim, synthesise

if TYPE_CHECKING:
    from .examples import Examples

Array = np.ndarray
BASELINES = {"vocoder": "Griffin-Lim", "acoustic": "mean log-mel"}  # what each kind has to be better than
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

    def sample(self, step: int, key: str, waves: tuple[Array, Array], mels: tuple[Array, Array],
               contract: MelContract) -> None:
        """Sounds and spectrograms of one utterance, the reference first, in the log and as files."""
        import soundfile as sf

        name = re.sub(r"[^\w.-]+", "_", key)
        home, recorded = self.root / "samples" / f"{step:08d}", self.root / "samples" / "reference"
        for folder in (home, recorded):
            folder.mkdir(parents=True, exist_ok=True)
        reference, made = (np.clip(wave, -1, 1) for wave in waves)
        sf.write(home / f"{name}.flac", made, contract.sample_rate)
        if not (recorded / f"{name}.flac").exists():
            sf.write(recorded / f"{name}.flac", reference, contract.sample_rate)
        self._writer.add_audio(key, torch.from_numpy(made.copy())[None], step, contract.sample_rate)
        picture = spectrograms(mels, contract)
        picture.savefig(home / f"{name}.png", dpi=100)
        self._writer.add_figure(key, picture, step, close=True)

    def close(self) -> None:
        self._writer.close()


def validate(run: Run, model: nn.Module, examples: Examples, step: int, log: Log) -> dict[str, float]:
    """Metrics of a model over the held-out utterances, each a mean; "score" is what is to be least.

    The score is the mean absolute difference of log-mels, which every model has; where nothing is held out, NaN. The
    means go to the model card, beside those of what the kind of model has to be better than.
    """
    contract, seed = run.settings.contract, int(run.settings.training.get("seed", 0))
    found = []
    was_training = model.training
    model.eval()
    try:
        for number, (key, parts) in enumerate(_held_out(run, examples).items()):
            if run.kind == "vocoder":
                made = synthesise(model, parts["log-mel"], parts.get("f0"), seed=seed)
                waves: tuple[Array, Array] | None = parts["wave"], made
                mels = _log_mels(parts["wave"], made, contract)
                found.append(compare(parts["wave"], made, contract))
            else:
                waves, mels = _converted(model, parts, contract, seed)
                found.append(compare_mels(*mels, contract) | (compare(*waves, contract) if waves is not None else {}))
            if number < PICTURES:
                heard = waves if waves is not None else (griffin_lim(mels[0], contract), griffin_lim(mels[1], contract))
                log.sample(step, key, heard, mels, contract)
    finally:
        model.train(was_training)
    means = _means(found)
    if found:
        _tell_card(run, examples, step, means)
    log.scalars(step, means, "valid")
    return means | {"score": means.get("log-mel L1", math.nan)}


def _converted(model: nn.Module, parts: Mapping[str, Array], contract: MelContract, seed: int
               ) -> tuple[tuple[Array, Array] | None, tuple[Array, Array]]:
    """Waveforms, where an acoustic model makes one, and log-mels: those of the recording, and what is made of it."""
    made = made_of(model, parts, seed)
    if made.ndim == 2:
        return None, (np.asarray(parts["log-mel"], np.float32), made)
    return (parts["wave"], made), _log_mels(parts["wave"], made, contract)


def made_of(model: nn.Module, parts: Mapping[str, Array], seed: int = 0) -> Array:
    """The log-mel (T, n_mels), or the waveform (N,), that an acoustic model makes of an utterance's features by key."""
    device = next(model.parameters()).device
    batch = {key: torch.from_numpy(np.asarray(value))[None].to(device) for key, value in parts.items()}
    with torch.inference_mode():
        made: Array = model(batch, torch.Generator().manual_seed(seed))[0].float().cpu().numpy()
    return made


def _held_out(run: Run, examples: Examples) -> dict[str, dict[str, Array]]:
    """Key -> features by role of the utterances to validate on, each cut to `valid_s`."""
    training = run.settings.training
    most = int(training.get("valid_s", 8.0) * run.settings.contract.frame_rate)
    return dict(examples.to_validate(int(training.get("valid_utterances", 8)), most))


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over the utterances for which it is a number."""
    each = {name: np.array([values[name] for values in found]) for name in (found[0] if found else ())}
    return {name: float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else math.nan
            for name, values in each.items()}


def _tell_card(run: Run, examples: Examples, step: int, means: Mapping[str, float]) -> None:
    """Note the evaluation for the model card. The baseline does not change, and is judged once."""
    held_out = _held_out(run, examples)
    baseline = BASELINES[run.kind]
    known = card.facts(run).get("evaluation", {}).get("systems", {}).get(baseline)
    worst = known or _means([_baseline(run, parts) for parts in held_out.values()])
    seconds = float(run.settings.training.get("valid_s", 8.0))
    of = f"Means over {len(held_out)} held-out utterances, the first {seconds:g} s of each, after {step:,} steps"
    systems = {"this model": means, baseline: worst}
    card.note(run, evaluation={"of": of, "systems": {
        system: {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}
        for system, values in systems.items()}})  # JSON has no NaN


def _baseline(run: Run, parts: Mapping[str, Array]) -> dict[str, float]:
    """The metrics of what knows nothing: of phases, or of what is sung."""
    contract = run.settings.contract
    if run.kind == "vocoder":
        return compare(parts["wave"], griffin_lim(parts["log-mel"], contract), contract)
    mean = statistics_of(run.path)["mel_mean"].numpy()
    return compare_mels(parts["log-mel"], np.broadcast_to(mean, parts["log-mel"].shape), contract)


def compare_mels(reference: Array, made: Array, contract: MelContract) -> dict[str, float]:
    """How far a log-mel (T, n_mels) is from the one it should be."""
    return {"log-mel L1": float(np.abs(np.asarray(reference, np.float64) - made).mean()),
            "mel MCD dB": metrics.mel_distortion(reference, made, contract)}


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


def _log_mels(reference: Array, made: Array, contract: MelContract) -> tuple[Array, Array]:
    """Both log-mels (T, n_mels). What is shorter than a window is followed by silence, which all of it needs."""
    short = max(0, contract.n_fft - len(reference))
    one, other = LogMel(**vars(contract)).load("cpu")([np.pad(np.asarray(wave, np.float32), (0, short))
                                                       for wave in (reference, made)])
    return one, other


def f0_of(wave: Array, sample_rate: int) -> Array:
    """f0 (T,) in Hz every 5 ms by WORLD's DIO and StoneMask: quick, and the same for both of a pair."""
    pyworld = metrics.world()
    x = np.ascontiguousarray(wave, np.float64)
    f0, times = pyworld.dio(x, sample_rate)
    return np.asarray(pyworld.stonemask(x, f0, times, sample_rate))


def spectrograms(mels: tuple[Array, Array], contract: MelContract) -> Any:
    """A figure: log-mels (T, n_mels) of the recording and of what was made, one colour scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    low, high = float(np.percentile(mels[0], 1)), float(mels[0].max())
    for axis, log_mel, title in zip(axes, mels, ("recording", "made"), strict=True):
        seconds = len(log_mel) / float(contract.frame_rate)
        axis.imshow(log_mel.T, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                    extent=(0, seconds, 0, contract.n_mels))
        axis.set_ylabel(f"{title}: mel band")
    axes[-1].set_xlabel("seconds")
    return figure
