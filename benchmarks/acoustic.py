"""Acoustic models: how fast they sample, how fast they train, that they learn what they are told.

    python benchmarks/acoustic.py sampling [--seconds 10] [--rounds 5] [--only NAME ...] [--device cuda]
    python benchmarks/acoustic.py train [--steps 8] [--device cuda] [--compile]
    python benchmarks/acoustic.py learn [--only NAME ...] [-o FOLDER]

sampling: real-time factor (seconds of work for a second of song, less is faster) of networks of published size with
    random weights, by sampler and steps, every way in turn in every round, medians. "plain" is DiffWaveNet as its
    equations are written: the condition projected in every step, gates as two convolutions, float32.
train: milliseconds of a step in float32 and under autocast, and the share of it spent waiting for the loader.
learn: each model, in a small size, on eight sung clips of ../shared/make_corpus.py (or $FEATSTORE_SHARED; it needs
    espeak-ng): log-mel L1 of what it makes of their features beside that of their mean log-mel; the same with the
    content of other clips; through a small NSF-HiFiGAN of the same clips, how f0 follows the exact melody, and how far
    its median moves when f0 is moved by four semitones (and, by frames, the median of how far each moves). Content is
    a stand-in that needs no weights: see `Cepstra`. Then samplers: MCD of few steps from many. Pictures go to FOLDER.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

import featstore as fs
from featstore_extractors import parse
from featstore_extractors.signal import LogMel, MelContract
from featstore_zoo import diffusion, find, metrics, training, validation, vocode
from featstore_zoo import run as runs

Array = np.ndarray
ROOT = Path(__file__).resolve().parents[1]
MODELS = ("diffwavenet-svc", "transformer-svc", "como-svc", "vits-svc")


# --- learn


@dataclass(frozen=True)
class Cepstra:
    """What stands in for a content encoder: the envelope of the spectrum, 50 times a second, without pitch and level.

    Waveform (N,) -> (T, 12): the cosine transform of a log-mel of 40 bands, without its mean; harmonics are finer than
    what twelve cosines can follow.
    """

    bands: int = 40
    dim: int = 12
    name: ClassVar[str] = "cepstra"
    version: ClassVar[int] = 1
    kind: ClassVar[str] = "continuous"
    sample_rate: ClassVar[int] = 16000
    frame_rate: ClassVar[Fraction] = Fraction(50)
    centre_s: ClassVar[Fraction] = Fraction(1, 100)
    dtype: ClassVar[str] = "float32"

    def load(self, device: str) -> Callable[[list[Array]], list[Array]]:
        log_mel = LogMel(sample_rate=16000, n_fft=1024, win_length=1024, hop_length=320, n_mels=self.bands, fmin=0,
                         fmax=8000).load(device)
        places = (np.arange(self.bands) + 0.5) / self.bands
        waves = np.cos(np.pi * np.outer(places, np.arange(1, self.dim + 1))) * 2 / self.bands
        return lambda sounds: [(mel @ waves).astype(np.float32) for mel in log_mel(sounds)]


SINGERS, SONGS, SECONDS = 2, 4, 3.0
SEMITONES = 4
MEL = "log-mel:24k-100,n_mels=40"  # noise of all bands has to pass a diffusion's channels, which are few here
COMMON: dict[str, Any] = {"batch": 4, "frames": 64, "ema": 0.98, "weight_decay": 0.0, "decay": 0.5,
                          "validate_every": 10**6, "save_every": 10**6, "valid_utterances": 0, "dropout": 0.0,
                          "width": 64}
STACK = {"channels": 96, "layers": 6, "step_dim": 64, "step_hidden": 128, "learning_rate": 2e-3, "decay_every": 1000}
LEARN: dict[str, dict[str, Any]] = {
    # Noise as DiffSVC has it. Ancestral sampling, since what a network trained this briefly leaves of the noise adds up
    # along the path of the others; see the table of samplers.
    "diffwavenet-svc": STACK | {"steps": 6000, "decay_every": 1500, "noise_steps": 100, "last_beta": 0.06,
                                "sampler": "ddpm", "sampling_steps": 50},
    "transformer-svc": {"layers": 3, "hidden": 128, "steps": 1000, "decay_every": 300, "learning_rate": 1e-3},
    "como-svc": STACK | {"encoder_layers": 2, "hidden": 128, "steps": 3500},
    "como-svc:student": {"steps": 500, "decay_every": 500, "learning_rate": 5e-4},
    # The prior's divergence weighs a tenth of the model's default, with which it was further off. A wider latent knows
    # the pitch, too, and holds back a key that is moved (docs/benchmarks.md).
    "vits-svc": {"latent": 16, "hidden": 128, "prior_layers": 2, "posterior_layers": 4, "flow_layers": 2, "flows": 2,
                 "speaker_width": 16, "slice_frames": 32, "discriminators": [], "mel_loss": "multi", "lambda_kl": 0.1,
                 "steps": 4800, "batch": 2, "decay_every": 1700, "learning_rate": 3e-3,
                 "generator_fields": [["channels", 128], ["block_kernels", [3]], ["block_dilations", [[1, 3]]]]},
}
SAMPLERS: dict[str, list[dict[str, Any]]] = {
    "diffwavenet-svc": [{"sampler": "dpm-solver++", "sampling_steps": steps} for steps in (5, 10, 20, 100)]
    + [{"sampler": "ddim", "sampling_steps": steps} for steps in (10, 100)]
    + [{"sampler": "ddpm", "sampling_steps": 100}],
    "como-svc": [{"sampling_steps": steps} for steps in (10, 40)],
    "como-svc:student": [{"sampling_steps": steps} for steps in (1, 4)],
}
# Half as wide (2000 steps of four), up to two fifths of a clip are heard more than a semitone out.
VOCODER: dict[str, Any] = {"channels": 128, "block_kernels": [3], "block_dilations": [[1, 3]], "discriminators": [],
                           "batch": 2, "frames": 32, "ema": 0.98, "weight_decay": 0.0, "decay": 0.5,
                           "decay_every": 800, "validate_every": 10**6, "save_every": 10**6, "valid_utterances": 0,
                           "learning_rate": 3e-3, "mel_loss": "multi", "steps": 2400}


def shared() -> Path:
    """The folder of corpus makers. SystemExit says how to name it."""
    found = Path(os.environ.get("FEATSTORE_SHARED", ROOT.parent / "shared"))
    if not (found / "make_corpus.py").exists():
        raise SystemExit(f"{found} has no make_corpus.py: set FEATSTORE_SHARED to the folder that has it")
    return found


def songs(home: Path, singers: int = SINGERS, count: int = SONGS, seconds: float = SECONDS) -> fs.Store:
    """A store of sung clips, the same songs by each singer, with the exact melody beside it."""
    subprocess.run([sys.executable, "-W", "ignore", shared() / "make_corpus.py", "--out", home / "songs", "--kind",
                    "singing", "--speakers", str(singers), "--utterances", str(count), "--seconds", str(seconds),
                    "--sample-rate", "24000"], check=True, capture_output=True)
    store = fs.create(home / "songs.zarr")
    extractors = parse(MEL, "f0", "loudness", "wave") | {"cepstra": Cepstra()}
    report = fs.extract(fs.corpus(home / "songs"), store, extractors, workers=0)
    if report.failures:
        raise SystemExit(f"{report.failures[0].utterance}: {report.failures[0].reason}")
    return fs.open(home / "songs.zarr")


def melody(home: Path, key: str, count: int) -> Array:
    """The exact f0 (count,) in Hz of a clip, every 5 ms."""
    with np.load((home / "songs" / "truth" / key).with_suffix(".npz")) as truth:
        f0, period = truth["f0"], float(truth["frame_period_s"])
    at = np.round(np.arange(count) * 0.005 / period).astype(int)
    return np.where(at < len(f0), f0[np.minimum(at, len(f0) - 1)], 0)


def learnt(home: Path, name: str, store: fs.Store, init: Path | None = None, **more: Any) -> runs.Run:
    """The run of a small model that was trained on all of a store."""
    config = find(name.partition(":")[0]).Config
    known = {*config.__dataclass_fields__, *training.Training.__dataclass_fields__}
    fields = {field: value for field, value in (COMMON | LEARN[name] | more).items() if field in known}
    run = training.prepare(home, store, name, fields=fields, content=["cepstra"], init=init)
    training.train(home, store.path, workers=0)
    return runs.load(run.path)


def vocoder(home: Path, store: fs.Store) -> Any:
    """A small NSF-HiFiGAN trained on the clips."""
    training.prepare(home, store, "nsf-hifigan", fields=VOCODER)
    training.train(home, store.path, workers=0)
    return vocode.on(runs.load(home).model, "cpu")


def heard(run: runs.Run, store: fs.Store) -> dict[str, dict[str, Array]]:
    """Key -> what a model is told of each clip, whole."""
    names = {role: items[0].name for role, items in run.settings.reads.items()} | {"wave": "wave"}
    view = store.view(list(set(names.values())), like=names["log-mel"])
    rows = {key: run.singers[str(store.utterances[key].speaker)].row for key in view}
    return {key: {role: view[key][name] for role, name in names.items()} | {"singer": np.array(rows[key])}
            for key in view}


def of_others(clips: Mapping[str, dict[str, Array]]) -> dict[str, dict[str, Array]]:
    """The clips with the content of another song each, as long as their own."""
    keys = sorted(clips)
    return {key: clips[key] | {"cepstra": np.resize(clips[other]["cepstra"], clips[key]["cepstra"].shape)}
            for key, other in zip(keys, keys[1:] + keys[:1], strict=True)}


def moved(clips: Mapping[str, dict[str, Array]], semitones: float) -> dict[str, dict[str, Array]]:
    """The clips with f0 moved."""
    return {key: clip | {"f0": (clip["f0"] * 2 ** (semitones / 12)).astype(np.float32)} for key, clip in clips.items()}


def mels_of(model: Any, clips: Mapping[str, dict[str, Array]], contract: MelContract) -> dict[str, Array]:
    """Key -> the log-mel that a model makes of each clip, of its waveform where it makes one."""
    made = {key: validation.made_of(model, clip) for key, clip in clips.items()}
    if model.gives == "wave":
        return dict(zip(made, LogMel(**vars(contract)).load("cpu")(list(made.values())), strict=True))
    return made


def error(made: Mapping[str, Array], clips: Mapping[str, dict[str, Array]]) -> float:
    """Mean absolute difference from the clips' own log-mels, over frames and bands of all."""
    return float(np.concatenate([np.abs(made[key] - clip["log-mel"]).ravel() for key, clip in clips.items()]).mean())


