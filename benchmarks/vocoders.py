"""Vocoders: how fast they are, how fast they learn, that they learn, and what half an hour of audio takes.

    python benchmarks/vocoders.py speed [--seconds 10] [--rounds 5] [--only NAME ...] [--device cuda] [--compile]
    python benchmarks/vocoders.py train [--steps 8] [--device cuda] [--compile]
    python benchmarks/vocoders.py learn [--only NAME ...] [-o FOLDER]
    python benchmarks/vocoders.py memory [--minutes 3 30]

speed: networks of published size with random weights, x real time, every way in turn in every round, medians; the
    baseline is the network as training leaves it: eager, float32, weight norm not folded. bf16 is what `featstore
    vocode --precision bf16` runs; its drift is the mean difference of the log-mels of both outputs, at one level.
train: steps per second of HiFi-GAN V1 and Vocos with all their discriminators, and the share of them spent waiting for
    the loader, after the first batch.
learn: every vocoder that is trained against discriminators, in a small size, on eight clips of half a second at 16 kHz;
    log-mel L1 of copy synthesis before and after, beside a resynthesis that has the right magnitudes and random phases;
    how far bf16 takes what was learnt; and the same training once more with every clip's waveform beside the log-mel
    and f0 of the next one, judged as the first: what it makes of a clip's own log-mel. Pictures go to FOLDER.
memory: peak resident memory of `featstore vocode` for a short and a long recording, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featstore as fs
from featstore_extractors import parse
from featstore_extractors.signal import LogMel, MelContract
from featstore_zoo import find, metrics, training, validation, vocode
from featstore_zoo import run as runs

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "examples" / "corpus"

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]  # key -> a recording and what was made of it, (N,) each


# --- learn

CLIPS = {"berklee_female/aa_Db5": 1.0, "berklee_male/aa_A3": 1.0, "ljspeech/LJ001-0002": 0.5,
         "ljspeech/LJ001-0004": 1.0, "smstools_vignesh/vignesh": 1.0, "vctk_p225/p225_003": 1.0,
         "vctk_p226/p226_003": 2.0, "vocadito_S1/vocadito_1": 2.0}  # where there is voice, s
CLIP_S = 0.5
FEATURES = ("log-mel", "f0:dio", "wave")
SMALL = ("log-mel,sample_rate=16000,n_mels=80,fmax=8000", "f0:dio", "wave,sample_rate=16000")  # all clips reach 8 kHz
ENOUGH = 0.5  # log-mel L1 at most, and less than random phases have

# Many small steps, of a whole clip each. The judges learn as fast as the vocoder, ten times faster than in recipes:
# MelGAN's feature matching x 10 then outweighs the log-mel several times, and it learned nothing.
JUDGES = {"discriminators": ["mpd"], "mpd_periods": [5], "discriminator_width": 0.05}
COMMON = JUDGES | {"batch": 1, "frames": 32, "ema": 0.98, "weight_decay": 0.0, "decay": 0.5, "decay_every": 600,
                   "validate_every": 10**6, "save_every": 10**6, "learning_rate": 3e-3, "valid_utterances": 0}
BLOCKS = {"channels": 128, "block_kernels": [3], "block_dilations": [[1, 3]]}
STEPS_UP = {"upsample_rates": [8, 8, 4], "upsample_kernels": [16, 16, 8]}
LEARN: dict[str, dict[str, Any]] = {
    "hifigan": BLOCKS | STEPS_UP | {"steps": 2000},
    "nsf-hifigan": BLOCKS | STEPS_UP | {"steps": 2400},
    "bigvgan": BLOCKS | STEPS_UP | {"block_dilations": [[1]], "steps": 2200},
    "melgan": {"channels": 16, "residual_layers": 2, "upsample_rates": [8, 8, 4], "lambda_feature": 1.0, "steps": 2200},
    "apnet": BLOCKS | {"steps": 1500},
    "vocos": {"dim": 128, "hidden": 256, "layers": 4, "decay_every": 250, "steps": 600},
}


def clips(home: Path, requests: tuple[str, ...] = FEATURES) -> fs.Store:
    """A store of eight clips of recordings."""
    import soundfile as sf

    for key, start in CLIPS.items():
        path = (CORPUS / key).with_suffix(".flac")
        rate = sf.info(path).samplerate
        wave, _ = sf.read(path, start=int(start * rate), frames=int(CLIP_S * rate), dtype="float32", always_2d=True)
        (home / "clips" / key).parent.mkdir(parents=True, exist_ok=True)
        sf.write((home / "clips" / key).with_suffix(".flac"), wave.mean(1), rate)
    store = fs.create(home / "clips.zarr")
    report = fs.extract(fs.corpus(home / "clips"), store, parse(*requests), workers=0)
    if report.failures:
        raise SystemExit(f"{report.failures[0].utterance}: {report.failures[0].reason}")
    return fs.open(home / "clips.zarr")


def mismatched(home: Path, store: fs.Store) -> fs.Store:
    """The same recordings, each with the log-mel and f0 of the next."""
    keys = list(store.utterances)
    other = fs.create(home / "mismatched.zarr")
    with other.writer() as writer:
        for name, feature in store.features.items():
            writer.declare(name, feature.spec)
        for key, following in zip(keys, keys[1:] + keys[:1], strict=True):
            for name in store.features:
                row = store[key if name == "wave" else following, name]
                writer.write(key, name, row.read(), scale=row.scale)
    return fs.open(home / "mismatched.zarr")


def recordings(store: fs.Store) -> dict[str, np.ndarray]:
    """Key -> waveform (N,), cut to whole frames of the log-mel."""
    view = store.view(["log-mel", "wave"], like="log-mel")
    return {key: view[key]["wave"] for key in view}


def fields_of(name: str) -> dict[str, Any]:
    return COMMON | LEARN[name]


def learnt(home: Path, name: str, store: fs.Store, **changed: Any) -> runs.Run:
    """The run of a small vocoder that was trained on all of a store."""
    run = training.prepare(home, store, name, fields=fields_of(name) | changed)
    training.train(home, store.path, workers=0)
    return run


def copied(run: runs.Run, model: Any, store: fs.Store, precision: vocode.Precision = "32") -> Pairs:
    """Key -> the recording and what the vocoder makes of its features."""
    roles = {role: items[0].name for role, items in run.settings.reads.items()}
    view = store.view(list(roles.values()), like=roles["log-mel"])
    clips = {key: {role: view[key][name] for role, name in roles.items()} for key in view}
    return {key: (clip["wave"], vocode.synthesise(model, clip["log-mel"], clip.get("f0"), precision=precision))
            for key, clip in clips.items()}


def judged(pairs: Pairs, contract: MelContract) -> dict[str, float]:
    """Mean log-mel L1 and F0CORR."""
    l1 = [validation.log_mel_l1(real, made, contract) for real, made in pairs.values()]
    tracks = [(validation.f0_of(real, contract.sample_rate), validation.f0_of(made, contract.sample_rate))
              for real, made in pairs.values()]
    one, other = (np.concatenate(side) for side in zip(*tracks, strict=True))
    return {"log-mel L1": float(np.mean(l1)), "F0CORR": metrics.f0_correlation(one, other)}


def random_phase(wave: np.ndarray, contract: MelContract, seed: int = 0) -> np.ndarray:
    """The waveform with its own magnitudes and random phases, by inverse STFT."""
    import librosa

    sizes = {"hop_length": contract.hop_length, "win_length": contract.win_length}
    spectrum = np.abs(librosa.stft(wave, n_fft=contract.n_fft, **sizes))
    phase = np.random.default_rng(seed).uniform(0, 2 * np.pi, spectrum.shape)
    return np.asarray(librosa.istft(spectrum * np.exp(1j * phase), length=len(wave), **sizes), np.float32)


SHOWN = ("ljspeech/LJ001-0004", "vocadito_S1/vocadito_1")


def pictured(path: Path, columns: list[dict[str, np.ndarray]], contract: MelContract) -> None:
    """Log-mels of waveforms under their titles, a column for each recording, each on the colours of its first."""
    from matplotlib.figure import Figure

    extract = LogMel(**vars(contract)).load("cpu")
    rows = len(columns[0])
    figure = Figure(figsize=(4.5 * len(columns), 0.8 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), sharex=True, squeeze=False)
    for column, waves in zip(axes.T, columns, strict=True):
        mels = extract([wave.astype(np.float32) for wave in waves.values()])
        low, high = float(np.percentile(mels[0], 1)), float(mels[0].max())
        for axis, title, mel in zip(column, waves, mels, strict=True):
            axis.imshow(mel.T, origin="lower", aspect="auto", vmin=low, vmax=high, cmap="magma",
                        interpolation="nearest", extent=(0, len(mel) / float(contract.frame_rate), 0, contract.n_mels))
            axis.set_yticks([])
            axis.set_ylabel(title.replace(" ", "\n") if waves is columns[0] else "", fontsize=7)
        axis.set_xlabel("seconds", fontsize=7)
    figure.savefig(path, dpi=80)


def learn(names: list[str], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        store = clips(home, SMALL)
        contract = MelContract.from_settings(store.feature("log-mel").spec.settings)
        mismatched(home, store)
        waves = recordings(store)
        random = {key: (wave, random_phase(wave, contract)) for key, wave in waves.items()}
        chance = judged(random, contract)
        print(f"copy synthesis of {len(waves)} clips of {CLIP_S:g} s: mean log-mel L1, F0CORR over all of them\n")
        print(f"random phases: log-mel L1 {chance['log-mel L1']:.2f}, F0CORR {chance['F0CORR']:.3f}; "
              f"to be reached: L1 {ENOUGH:g}\n")
        print(f"{'':12} {'M':>5} {'steps':>5} {'CPU s':>6} {'before':>7} {'after':>6} {'F0CORR':>7} {'bf16':>6}"
              f"  {'of its pairs':>12} {'of its own':>6} {'F0CORR':>7}")
        after = {"recording": {key: wave for key, wave in waves.items()},
                 "random phases": {key: made for key, (_, made) in random.items()}}
        for name in names:
            after |= _learn_one(home, name, store, contract)
            pictured(out / f"{name}.png", _columns({"recording": after["recording"]} | {
                title: made for title, made in after.items() if title.startswith(name)}), contract)
        pictured(out / "learnt.png", _columns({title: made for title, made in after.items()
                                               if not title.endswith("mismatched")}), contract)


def _columns(made: dict[str, dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    return [{title: waves[key] for title, waves in made.items()} for key in SHOWN]


def _learn_one(home: Path, name: str, store: fs.Store, contract: MelContract) -> dict[str, dict[str, np.ndarray]]:
    """Title -> key -> what was made, before and after both trainings of a vocoder; prints its row."""
    fresh = training.prepare(home / f"{name}-0", store, name, fields=fields_of(name))
    torch.manual_seed(0)
    before = copied(fresh, fresh.network().eval(), store)
    begin = time.process_time()
    run = learnt(home / name, name, store)
    took = time.process_time() - begin
    model = runs.load(run.path).model
    after, half = copied(run, model, store), copied(run, model, store, "bf16")
    drift = judged({key: (whole, half[key][1]) for key, (_, whole) in after.items()}, contract)
    astray = home / "mismatched.zarr"
    wrong = learnt(home / f"{name}-mismatched", name, fs.open(astray))
    control, learned = (copied(wrong, runs.load(wrong.path).model, heard) for heard in (store, fs.open(astray)))
    found, failed, own = (judged(pairs, contract) for pairs in (after, control, learned))
    weights = sum(weight.numel() for weight in fresh.network().fold().parameters())
    print(f"{name:12} {weights / 1e6:5.2f} {LEARN[name]['steps']:5} {took:6.0f} "
          f"{judged(before, contract)['log-mel L1']:7.2f} {found['log-mel L1']:6.2f} {found['F0CORR']:7.3f} "
          f"{drift['log-mel L1']:6.3f}  {own['log-mel L1']:12.2f} {failed['log-mel L1']:6.2f} {failed['F0CORR']:7.3f}",
          flush=True)
    return {f"{name} {when}": {key: made for key, (_, made) in pairs.items()}
            for when, pairs in (("before", before), ("after", after), ("mismatched", control))}


# --- speed

ANCHORS = """published, of other machines: HiFi-GAN V1 495 x and Vocos 6,697 x real time on an A100, 5.8 x and 170 x on
a server CPU (Siuzdak, 2306.00814); BigVGAN v2 24 kHz 163 to 240 x with its CUDA kernel (its model card)"""
PUBLISHED = {"hifigan v1": ("hifigan", "v1"), "hifigan v3": ("hifigan", "v3"), "nsf-hifigan": ("nsf_hifigan", ""),
             "bigvgan base": ("bigvgan", "base"), "melgan": ("melgan", "base"), "apnet": ("apnet", "base"),
             "vocos": ("vocos", "base"), "diffwave 6": ("diffwave", "fast")}


def network(package: str, preset: str) -> Any:
    """A network of published size with random weights."""
    torch.manual_seed(0)
    config = find(package).Config
    return find(package).Model(config.preset(preset) if preset else config()).eval()


def features(contract: MelContract, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """log-mel (T, n_mels) and f0 (T,) of recorded singing, repeated to a length."""
    import soundfile as sf
    import soxr

    wave, rate = sf.read(CORPUS / "vocadito_S1" / "vocadito_1.flac", dtype="float32")
    wave = soxr.resample(wave, rate, contract.sample_rate)
    wave = np.tile(wave, int(seconds * contract.sample_rate / len(wave)) + 1)[:int(seconds * contract.sample_rate)]
    mel = LogMel(**vars(contract)).load("cpu")([wave])[0]
    return mel, np.full(len(mel), 220.0, np.float32)


def speed(names: list[str], seconds: float, rounds: int, device: str, compiled: bool) -> None:
    print(f"x real time, {seconds:g} s of singing at once, medians of {rounds} rounds; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, bf16 in the processor: {_has_bf16()}\n")
    ways = ["eager", "folded", "bf16", *(["compiled"] if compiled else [])]
    print(f"{'':13} {'M':>6}" + "".join(f"{way:>10}" for way in ways) + f"{'bf16 gain':>11} {'drift':>6}")
    for name in names:
        took, drift, count = _speeds(*PUBLISHED[name], seconds, rounds, device, ways)
        print(f"{name:13} {count / 1e6:6.1f}" + "".join(f"{seconds / took[way]:10.2f}" for way in ways)
              + f"{took['eager'] / took['bf16']:11.2f} {drift:6.3f}", flush=True)
    print(f"\n{ANCHORS}")


def _speeds(package: str, preset: str, seconds: float, rounds: int, device: str,
            ways: list[str]) -> tuple[dict[str, float], float, int]:
    """Median seconds of each way, the drift of bf16, and the number of weights."""
    models = {way: vocode.on(network(package, preset), device, fold=way != "eager", compiled=way == "compiled")
              for way in ways}
    config = models["eager"].config
    mel, f0 = features(config.contract, seconds)
    count = sum(weight.numel() for weight in models["folded"].parameters())

    def made(way: str) -> np.ndarray:
        return vocode.synthesise(models[way], mel, f0, precision="bf16" if way == "bf16" else "32", chunk=len(mel))

    first = {way: made(way) for way in ways}  # warm
    took: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            begin = time.perf_counter()
            made(way)
            took[way].append(time.perf_counter() - begin)
    loud = 0.5 / max(1e-9, float(np.abs(first["folded"]).max()))  # random weights whisper, below the floor of log-mels
    drift = validation.log_mel_l1(loud * first["folded"], loud * first["bf16"], config.contract)
    return {way: statistics.median(times) for way, times in took.items()}, drift, count


def _has_bf16() -> str:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return ", ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags) or "no"


# --- train


def train(steps: int, device: str, compiled: bool) -> None:
    print(f"training, steps per second (batch 2 of 32 frames, all discriminators), share of waiting; {device}\n")
    print(f"{'':13} {'precision':>10} {'compiled':>9} {'steps/s':>8} {'waiting':>8}")
    with tempfile.TemporaryDirectory() as place:
        store = clips(Path(place))
        for name in ("hifigan", "vocos"):
            for precision in ("32", "bf16"):
                for compile_ in (False, True) if compiled else (False,):
                    _train_one(Path(place) / f"{name}-{precision}-{compile_}", store, name, steps, device,
                               {"precision": precision, "compile": compile_})


def _train_one(home: Path, store: fs.Store, name: str, steps: int, device: str, fields: dict[str, Any]) -> None:
    told: list[training.Told] = []
    more = {"steps": steps, "batch": 2, "valid_utterances": 0, "validate_every": 10**6, "save_every": 10**6}
    training.prepare(home, store, name, fields=more | fields)
    training.train(home, store.path, device=device, workers=2, progress=told.append)
    warm = told[min(2, len(told) - 2)]
    rate = (told[-1].step - warm.step) / (told[-1].elapsed_s - warm.elapsed_s)
    print(f"{name:13} {fields['precision']:>10} {'yes' if fields['compile'] else 'no':>9} {rate:8.2f} "
          f"{told[-1].loader_share:8.1%}", flush=True)


# --- memory


def memory(minutes: list[float]) -> None:
    """Each length in a process of its own: the peak of a process never falls."""
    print("featstore vocode of one recording by a small Vocos, from extraction to the file: peak resident memory\n")
    for length in minutes:
        done = subprocess.run([sys.executable, __file__, "memory", "--alone", "--minutes", str(length)], text=True,
                              capture_output=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        print(done.stdout.strip(), flush=True)


def memory_alone(minutes: float) -> None:
    import soundfile as sf

    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(home / "cache")
        voice, rate = sf.read(CORPUS / "vocadito_S1" / "vocadito_1.flac", dtype="int16")
        with sf.SoundFile(home / "song.flac", "w", rate, 1) as file:
            left = int(minutes * 60 * rate)
            while left > 0:
                file.write(voice[:left])
                left -= len(voice)
        store = clips(home)
        run = training.prepare(home / "run", store, "vocos", smoke=True)
        runs.save(run.path, run.settings, run.network().state_dict(), 0)
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (made,) = vocode.files([home / "song.flac"], run.path, home / "out.wav")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{minutes:5g} min: {begin / 1024:6.0f} MiB before, {peak / 1024:6.0f} MiB at most; "
              f"{made.seconds / made.took_s:.1f} x real time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "train", "learn", "memory"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the vocoders")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--minutes", type=float, nargs="+", default=[3, 30])
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "build" / "vocoders", help="where pictures go")
    asked = parser.parse_args()
    if asked.what == "speed":
        speed(asked.only or list(PUBLISHED), asked.seconds, asked.rounds, asked.device, asked.compile)
    elif asked.what == "train":
        train(asked.steps, asked.device, asked.compile)
    elif asked.what == "learn":
        torch.set_num_threads(1)  # layers this small lose more by sharing
        learn(asked.only or list(LEARN), asked.out)
    elif asked.alone:
        memory_alone(asked.minutes[0])
    else:
        memory(asked.minutes)


if __name__ == "__main__":
    main()
