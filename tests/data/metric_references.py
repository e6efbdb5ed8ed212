"""Writes metric_references.json: what published packages say of pairs of recordings in examples/corpus.

    pip install --no-deps pymcd==0.2.1 pysptk fastdtw torchmetrics==1.9.0 mir_eval==0.8.2 auraloss==0.4.0
    python tests/data/metric_references.py

Both recordings of a pair are cut as `metric_pairs.pair` cuts them; f0 is what `metric_pairs.f0` gives.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import auraloss
import librosa
import mir_eval
import numpy as np
import pystoi
import soundfile as sf
import torch
import torchmetrics
import torchmetrics.functional as F
from pesq import pesq
from pymcd.mcd import Calculate_MCD
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from metric_pairs import PAIRS, RATE, f0, pair  # noqa: E402


def mcd(one: np.ndarray, other: np.ndarray) -> float:
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{name}.wav" for name in "ab"]
        for path, wave in zip(paths, (one, other), strict=True):
            sf.write(path, wave, RATE, subtype="FLOAT")
        return float(Calculate_MCD("dtw_sl").calculate_mcd(*paths))


def warped(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Two curves along librosa's path."""
    _, path = librosa.sequence.dtw(x[None], y[None], metric="euclidean")
    path = path[::-1]
    return torch.from_numpy(x[path[:, 0]]), torch.from_numpy(y[path[:, 1]])


def amphion_f0(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    cents = [1200 * np.log2(x[x > 0] / 440) for x in (one, other)]
    x, y = warped(*[c - np.median(c) for c in cents])
    hz = warped(one, other)
    voicing = torchmetrics.classification.BinaryF1Score()(hz[1] > 0, hz[0] > 0)
    return {"amphion f0rmse": float(F.mean_squared_error(x, y, squared=False)),
            "amphion fpc": float(F.pearson_corrcoef(x, y)),
            "amphion f0rmse Hz": float(F.mean_squared_error(*hz, squared=False)), "amphion v_uv_f1": float(voicing)}


def amphion_energy(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    levels = []
    for wave in (one, other):
        spectrum = np.abs(librosa.stft(librosa.resample(wave, orig_sr=RATE, target_sr=22050), n_fft=1024,
                                       hop_length=256, pad_mode="constant").astype(np.complex128))
        levels.append(20 * np.log10(np.linalg.norm(spectrum, axis=0)))
    x, y = warped(*levels)
    return {"amphion energy_rmse": float(F.mean_squared_error(x, y, squared=False)),
            "amphion energy_pc": float(F.pearson_corrcoef(x, y))}


def framewise(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Of f0 on one grid, by equal times."""
    recall, false_alarm = mir_eval.melody.voicing_measures(one > 0, other > 0)
    voiced, unvoiced = (one > 0).sum(), (one == 0).sum()
    both = torch.from_numpy((one > 0) & (other > 0))
    cents = [torch.from_numpy(1200 * np.log2(np.maximum(x, 1) / 10))[both] for x in (one, other)]
    hz = [torch.from_numpy(x)[both] for x in (one, other)]
    voicing = torchmetrics.classification.BinaryF1Score()(torch.from_numpy(other > 0), torch.from_numpy(one > 0))
    return {"voicing error": float(((1 - recall) * voiced + false_alarm * unvoiced) / len(one)),
            "voicing f1": float(voicing),
            "f0 correlation": float(F.pearson_corrcoef(*cents)),
            "f0 rmse cents": float(F.mean_squared_error(*cents, squared=False)),
            "f0 rmse Hz": float(F.mean_squared_error(*hz, squared=False))}


def waveforms(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    count = min(len(one), len(other))
    x, y = (torch.from_numpy(wave[:count].astype(np.float64)) for wave in (one, other))
    resolutions = auraloss.freq.MultiResolutionSTFTLoss([512, 1024, 2048], [50, 120, 240], [240, 600, 1200])
    return {"si-sdr": float(scale_invariant_signal_distortion_ratio(y, x)),
            "stoi": float(pystoi.stoi(one[:count], other[:count], RATE)),
            "pesq": float(pesq(RATE, one[:count], other[:count], "wb")),
            "multi-resolution stft": float(resolutions(y[None, None].float(), x[None, None].float()))}


def main() -> None:
    found = {}
    for name in PAIRS:
        one, other = pair(name)
        pitches = f0(one), f0(other)
        count = min(map(len, pitches))
        found[name] = ({"amphion mcd": mcd(one, other)} | amphion_f0(*pitches) | amphion_energy(one, other)
                       | framewise(pitches[0][:count], pitches[1][:count]) | waveforms(one, other))
    (HERE / "metric_references.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