def waves_of(model: Any, speaker: Any, clips: Mapping[str, dict[str, Array]]) -> dict[str, Array]:
    """Key -> waveform, through the vocoder where the model makes none."""
    made = {key: validation.made_of(model, clip) for key, clip in clips.items()}
    if model.gives == "wave":
        return made
    return {key: vocode.synthesise(speaker, mel, clips[key]["f0"]) for key, mel in made.items()}


def tracks(waves: Mapping[str, Array], rate: int) -> dict[str, Array]:
    return {key: validation.f0_of(wave, rate) for key, wave in waves.items()}


def learn(names: list[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        store = songs(home)
        contract = MelContract.from_settings(store.feature("log-mel").spec.settings)
        begin = time.process_time()
        speaker = vocoder(home / "vocoder", store)
        seconds = store.utterances.hours * 3600
        print(f"{len(store.utterances)} clips of {SINGERS} singers, {seconds:.0f} s; log-mel L1\n")
        print(f"{'':16} {'steps':>5} {'CPU s':>6} {'mean mel':>9} {'made':>6} {'ratio':>6} {'other content':>14} "
              f"{'F0CORR':>7} {'+4 gives':>9} {'by frames':>10}", flush=True)
        print(f"{'vocoder':16} {VOCODER['steps']:5} {time.process_time() - begin:6.0f}", flush=True)
        sampled = []
        for name in names:
            begin = time.process_time()
            run = learnt(home / name.replace(":", "-"), name, store, **_first(home, name))
            took = time.process_time() - begin
            clips = heard(run, store)
            print(_row(name, run, clips, speaker, contract, home, took), flush=True)
            sampled += _sampled(name, run, clips, contract)
            key = sorted(clips)[0]
            pair = clips[key]["log-mel"], mels_of(run.model, {key: clips[key]}, contract)[key]
            validation.spectrograms(pair, contract).savefig(out / f"{name.replace(':', '-')}.png", dpi=100)
        if sampled:
            print("\nMCD from log-mels of all clips, dB\n\n" + "\n".join(sampled))


def _first(home: Path, name: str) -> dict[str, Any]:
    """What a student begins with."""
    return {"init": home / name.partition(":")[0]} if name.endswith(":student") else {}


def _sampled(name: str, run: runs.Run, clips: dict[str, dict[str, Array]], contract: MelContract) -> list[str]:
    """A line for each way to sample, beside the mean log-mel."""
    lines = [f"{'mean log-mel':32} {_mcd(mean_mel(clips), clips, contract):6.2f}"] if name in SAMPLERS else []
    for changes in SAMPLERS.get(name, []):
        run.model.set_sampling(**changes)
        told = f"{name} {' '.join(str(value) for value in changes.values())}"
        lines.append(f"{told:32} {_mcd(mels_of(run.model, clips, contract), clips, contract):6.2f}")
    return lines


def _mcd(made: Mapping[str, Array], clips: Mapping[str, dict[str, Array]], contract: MelContract) -> float:
    return float(np.mean([metrics.mel_distortion(clip["log-mel"], made[key], contract) for key, clip in clips.items()]))


def mean_mel(clips: Mapping[str, dict[str, Array]]) -> dict[str, Array]:
    """Key -> the mean log-mel of all clips, as often as the clip has frames: what knows nothing of what is sung."""
    mean = np.concatenate([clip["log-mel"] for clip in clips.values()]).mean(0)
    return {key: np.broadcast_to(mean, clip["log-mel"].shape) for key, clip in clips.items()}


def _row(name: str, run: runs.Run, clips: dict[str, dict[str, Array]], speaker: Any, contract: MelContract, home: Path,
         took: float) -> str:
    rate = contract.sample_rate
    worst = error(mean_mel(clips), clips)
    made = error(mels_of(run.model, clips, contract), clips)
    astray = error(mels_of(run.model, of_others(clips), contract), clips)
    found = tracks(waves_of(run.model, speaker, clips), rate)
    exact = {key: melody(home, key, len(track)) for key, track in found.items()}
    corr = metrics.f0_correlation(*(np.concatenate(list(side.values())) for side in (exact, found)))
    higher = tracks(waves_of(run.model, speaker, moved(clips, SEMITONES)), rate)
    low, high = (np.concatenate(list(side.values())) for side in (found, higher))
    both = (low > 0) & (high > 0)
    of_medians = 12 * np.log2(np.median(high[both]) / np.median(low[both]))
    of_frames = np.median(12 * np.log2(high[both] / low[both]))
    return (f"{name:16} {run.steps:5} {took:6.0f} {worst:9.2f} {made:6.2f} {made / worst:6.2f} "
            f"{astray:6.2f} {astray / made - 1:+6.0%} {corr:7.3f} {of_medians:+9.2f} {of_frames:+10.2f}")


# --- sampling

HEARD: dict[str, Any] = {"content": (("whisper", 1024), ("contentvec", 768)), "singers": 8}
SAMPLED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "diffwavenet dpm-solver++ 10": ("diffwavenet-svc", {}, {"sampler": "dpm-solver++", "sampling_steps": 10}),
    "diffwavenet dpm-solver++ 20": ("diffwavenet-svc", {}, {"sampler": "dpm-solver++", "sampling_steps": 20}),
    "diffwavenet ddim 50": ("diffwavenet-svc", {}, {"sampler": "ddim", "sampling_steps": 50}),
    "diffwavenet ddpm 100": ("diffwavenet-svc", {}, {"sampler": "ddpm", "sampling_steps": 100}),
    "transformer": ("transformer-svc", {}, {}),
    "como teacher 40": ("como-svc", {}, {"sampling_steps": 40}),
    "como student 1": ("como-svc", {"stage": "student"}, {"sampling_steps": 1}),
    "como student 4": ("como-svc", {"stage": "student"}, {"sampling_steps": 4}),
    "vits, with its waveform": ("vits-svc", {}, {}),
}


class Plain(torch.nn.Module):
    """The denoiser of a DiffWaveNet as its equations are written: nothing made once, gates by a convolution each."""

    def __init__(self, denoiser: Any, condition: torch.Tensor) -> None:
        super().__init__()
        self.denoiser, self.condition = denoiser, condition.transpose(1, 2)
        self.gates = [[(layer.weight.chunk(2), layer.bias.chunk(2)) for layer in block.gau.values()]
                      for block in denoiser.neural_network.residual_blocks]

    def forward(self, x: torch.Tensor, step: float, told: Any = None, mask: Any = None) -> torch.Tensor:
        net = self.denoiser.neural_network
        y, skips = net.input(x.transpose(1, 2)), []
        where = self.denoiser.diff_encoder(torch.full((len(x),), float(step)))
        for block, (listened, told_) in zip(net.residual_blocks, self.gates, strict=True):
            conv = block.gau["conv"]
            value, gate = (
                F.conv1d(y + where[..., None], listened[0][k], listened[1][k], padding="same", dilation=conv.dilation)
                + F.conv1d(self.condition, told_[0][k], told_[1][k]) for k in range(2))
            residual, skip = block.out_proj(torch.tanh(value) * torch.sigmoid(gate)).chunk(2, 1)
            y = (y + residual) / 2**0.5
            skips.append(skip)
        return net.out_proj(torch.stack(skips).sum(0) / len(skips) ** 0.5).transpose(1, 2)


def plainly(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The log-mel of a DiffWaveNet by `Plain`."""
    condition = model.condition_encoder(batch)
    plain = Plain(model.acoustic_mapper, condition)
    draw = diffusion.draws(torch.Generator().manual_seed(0), condition.new_empty(*condition.shape[:2],
                                                                                 model.config.n_mels))
    c = model.config
    return model.unscaled(diffusion.sample(plain, draw(0), model.schedule, c.sampling_steps, c.sampler, draw))


def network(name: str, fields: dict[str, Any], sampling: dict[str, Any], device: str) -> Any:
    """A network of published size with random weights, none of which is 0."""
    torch.manual_seed(0)
    model = find(name).Model(find(name).Config(**HEARD | fields)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(0, 0.05)
    model.set_sampling(**sampling)
    return model.to(device)


def told_of(config: Any, seconds: float, device: str) -> dict[str, torch.Tensor]:
    """A batch of one song of random features."""
    frames = int(seconds * config.frame_rate)
    seeded = torch.Generator().manual_seed(0)
    batch = {name: torch.randn(1, frames, dim, generator=seeded) for name, dim in config.content}
    batch |= {"f0": torch.full((1, frames), 220.0), "loudness": torch.full((1, frames), -20.0),
              "singer": torch.zeros(1, dtype=torch.long)}
    return {key: value.to(device) for key, value in batch.items()}


def sampling(names: list[str], seconds: float, rounds: int, device: str) -> None:
    print(f"seconds of work for a second of song; {seconds:g} s at once, medians of {rounds} rounds in which the "
          f"ways take turns; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, bf16 in the "
          f"processor: {has_bf16()}\n")
    print(f"{'':28} {'M':>6} {'plain':>7} {'float32':>8} {'bf16':>7} {'plain / best':>13} {'drift of bf16':>14}")
    for name in names:
        package, fields, changes = SAMPLED[name]
        model = network(package, fields, changes, device)
        took, drift = _times(model, told_of(model.config, seconds, device), rounds, plain=name.endswith("++ 10"))
        each = {way: statistics.median(times) / seconds for way, times in took.items()}
        best = min(each["float32"], each["bf16"])
        gain = f"{each['plain'] / best:13.2f}" if "plain" in each else " " * 13
        first = f"{each['plain']:7.3f}" if "plain" in each else " " * 7
        count = sum(weight.numel() for weight in model.parameters()) / 1e6
        print(f"{name:28} {count:6.1f} {first} {each['float32']:8.3f} {each['bf16']:7.3f} {gain} "
              f"{drift:14.4f}", flush=True)


def _times(model: Any, batch: dict[str, torch.Tensor], rounds: int, plain: bool
           ) -> tuple[dict[str, list[float]], float]:
    """Seconds of each way in each round, and the mean difference of what bf16 makes, in log-mel or waveform."""
    def made(way: str) -> torch.Tensor:
        if way == "plain":
            return plainly(model, batch)
        with torch.autocast(batch["f0"].device.type, torch.bfloat16, enabled=way == "bf16"):
            result: torch.Tensor = model(batch, torch.Generator().manual_seed(0))
        return result.float().cpu()

    ways = [*(["plain"] if plain else []), "float32", "bf16"]
    took: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        first = {way: made(way) for way in ways}  # warm
        if plain:
            torch.testing.assert_close(first["plain"].cpu(), first["float32"], rtol=1e-3, atol=1e-3)
        for _ in range(rounds):
            for way in ways:
                begin = time.perf_counter()
                made(way)
                took[way].append(time.perf_counter() - begin)
    return took, float((first["float32"] - first["bf16"]).abs().mean())


def has_bf16() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags) or "no"


# --- train


def train(names: list[str], steps: int, device: str, compiled: bool) -> None:
    print("training, milliseconds a step (batch 2 of 128 frames, networks of published size), share of waiting; "
          f"{device}\n")
    print(f"{'':16} {'precision':>10} {'compiled':>9} {'ms':>8} {'waiting':>8}")
    with tempfile.TemporaryDirectory() as place:
        store = songs(Path(place))
        for name in names:
            for precision in ("32", "bf16"):
                for compile_ in (False, True) if compiled else (False,):
                    _train_one(Path(place) / f"{name}-{precision}-{compile_}", store, name, steps, device,
                               {"precision": precision, "compile": compile_})


def _train_one(home: Path, store: fs.Store, name: str, steps: int, device: str, fields: dict[str, Any]) -> None:
    told: list[training.Told] = []
    more = {"steps": steps, "batch": 2, "frames": 128, "valid_utterances": 0, "validate_every": 10**6,
            "save_every": 10**6}
    training.prepare(home, store, name, fields=more | fields, content=["cepstra"])
    training.train(home, store.path, device=device, workers=1, progress=told.append)
    warm = told[min(2, len(told) - 2)]
    took = (told[-1].elapsed_s - warm.elapsed_s) / (told[-1].step - warm.step)
    print(f"{name:16} {fields['precision']:>10} {'yes' if fields['compile'] else 'no':>9} {1000 * took:8.0f} "
          f"{told[-1].loader_share:8.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sampling", "train", "learn"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the models, or ways of sampling that begin so")
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build" / "acoustic", help="where pictures go")
    asked = parser.parse_args()
    if asked.what == "sampling":
        chosen = [name for name in SAMPLED if not asked.only or name.startswith(tuple(asked.only))]
        sampling(chosen, asked.seconds, asked.rounds, asked.device)
    elif asked.what == "train":
        train(asked.only or list(MODELS), asked.steps, asked.device, asked.compile)
    else:
        torch.set_num_threads(1)  # layers this small lose more by sharing
        learn(asked.only or list(LEARN), asked.out)


if __name__ == "__main__":
    main()
