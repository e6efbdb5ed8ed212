"""Conversion: keys, levels, silence, windows, what is cached, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import conversions
import numpy as np
import pytest
import soundfile as sf
import torch
from click.testing import CliRunner
from conftest import ROOT

import featstore as fs
from featstore.errors import (
    BadAudio,
    BadRequest,
    CannotLoad,
    ContractMismatch,
    IdentityMismatch,
    MissingFeature,
    MissingWeights,
)
from featstore_cli import cli
from featstore_zoo import convert, run, sources, vocode

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
CORPUS = ROOT / "examples" / "corpus"
SENTENCE = CORPUS / "vctk_p225" / "p225_003.flac"  # 7.5 s at 24 kHz, a woman
RATE = 24000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of runs by name, each made once: of models, and "voc", a vocoder."""
    home = tmp_path_factory.mktemp("runs")
    conversions.vocoder(home / "voc")
    for name in conversions.HEARD:
        conversions.acoustic(home / name, name)
    conversions.acoustic(home / "anybody", "transformer_svc", speaker="embedding")
    conversions.acoustic(home / "deaf", "transformer_svc", content=(), loudness="none")
    return home


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Two seconds of the sentence."""
    wave, _ = sf.read(SENTENCE, dtype="float32")
    return written(tmp_path_factory.mktemp("short") / "short.wav", wave[20000:68000])


def written(path, wave, rate=RATE):
    sf.write(path, wave, rate, "FLOAT" if path.suffix == ".wav" else None)
    return path


def converted(source, out, runs, name="diffwavenet_svc", to="alice", **options):
    options = {} if name == "vits_svc" else {"vocoder": runs / "voc"} | options
    made = convert.file(source, to=to, run=runs / name, out=out, **options)
    return made, sf.read(out, dtype="float32")[0]


@pytest.mark.parametrize("name", [name if name.startswith("como") else pytest.param(name, marks=pytest.mark.slow)
                                  for name in conversions.HEARD])
def test_every_model_sings_as_long_as_the_recording(name, runs, short, tmp_path):
    made, wave = converted(short, tmp_path / "out.wav", runs, name)
    assert sf.info(tmp_path / "out.wav").samplerate == RATE
    assert len(wave) == 48000 and wave.std() > 1e-4
    assert np.array_equal(wave, converted(short, tmp_path / "again.wav", runs, name)[1])
    assert made.remarks[0].startswith(f"key {made.semitones:+.0f} semitones (median ")


@pytest.mark.parametrize(("name", "options", "parts"), [
    ("diffwavenet_svc", {}, 3), ("diffwavenet_svc", {"steps": 7}, 7), ("transformer_svc", {}, 2), ("como_svc", {}, 5),
    ("como_svc", {"sampler": "heun"}, 7), ("vits_svc", {}, 2)])
def test_how_far_a_song_is_is_told_after_every_window(name, options, parts, runs, short, tmp_path):
    conversion = conversion_of(runs, name, vocoder=None if name == "vits_svc" else runs / "voc", window=64, **options)
    (job,) = sources.jobs([short], conversion.reads, "the run")
    told: dict[str, list[float]] = {}
    conversion.write(job, tmp_path / "out.wav", lambda what, done: told.setdefault(what, []).append(done))
    assert list(told) == ["acoustic model", "waveform"]
    assert len(told["acoustic model"]) == 3 * parts  # 187 frames; CoMoSVC's transformer has two layers before its steps
    for done in told.values():
        assert all(np.diff(done) > 0) and 0 < done[0] <= 0.5 and done[-1] == pytest.approx(1)


def test_seed_steps_and_singer_are_heard(runs, short, tmp_path):
    _, wave = converted(short, tmp_path / "out.wav", runs, key=0)
    for options in ({"seed": 1}, {"steps": 2}, {"sampler": "ddpm"}, {"to": "bob"}, {"key": 3}):
        _, other = converted(short, tmp_path / "other.wav", runs, **{"key": 0} | options)
        assert np.abs(wave - other).max() > 1e-4, options


def test_second_conversion_extracts_nothing(runs, short, tmp_path):
    def stored():
        features = fs.open(sources.sources()).features
        return {name: [segment.id for segment in feature.segments] for name, feature in features.items()}

    converted(short, tmp_path / "out.wav", runs)
    before = stored()
    converted(short, tmp_path / "out.wav", runs, "como_svc", to="bob", key=5)  # which reads the same
    assert stored() == before and len(before) >= 4


@pytest.mark.slow
def test_windows_are_the_whole(runs, tmp_path):
    made, whole = converted(SENTENCE, tmp_path / "whole.wav", runs, window=4096)
    assert made.seconds * RATE / 256 > 4 * 100
    _, windows = converted(SENTENCE, tmp_path / "windows.wav", runs, window=100)
    assert np.abs(whole - windows).max() <= 1.5 / 32768  # one step of 16 bits


@pytest.mark.slow
def test_any_rate_and_channels(runs, tmp_path):
    wave, _ = sf.read(SENTENCE, dtype="float32")
    places = [written(tmp_path / f"{rate}.wav", np.stack([wave[:30000 + rate]] * 2, 1), rate) for rate in (8000, 48000)]
    made = convert.files(places, to="alice", run=runs / "transformer_svc", vocoder=runs / "voc", out=tmp_path / "out",
                         form="flac")
    for one, rate in zip(made, (8000, 48000), strict=True):
        assert one.path.suffix == ".flac"
        assert one.seconds == pytest.approx((30000 + rate) / rate, abs=1e-4)


# --- key


def song_of(conversion, source, how=None):
    (job,) = sources.jobs([source], conversion.reads, "the run", how)
    return conversion.song(job)


def conversion_of(runs, name="transformer_svc", to="alice", **options):
    given = {"vocoder": None, "key": "auto", "rounding": "semitones", "steps": None, "sampler": None, "seed": 0,
             "device": "cpu", "precision": "32", "window": 1024, "how": None}
    return convert.Conversion(run.load(runs / name), to, **given | options)


@pytest.mark.parametrize(("options", "semitones"), [
    ({}, None), ({"rounding": "none"}, None), ({"rounding": "octaves", "to": "bob"}, -12.0), ({"key": 3.0}, 3.0)])
def test_key_brings_the_median_to_the_target_s(options, semitones, runs, short):
    conversion = conversion_of(runs, **options)
    song = song_of(conversion, short)
    before, found = song.median_hz, conversion._key(song)[0]
    exact = 12 * np.log2(262.0 / before)
    expected = {None: round(exact), "none": exact}[options.get("rounding")] if semitones is None else semitones
    assert found == pytest.approx(expected)
    song.move(found)
    batch = conversion.features(song)(0, song.frames)
    assert batch["f0"].dtype == torch.float32 and batch["mel22"].shape == (1, song.frames, 80)
    f0 = batch["f0"].numpy()
    assert np.median(f0[f0 > 0]) == pytest.approx(before * 2 ** (found / 12), rel=1e-5)


def test_key_is_kept_where_nobody_knows_where_the_target_sings(runs, short, tmp_path):
    made, _ = converted(short, tmp_path / "out.wav", runs, to="carla")
    assert made.semitones == 0 and "where carla sings is not known" in made.remarks[0]


# --- level and silence


@pytest.mark.slow
def test_level_of_the_song_is_kept_where_the_model_does_not_hear_it(runs, tmp_path):
    wave, _ = sf.read(SENTENCE, dtype="float32")
    level = []
    for scale in (0.4, 0.1):
        source = written(tmp_path / f"{scale}.wav", scale * wave[:48000])
        _, made = converted(source, tmp_path / "out.wav", runs, "deaf", key=0)
        level.append(np.sqrt(np.square(made).mean()))
        assert level[-1] == pytest.approx(np.sqrt(np.square(scale * wave[:48000]).mean()), rel=0.25)
    assert level[0] / level[1] == pytest.approx(4, rel=0.05)


@pytest.mark.slow
def test_what_would_clip_is_turned_down_as_a_whole(runs, tmp_path):
    wave, _ = sf.read(SENTENCE, dtype="float32")
    loud = written(tmp_path / "loud.wav", np.clip(40 * wave[:48000], -1, 1))
    made, found = converted(loud, tmp_path / "out.wav", runs, "deaf")
    assert 0.99 < np.abs(found).max() <= 1 - 1 / 32768
    assert any("turned down by" in remark for remark in made.remarks)
    assert "the recording is clipped" in made.remarks


@pytest.mark.slow
def test_silence_stays_silent(runs, short, tmp_path):
    wave, _ = sf.read(short, dtype="float32")
    quiet = np.random.default_rng(0).normal(0, 1e-5, 72000).astype(np.float32)
    source = written(tmp_path / "pause.wav", np.concatenate([wave, quiet, wave]))
    _, found = converted(source, tmp_path / "out.wav", runs)
    assert not found[48000 + 8000:120000 - 8000].any()
    assert found[:48000].std() > 1e-4 and found[120000:].std() > 1e-4
    assert np.abs(np.diff(found[48000 + 2000:48000 + 8000])).max() < 0.5  # faded


@pytest.mark.parametrize("seconds", [0.3, pytest.param(180, marks=pytest.mark.slow)])
def test_silence_alone_costs_nothing_and_stays(seconds, runs, tmp_path):
    source = written(tmp_path / "silent.flac", np.zeros(int(seconds * RATE), np.float32))
    made, found = converted(source, tmp_path / "out.wav", runs)
    assert len(found) == int(seconds * RATE) and not found.any()
    assert made.semitones == 0 and "nothing is heard in the recording" in made.remarks[0]


# --- whom


@pytest.mark.slow
def test_anybody_is_a_target_for_a_run_with_embeddings(runs, short, tmp_path):
    how = {"run": run.load(runs / "anybody")}
    man = convert.target(**how, to=CORPUS / "vocadito_S1" / "vocadito_1.flac")
    assert len(man.embedding) == 256 and np.linalg.norm(man.embedding) == pytest.approx(1, abs=1e-3)
    assert 100 < man.median_hz < 200
    waves = [converted(short, tmp_path / "out.wav", runs, "anybody", to=to, key=0)[1]
             for to in ("alice", SENTENCE, short)]
    assert all(np.abs(one - other).max() > 1e-4 for one, other in ((waves[0], waves[1]), (waves[1], waves[2])))
    with pytest.raises(BadAudio, match=r"nobody to sing like is heard in --to .*silent\.wav: .*no voice"):
        convert.target(**how, to=written(tmp_path / "silent.wav", np.zeros(48000, np.float32)))


def test_targets_that_are_none_are_told_the_nearest(runs, short):
    with pytest.raises(BadRequest, match=r"no singer 'alicia' \(it has: alice,"):
        conversion_of(runs, to="alicia")
    with pytest.raises(BadRequest, match=r"give a recording of whoever"):
        conversion_of(runs, "anybody", to="alicia")
    with pytest.raises(BadRequest, match=r"cannot be a recording .*--speaker NAME"):
        conversion_of(runs, to=short)


# --- stores, folders, the command


@pytest.mark.slow
def test_a_store_is_converted_and_what_it_lacks_is_told(voices, runs, tmp_path):
    here = tmp_path / "voices.zarr"
    shutil.copytree(voices, here)

    def convert_store(name):
        return convert.files([here], to="alice", run=runs / name, vocoder=runs / "voc", out=tmp_path / "out")

    with pytest.raises(MissingFeature, match=r"reads mel22, which .* does not have .*-f mel22=log-mel,sample_rate"):
        convert_store("transformer_svc")
    with pytest.raises(MissingFeature, match="reads loudness"):
        convert_store("deaf")
    fs.extract(fs.corpus(voices.parent / "corpus"), fs.open(here), conversions.parse("loudness"), workers=0)
    made = convert_store("deaf")
    assert {one.key for one in made} == set(fs.open(voices).utterances) and all(one.path.exists() for one in made)
    fs.extract(fs.corpus(voices.parent / "corpus"), fs.open(here), conversions.parse("mel22=log-mel"), workers=0)
    with pytest.raises(IdentityMismatch, match=r"reads mel22@.* with .*n_mels=100 \(the run: 80\).*-f other=log-mel,"):
        convert_store("transformer_svc")
    fs.extract(fs.corpus(voices.parent / "corpus"), fs.open(here), conversions.parse("other=log-mel:22k-80"), workers=0)
    assert len(convert_store("transformer_svc")) == len(made)


@pytest.mark.slow
def test_command_converts_a_folder_and_says_how(runs, short, tmp_path):
    words = ["convert", str(short.parent), "--to", "bob", "--run", str(runs / "transformer_svc"), "--vocoder",
             str(runs / "voc"), "-o", str(tmp_path / "out"), "--sources", str(tmp_path / "s.zarr"), "--key", "-12"]
    done = CliRunner().invoke(cli, [*words, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    (told,) = json.loads(done.stdout)
    assert told["semitones"] == -12 and Path(told["path"]) == tmp_path / "out" / "short.wav"
    assert len(fs.open(tmp_path / "s.zarr").features) == 4
    words[-1] = "auto"
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert "1 written to" in done.stdout and "--key 0 keeps the song's." in done.stderr
    for change, told in ((["--to", "bo"], "no singer 'bo' (it has: bob"), (["--key", "up"], "expected auto"),
                         (["--key", "99"], "expected semitones from -48 to 48")):
        done = CliRunner().invoke(cli, [*words, *change])
        assert done.exit_code == 2 and told in done.stderr


# --- what is refused


def test_runs_that_do_not_fit_are_refused(runs, short, tmp_path):
    with pytest.raises(BadRequest, match="is a vocoder, expected an acoustic model"):
        conversion_of(runs, "voc")
    with pytest.raises(BadRequest, match="is of kind acoustic, expected a vocoder"):
        conversion_of(runs, vocoder=runs / "como_svc")
    with pytest.raises(BadRequest, match="makes the waveform itself"):
        conversion_of(runs, "vits_svc", vocoder=runs / "voc")
    other = conversions.vocoder(tmp_path / "other", fmax=8000.0)
    with pytest.raises(ContractMismatch, match=r"fmax 8000.* 12000"):
        conversion_of(runs, vocoder=other)
    for options, told in (({"sampler": "euler"}, "sampler"), ({"steps": 5}, "not sample in steps: leave out --steps"),
                          ({"window": 3}, "at least 64 frames"), ({"rounding": "up"}, "rounding 'up'")):
        with pytest.raises(BadRequest, match=told):
            conversion_of(runs, **options)
    with pytest.raises(BadRequest, match="has euler and heun"):
        conversion_of(runs, "como_svc", sampler="ddim")
    conversions.acoustic(tmp_path / "student", "como_svc", stage="student")
    with pytest.raises(BadRequest, match="a student, which has one way of sampling"):
        conversion_of(tmp_path, "student", sampler="heun")
    with pytest.raises(BadRequest, match="sampling_steps 2000: expected 1 to 1000"):
        conversion_of(runs, "diffwavenet_svc", steps=2000)


def test_a_run_of_another_version_is_told(runs, tmp_path):
    shutil.copytree(runs / "transformer_svc", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    document["config"]["nobody_knows"] = 1
    path.write_text(json.dumps(document))
    with pytest.raises(CannotLoad, match="may be of another version"):
        conversion_of(tmp_path, "run")
    del document["config"]["nobody_knows"], document["reads"]["mel22"]
    path.write_text(json.dumps(document))
    with pytest.raises(MissingFeature, match="hears mel22 and does not say what made it"):
        conversion_of(tmp_path, "run")


def test_singers_that_are_not_the_run_s_are_told(runs, tmp_path):
    shutil.copytree(runs / "transformer_svc", tmp_path / "run")
    path = tmp_path / "run" / "singers.json"
    path.write_text(json.dumps({"alice": conversions.SINGERS["alice"] | {"row": 4}}))
    with pytest.raises(CannotLoad, match=r"gives alice row 4, and the model has 4"):
        conversion_of(tmp_path, "run")
    path.unlink()
    with pytest.raises(CannotLoad, match=r"singers\.json is missing or empty"):
        conversion_of(tmp_path, "run")


def test_what_is_said_of_a_feature_that_nobody_reads_is_refused(runs):
    for how, told in ((sources.Sources(weights={"whispr": "x"}), r"--weights whispr=\.\.\.: .* reads no feature"),
                      (sources.Sources(requests={"mel2": "log-mel"}), r"-f mel2=\.\.\.: .*it has: mel22")):
        with pytest.raises(BadRequest, match=told):
            conversion_of(runs, how=how)


def test_recordings_that_cannot_be_used_are_told(runs, tmp_path):
    empty, text = tmp_path / "empty.wav", tmp_path / "text.wav"
    written(empty, np.zeros(0, np.float32))
    text.write_text("no audio")
    for source in (empty, text):
        with pytest.raises(BadAudio, match="cannot be used"):
            converted(source, tmp_path / "out.wav", runs)
    wave, _ = sf.read(SENTENCE, dtype="float32")
    good = written(tmp_path / "good.flac", wave[20000:30000])
    with pytest.raises(BadAudio, match=r"2 of 3 .*: empty: no audio.*; text: not audio\. The others are in"):
        convert.files([empty, good, text], to="alice", run=runs / "deaf", vocoder=runs / "voc", out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.wav"]
    before = fs.open(sources.sources()).utterances
    with pytest.raises(BadRequest, match="expected a file of wav or flac, or a folder"):
        converted(written(tmp_path / "other.flac", wave[30000:40000]), tmp_path / "out.mp3", runs)
    assert list(fs.open(sources.sources()).utterances) == list(before)  # told before anything is extracted
    with pytest.raises(BadRequest, match="does not exist"):
        converted(tmp_path / "nothing.wav", tmp_path / "out.wav", runs)
    assert not (tmp_path / "out.wav").exists()


def test_a_recording_is_not_written_over(runs, short, tmp_path):
    place = tmp_path / "songs" / "song.flac"
    place.parent.mkdir()
    before = written(place, sf.read(short, dtype="float32")[0]).read_bytes()
    (tmp_path / "link.flac").symlink_to(place)
    for source, out in ((place, place), (place.parent, place.parent), (tmp_path / "link.flac", place)):
        with pytest.raises(BadRequest, match=r"is a recording that is read, and would be written over"):
            convert.files([source], to="alice", run=runs / "deaf", out=out, form="flac")
    assert place.read_bytes() == before
    with pytest.raises(BadRequest, match=r"no recordings are in .*empty: give files of sound, folders"):
        (tmp_path / "empty").mkdir()
        convert.files([tmp_path / "empty"], to="alice", run=runs / "deaf", out=tmp_path / "out")


def test_a_run_that_is_not_told_who_sings_says_so(short, tmp_path):
    conversions.acoustic(tmp_path / "anyone", "transformer_svc", speaker="none")
    made = convert.file(short, to="bob", run=tmp_path / "anyone", out=tmp_path / "out.wav")
    assert any("is not told who sings (--speaker none): --to bob sets the key alone" in said for said in made.remarks)


def test_command_tells_what_was_made_where_other_recordings_cannot_be_used(runs, short, tmp_path):
    (tmp_path / "songs").mkdir()
    shutil.copy(short, tmp_path / "songs" / "good.wav")
    (tmp_path / "songs" / "text.wav").write_text("no audio")
    done = CliRunner().invoke(cli, ["convert", str(tmp_path / "songs"), "--to", "bob", "--run", str(runs / "deaf"),
                                    "--vocoder", str(runs / "voc"), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 1 and "1 of 2 recordings cannot be used: text: not audio" in done.stderr
    assert [one["key"] for one in json.loads(done.stdout)] == ["good"]


def reading(path, spec, runs):
    """The run with another spec of its content feature."""
    shutil.copytree(runs / "transformer_svc", path)
    document = json.loads((path / "config.json").read_text())
    document["reads"]["mel22"][0]["spec"] = spec.to_json()
    (path / "config.json").write_text(json.dumps(document))
    return path.parent


def test_encoders_that_are_not_here_are_told_by_their_digest(runs, short, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whisper = fs.Spec("whisper", 1, "continuous", 50, 16000, dim=80, dtype="float16", settings={"layer": 20},
                      weights="sha256:345ae4da" + 56 * "0")
    made = conversion_of(reading(tmp_path / "whisper", whisper, runs), "whisper")
    with pytest.raises(MissingWeights, match=r"needs whisper weights sha256:345ae4da\.\.\., not found on this machine "
                       r"\(hub cache, \$FEATSTORE_WEIGHTS\)\. Give --weights mel22=FILE"):
        song_of(made, short)
    own = fs.Spec("my-net", 1, "continuous", 50, 16000, dim=80, dtype="float32")
    made = conversion_of(reading(tmp_path / "own", own, runs), "own")
    with pytest.raises(BadRequest, match=r"made by my-net, .*-f mel22=my_module\.MyExtractor"):
        song_of(made, short)
    with pytest.raises(IdentityMismatch, match=r"made otherwise here \(.*made_by: 'my-net', here 'log-mel'"):
        song_of(made, short, sources.Sources(requests={"mel22": "log-mel"}))


def test_smaller_windows_are_tried_where_memory_is_short(runs, short, tmp_path):
    conversion = conversion_of(runs, "diffwavenet_svc", vocoder=runs / "voc", window=512)
    (job,) = sources.jobs([short], conversion.reads, "the run")
    conversion.write(job, tmp_path / "plenty.wav")
    tried, least = [], 200

    def full(module, inputs):
        tried.append(inputs[0]["f0"].shape[1])
        if tried[-1] > least:
            raise torch.OutOfMemoryError("CUDA out of memory")

    conversion.model.condition_encoder.register_forward_pre_hook(full)
    conversion.write(job, tmp_path / "short.wav")
    assert max(tried) == 187 or max(tried) <= 512
    plenty, scarce = (sf.read(tmp_path / f"{name}.wav", dtype="float32")[0] for name in ("plenty", "short"))
    assert np.abs(plenty - scarce).max() <= 1.5 / 32768
    least = 10
    with pytest.raises(CannotLoad, match="cpu has too little memory for a window of 64 frames"):
        conversion.write(job, tmp_path / "none.wav")
    assert [path.name for path in tmp_path.iterdir() if "none" in path.name] == []


def test_devices_that_cannot_be_used_are_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(CannotLoad, match=r"device 'cuda:0,1' cannot be used .*one model runs on one device"):
        vocode.on(torch.nn.Linear(1, 1), "cuda:0,1", fold=False)

    class Large(torch.nn.Linear):
        def to(self, device):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(CannotLoad, match="cuda has too little memory for the weights of the model"):
        vocode.on(Large(1, 1), "cuda", fold=False)


def test_weights_that_give_no_numbers_are_told(runs, short, tmp_path):
    conversion = conversion_of(runs, "transformer_svc", vocoder=runs / "voc")
    (job,) = sources.jobs([short], conversion.reads, "the run")
    with torch.no_grad():
        conversion.speaker.conv_post.weight.fill_(float("inf"))
    with pytest.raises(CannotLoad, match="NaN or infinite"):
        conversion.write(job, tmp_path / "out.wav")


def test_f0_comes_as_early_as_the_weights_learnt_it(runs, short, tmp_path):
    conversions.acoustic(tmp_path / "early", "transformer_svc", f0_early_s=2 * 256 / RATE)
    plain, early = (song_of(made, short).f0["f0"] for made in (conversion_of(runs), conversion_of(tmp_path, "early")))
    np.testing.assert_allclose(early[:-2], plain[2:], rtol=1e-5)
    with pytest.raises(ValueError, match=r"f0_early_s 1: expected seconds"):
        conversions.acoustic(tmp_path / "other", "transformer_svc", f0_early_s=1.0)


@pytest.mark.parametrize("request_", ["energy", "energy:mel,n_mels=80", "energy:stft,hop=300", "loudness:A", "f0:dio",
                                      "log-mel:44k-128", "speaker", "speaker:d-vector,rate=2", "wave:16k"])
def test_what_made_a_feature_can_be_asked_for_again(request_):
    (extractor,) = conversions.parse(request_).values()
    spec = fs.Spec.of(extractor)
    (again,) = conversions.parse(run.request_of(spec)).values()
    assert fs.Spec.of(again).identity == spec.identity


def test_layers_are_asked_for_by_their_range():
    spec = fs.Spec("whisper", 1, "continuous", 50, 16000, dim=8, dtype="float16", weights="sha256:77",
                   settings={"layer": [9, 10, 11], "mix": "mean", "context": "short", "mels": 80})
    assert run.request_of(spec) == "whisper,layer=9..11,mix=mean,context=short"
    spec = fs.Spec("wavlm", 1, "continuous", 50, 16000, dim=8, dtype="float16", settings={"layer": "output", "mix": ""})
    assert run.request_of(spec) == "wavlm,mix="
