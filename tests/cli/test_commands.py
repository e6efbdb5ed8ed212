"""The commands as people run them: what they print, what they refuse, their exit status."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner, Result

import featstore as fs
from featstore_cli import cli, display

ROOT = Path(__file__).resolve().parents[2]
ROOTS = os.pathsep.join(str(ROOT / name) for name in (".", "extractors", "align", "cli", "tests"))
COMMANDS = ["scan", "extract", "status", "why", "use", "info", "ls", "plot", "split", "verify", "rm", "compact", "copy",
            "export", "import", "pack", "weights", "train", "vocode", "convert", "zoo", "evaluate",
            "probe", "report", "listen"]


def run(*words: object) -> Result:
    """`featstore WORDS` in this process."""
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def wavs(tmp_path: Path) -> Path:
    """Four recordings of two speakers, an hour old."""
    for i in range(4):
        path = tmp_path / "wavs" / f"spk{i % 2}" / f"u{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, np.random.default_rng(i).uniform(-0.5, 0.5, 8000), 16000)
        os.utime(path, (time.time() - 3600,) * 2)
    return tmp_path / "wavs"


@pytest.fixture
def store(wavs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "s.zarr"
    done = run("extract", wavs, path, "-f", "toys.Mean", "-f", "energy", "--workers", 0)
    assert done.exit_code == 0, done.output
    return path


def test_extract_says_what_it_made_and_then_that_nothing_is_to_do(wavs: Path, tmp_path: Path) -> None:
    first = run("extract", wavs, tmp_path / "s.zarr", "-f", "toys.Mean", "--workers", 0)
    assert first.exit_code == 0 and "4 utterances, 2.0 s of audio" in first.output
    assert "<Store s.zarr: 4 utterances, 2 speakers, 0.0 min; mean>" in first.output
    assert "Nothing to do: all 4 utterances are fresh." in run("extract", wavs, tmp_path / "s.zarr", "-f",
                                                              "toys.Mean").output


def test_plan_writes_nothing(wavs: Path, tmp_path: Path) -> None:
    done = run("extract", wavs, tmp_path / "s.zarr", "-f", "energy", "--plan")
    assert done.exit_code == 0 and "energy 4 to do" in done.output and "Nothing written." in done.output
    assert not (tmp_path / "s.zarr").exists()
    as_json = json.loads(run("extract", wavs, tmp_path / "s.zarr", "-f", "energy", "--plan", "--json").output)
    assert as_json["features"]["energy"]["missing"] == 4


def test_a_recipe_is_as_good_as_requests(wavs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[features]\nsoft = "loudness:A"\nmean = "toys.Mean,gain=2"\n')
    assert run("extract", wavs, tmp_path / "s.zarr", "-r", recipe, "--workers", 0).exit_code == 0
    opened = fs.open(tmp_path / "s.zarr")
    assert sorted(opened.features) == ["mean", "soft"]
    assert opened.features["mean"].spec.settings["gain"] == 2


def test_another_setting_is_refused_with_two_ways_out(wavs: Path, store: Path) -> None:
    refused = run("extract", wavs, store, "-f", "toys.Mean,gain=2", "--workers", 0)
    assert refused.exit_code == 2
    assert "gain=1; you ask for gain=2. Nothing was changed." in refused.output
    assert "replace:    add --replace" in refused.output
    keep = re.search(r"keep both:  -f (\S+)", refused.output)
    assert keep is not None and keep[1] == "mean-g2=toys.Mean,gain=2"
    assert run("extract", wavs, store, "-f", keep[1], "--workers", 0).exit_code == 0
    assert run("extract", wavs, store, "-f", "toys.Mean,gain=2", "--workers", 0, "--replace").exit_code == 0
    assert fs.open(store).features["mean"].spec.settings["gain"] == 2


def test_the_way_out_of_a_refused_request_keeps_its_preset_and_skips_names_that_are_taken(wavs: Path,
                                                                                         store: Path) -> None:
    assert "-f energy-mel=energy:mel\n" in run("extract", wavs, store, "-f", "energy:mel", "--plan").stderr
    assert run("extract", wavs, store, "-f", "energy-mel=energy", "--workers", 0).exit_code == 0
    recipe = wavs.parent / "recipe.toml"
    recipe.write_text('[features]\nmean = "toys.Mean,gain=0.5"\nenergy = "energy:mel"\n')
    refused = run("extract", wavs, store, "-r", wavs.parent)
    assert refused.exit_code == 2
    assert "keep both:  -f mean-g0-5=toys.Mean,gain=0.5 -f energy-mel-2=energy:mel\n" in refused.stderr


def test_debug_shows_where_an_error_came_from_before_and_after_the_command(wavs: Path) -> None:
    for words in (["--debug", "info", str(wavs)], ["info", str(wavs), "--debug"]):
        with pytest.raises(fs.errors.NotAStore):
            run(*words)


def test_columns_stay_aligned_under_wide_and_combining_characters(capsys: pytest.CaptureFixture[str]) -> None:
    display.table([["歌手", "x"], ["e\u0301e", "x"], ["a\nb", "x"], ["-o", "x"]], ["key", "end"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["key   end", "歌手  x", "e\u0301e    x", "a\\nb  x", "-o    x"]


def test_why_names_a_changed_setting_and_a_changed_recording(wavs: Path, store: Path) -> None:
    fresh = run("why", store, "spk0/u0", "mean")
    assert fresh.exit_code == 0 and "fresh" in fresh.output and "read again" in fresh.output
    setting = run("why", store, "spk0/u0", "mean", "-f", "toys.Mean,gain=3")
    assert setting.exit_code == 1 and "gain: stored 1, now 3" in setting.output
    sf.write(wavs / "spk0" / "u0.wav", np.zeros(8000) + 0.1, 16000)
    recording = run("why", store, "spk0/u0", "mean")
    assert recording.exit_code == 1 and "audio: stored" in recording.output
    answer = json.loads(run("why", store, "spk0/u0", "mean", "--json").output)
    assert answer["state"] == "stale" and list(answer["differs"]) == ["audio"]


def test_status_counts_and_exits_by_what_is_fresh(wavs: Path, store: Path) -> None:
    done = run("status", wavs, store)
    assert done.exit_code == 0 and re.search(r"mean +4 +0 +0", done.output)
    (wavs / "spk1" / "u3.wav").unlink()
    sf.write(wavs / "spk0" / "new.wav", np.ones(8000) * 0.1, 16000)
    done = run("status", wavs, store)
    assert done.exit_code == 1 and re.search(r"mean +3 +0 +1", done.output)
    assert "1 utterances of the store are not in the corpus, such as spk1/u3" in done.output
    answer = json.loads(run("status", wavs, store, "--json").output)
    assert answer["orphans"] == ["spk1/u3"]


def test_a_bad_recording_is_exit_1_and_named(wavs: Path, tmp_path: Path) -> None:
    (wavs / "spk0" / "line\nbreak.wav").write_text("no sound")
    done = run("extract", wavs, tmp_path / "s.zarr", "-f", "toys.Mean", "--workers", 0)
    assert done.exit_code == 1
    assert "failed: spk0/line\\nbreak: not audio" in done.stderr
    assert str(tmp_path / "s.zarr.failures.jsonl") in done.stderr
    allowed = run("extract", wavs, tmp_path / "s.zarr", "-f", "toys.Mean", "--workers", 0, "--allow-failures", "25%")
    assert allowed.exit_code == 0
    report = json.loads(run("extract", wavs, tmp_path / "s.zarr", "-f", "toys.Mean", "--workers", 0, "--json").stdout)
    assert report["failures"][0]["utterance"] == "spk0/line\nbreak" and report["ok"] is False
    assert run("status", wavs, tmp_path / "s.zarr").output.split("\n")[1].split() == ["mean", "4", "0", "0", "1", "0"]


@pytest.mark.parametrize(("words", "status", "message"), [
    (["extract", "nowhere", "{s}", "-f", "energy"], 2, "'nowhere' does not exist"),
    (["extract", "{w}", "{s}", "-f", "enrgy"], 2, "no extractor 'enrgy'; there are energy"),
    (["extract", "{w}", "{s}", "-f", "energy,hops=3"], 2, "hops"),
    (["extract", "{w}", "{s}", "-f", "energy", "-f", "energy"], 2, "energy-2"),
    (["extract", "{w}", "{s}"], 2, "nothing to extract"),
    (["extract", "{w}", "missing/s.zarr", "-f", "energy"], 2, "does not exist"),
    (["extract", "{w}", "{w}", "-f", "energy"], 2, "has no zarr.json"),
    (["extract", "{w}", "{s}", "-f", "energy", "--allow-failures", "few"], 2, "such as 5%"),
    (["why", "{s}", "spk0/u9", "mean"], 2, "it has: spk0/u"),
    (["why", "{s}", "spk0/u0", "meen"], 2, "it has: mean"),
    (["why", "{s}", "spk0/u0", "mean", "--frame", "3"], 2, "give --like as well"),
    (["why", "{s}", "spk0/u0", "mean", "--like", "energy", "-f", "toys.Mean"], 2, "give one of them"),
    (["scan", "{w}", "-o", "missing/c.jsonl"], 2, "the folder missing does not exist"),
    (["extract", "{w}", "{s}", "-r", "{w}"], 2, "no recipe.toml"),
    (["info", "nowhere.zarr"], 2, "does not exist"),
    (["use", "{s}", "mean"], 2, "expected NAME@ID"),
    (["use", "{s}", "mean@ffff"], 2, "names 0 identities"),
    (["ls", "{s}", "f9"], 2, "has no feature 'f9'"),
    (["rm", "{s}"], 2, "give one of"),
    (["rm", "{s}", "--speaker", "spk9"], 2, "no speaker 'spk9'"),
    (["compact", "{s}", "--grace", "1"], 2, "give --purge as well"),
    (["plot", "{s}", "spk9", "-o", "x.png"], 2, "no utterance 'spk9'"),
])
def test_a_wrong_command_line_is_told_what_is_wrong(wavs: Path, store: Path, words: list[str], status: int,
                                                    message: str) -> None:
    done = run(*(word.format(s=store, w=wavs) for word in words))
    assert (done.exit_code, "Traceback" in done.output) == (status, False), done.output
    assert message in done.stderr


def test_scan_writes_a_manifest_that_extract_takes(wavs: Path, tmp_path: Path) -> None:
    done = run("scan", wavs, "-o", tmp_path / "corpus.jsonl", "--pattern", "{speaker}/{song}")
    assert done.exit_code == 0 and "4 utterances, 2 speakers" in done.output
    assert run("extract", tmp_path / "corpus.jsonl", tmp_path / "s.zarr", "-f", "energy", "--workers", 0).exit_code == 0
    opened = fs.open(tmp_path / "s.zarr")
    assert opened.utterances["spk1/u3"].extra["song"] == "u3"


def test_info_and_ls_list_what_there_is(store: Path) -> None:
    shown = run("info", store).output
    assert "4 utterances, 2 speakers" in shown and re.search(r"mean@[0-9a-f]{9}", shown) and "gain=1" in shown
    facts = json.loads(run("info", store, "--json").output)
    assert [(f["name"], f["utterances"], f["served"]) for f in facts["features"]] == \
        [("energy", 4, True), ("mean", 4, True)]
    assert run("ls", store).output.split("\n")[1].split() == ["spk0/u0", "spk0", "0.500"]
    assert [row["frames"] for row in json.loads(run("ls", store, "mean", "--json").output)] == [50] * 4


def test_use_moves_a_name_back(wavs: Path, store: Path) -> None:
    old = fs.open(store).features["mean"].identity
    run("extract", wavs, store, "-f", "toys.Mean,gain=2", "--workers", 0, "--replace")
    assert run("use", store, f"mean@{old[:6]}").exit_code == 0
    assert fs.open(store).features["mean"].identity == old


def test_verify_finds_damage_and_repair_lets_extract_mend_it(wavs: Path, store: Path) -> None:
    assert run("verify", store).exit_code == 0
    shard = next((store / "features" / "mean").rglob("frames/c/0"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    found = run("verify", store)
    assert found.exit_code == 1 and re.search(r"damaged: spk\d/u\d mean@", found.output)
    assert run("verify", store, "--repair").exit_code == 0
    assert run("status", wavs, store).exit_code == 1
    assert run("extract", wavs, store, "-f", "toys.Mean", "--workers", 0).exit_code == 0
    assert run("verify", store).exit_code == 0 and run("status", wavs, store).exit_code == 0


def test_rm_copy_export_and_import(store: Path, tmp_path: Path) -> None:
    assert run("copy", store, tmp_path / "t.zarr", "-f", "mean").exit_code == 0
    copied = fs.open(tmp_path / "t.zarr")
    assert list(copied.features) == ["mean"] and len(copied.utterances) == 4
    assert run("rm", store, "-f", "mean").exit_code == 0
    assert list(fs.open(store).features) == ["energy"]
    assert run("rm", store, "--speaker", "spk0").exit_code == 0
    assert set(fs.open(store).features["energy"]) == {"spk1/u1", "spk1/u3"}
    assert run("export", tmp_path / "t.zarr", "-o", tmp_path / "out").exit_code == 0
    assert run("import", tmp_path / "out", tmp_path / "u.zarr", "--layout", "npy").exit_code == 0
    back = fs.open(tmp_path / "u.zarr")
    for key in copied.utterances:
        np.testing.assert_array_equal(np.asarray(back[key, "mean"]), np.asarray(copied[key, "mean"]))
    assert "imported:" in run("info", tmp_path / "u.zarr").output


def test_compact_says_what_became_of_the_segments(wavs: Path, store: Path) -> None:
    for gain in (2, 3):
        run("extract", wavs, store, "-f", f"toys.Mean,gain={gain}", "--replace", "--workers", 0)
    run("rm", store, "--utterance", "spk0/u0")
    before = run("ls", store, "mean").output
    done = run("compact", store)
    assert done.exit_code == 0 and re.search(r"\d+ segments, .*: now \d+, .* copied, 0 B freed\.", done.output)
    assert "--purge frees what is older than 24 h" in done.output
    found = json.loads(run("compact", store, "--purge", "--grace", 0, "--json").output)
    assert found["damages"] == [] and found["freed"] > 0 and found["waiting"] == 0
    assert run("ls", store, "mean").output == before and run("verify", store).exit_code == 0
    shard = next((store / "features" / "mean").rglob("frames/c/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    run("rm", store, "--utterance", "spk1/u1")
    harmed = run("compact", store, "--purge")
    assert harmed.exit_code == 1 and "damaged: spk" in harmed.output and "--repair gives it up" in harmed.output


def test_nothing_of_a_removed_speaker_is_left_after_compact_and_purge(wavs: Path, store: Path, tmp_path: Path) -> None:
    (wavs / "spk0" / "broken.wav").write_bytes(b"RIFF nonsense")
    (wavs / "spk1" / "broken.wav").write_bytes(b"RIFF nonsense")
    assert run("extract", wavs, store, "-f", "toys.Mean", "-f", "energy", "--workers", 0).exit_code == 1
    assert b"spk0/broken" in Path(f"{store}.failures.jsonl").read_bytes()
    frames = [fs.open(store)[f"spk0/u{i}", name].read().tobytes() for i in (0, 2) for name in ("mean", "energy")]
    done = run("rm", store, "--speaker", "spk0")
    assert done.exit_code == 0 and "6 rows removed. " in done.output and "failures forgotten" in done.output
    assert run("compact", store, "--purge", "--grace", 0).exit_code == 0
    left = [path for path in (*store.rglob("*"), *tmp_path.glob("*.jsonl*"), *tmp_path.glob(".*")) if path.is_file()]
    assert [path for path in left if "spk0" in str(path) or any(
        part in path.read_bytes() for part in [b"spk0", *frames])] == []
    assert sorted(fs.open(store).utterances) == ["spk1/u1", "spk1/u3"]
    assert b"spk1/broken" in Path(f"{store}.failures.jsonl").read_bytes()


def test_plot_writes_a_picture(store: Path, tmp_path: Path) -> None:
    assert run("plot", store, "spk0/u0", "-o", tmp_path / "x.png").exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_whose_options_exist(command: str) -> None:
    shown = run(command, "--help").output
    example = re.search(r"Example: featstore (.+?)\n\n", shown, re.S)
    assert example is not None and example[1].split()[0] == command
    for option in re.findall(r"(?<= )--?[a-z]+", example[1]):
        assert re.search(rf"^  .*{option}\b", shown, re.M), option


def test_the_commands_of_the_readme_and_of_help_are_the_same() -> None:
    assert list(cli.commands) == COMMANDS
    assert "`" + " ".join(COMMANDS) + "`" in (ROOT / "README.md").read_text()


def test_help_loads_nothing_heavy() -> None:
    code = ("import sys\nfrom featstore_cli import main\nsys.argv = ['featstore', '--help']\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            "print([n for n in ('numpy', 'zarr', 'torch', 'rich', 'featstore') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": ROOTS})
    assert done.stdout.splitlines()[-1] == "[]"


def test_python_m_is_the_same_program_and_ctrl_c_keeps_what_is_done(wavs: Path, tmp_path: Path) -> None:
    for i in range(4, 40):
        (wavs / "spk0" / f"u{i}.wav").write_bytes((wavs / "spk0" / "u0.wav").read_bytes())
    command = [sys.executable, "-m", "featstore", "extract", str(wavs), str(tmp_path / "s.zarr"),
               "-f", "toys.Slow,wait_s=0.2", "--workers", "2", "--commit-every", "0.2"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOTS}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not _stored(tmp_path / "s.zarr"):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Stopping after what is under way" in err
    done = re.search(r"Interrupted: (\d+) of 40 utterances done and kept", out)
    assert done is not None and _stored(tmp_path / "s.zarr") == int(done[1]) < 40


def _stored(path: Path) -> int:
    if not (path / "zarr.json").exists():
        return 0
    features = fs.open(path).features
    return len(features["slow"]) if "slow" in features else 0


def test_progress_says_what_is_done_left_and_failed_within_80_columns() -> None:
    from featstore_cli.display import line

    said = line(fs.Progress(done=9112, total=21408, audio_s=44280, audio_total_s=108000, failures=12, elapsed_s=1800))
    assert said[:80].startswith("9,112 of 21,408 utterances, 43.2 min left, 12 failed, 12.3 h of 30.0 h")
    assert "0.041 x real time" in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_how_far_a_song_is_shows_on_a_terminal_and_is_taken_away(monkeypatch, terminal) -> None:
    from featstore_cli.zoo import SongProgress
    from featstore_zoo.sources import Stage

    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with SongProgress() as shown:
        for what in ("acoustic model", "waveform"):
            for done in (0.5, 1.0):
                shown(Stage("aria", 2, 3, what, done))
    seen = screen.getvalue()
    if not terminal:  # where lines are kept, one of four that came in a moment says nothing
        assert seen == ""
        return
    parts = ["models, features", "2 of 3  acoustic model 100 %  aria", "2 of 3  waveform 100 %  aria"]
    assert [part for part in parts if part not in seen] == [] and seen.endswith("\x1b[1A\x1b[2K")


def test_a_reader_that_has_seen_enough_is_no_error(store: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-m", "featstore", "ls", str(store)], stdout=writing,
                              stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOTS}, text=True, timeout=60)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_why_says_what_an_aligned_frame_is_made_of(store: Path) -> None:
    told = run("why", store, "spk0/u0", "mean", "--like", "energy", "--frame", 3)
    assert told.exit_code == 0
    assert told.output.splitlines() == ["spk0/u0: frame 3 of energy, centred at 0.0150 s, by edges",
                                        "  mean[1] x 1 (1.0000)"]
    found = json.loads(run("why", store, "spk0/u0", "energy", "--like", "mean", "--frame", 3, "--json").output)
    assert found["taps"] == [[6, "1/2"], [7, "1/2"]]
    assert run("why", store, "spk0/u0", "mean", "--like", "energy", "--frame", 9999).exit_code == 2


def test_split_divides_a_store_once_and_says_what_came_out(store: Path) -> None:
    made = run("split", store, "main", "--by", "speaker", "--valid", "30%")
    assert made.exit_code == 0, made.output
    head, *rows = [line.split() for line in made.output.splitlines()]
    assert head == ["part", "utterances", "duration", "share", "speakers"]
    assert [row[0] for row in rows] == ["train", "valid", "test"] and sum(int(row[1]) for row in rows) == 4
    again = run("split", store, "main", "--by", "utterance", "--valid", "30")
    assert again.exit_code == 2 and "such as main-2" in again.output
    as_json = json.loads(run("split", store, "other", "--by", "utterance", "--valid", "25", "--json").output)
    assert as_json["parts"]["valid"] == {"utterances": 1, "hours": pytest.approx(0.5 / 3600), "groups": 1}
    assert "split main by speaker: train " in run("info", store).output
    assert [split["name"] for split in json.loads(run("info", store, "--json").output)["splits"]] == ["main", "other"]


def test_pack_says_sizes_and_error_and_refuses_what_is_out_of_range(store: Path) -> None:
    lossless = run("pack", store, "energy", "--codec", "zstd")
    assert lossless.exit_code == 0 and "energy: 1 segments packed with zstd" in lossless.output
    again = run("pack", store, "energy", "--codec", "zstd")
    assert "nothing to do, all 1 segments are packed with zstd" in again.output
    assert "float32 zstd" in run("info", store).output
    packed = json.loads(run("pack", store, "energy", "--codec", "int8", "--json").output)
    assert packed["feature"] == "energy-int8" and packed["loss"]["snr_db"] > 30 and packed["done"] == 4
    shown = run("info", store).output
    assert "int8 (float32)" in shown and "int8 v1 of energy v1" in shown
    with fs.open(store).writer() as w:
        w.write("spk0/u0", "energy", np.full_like(fs.open(store)["spk0/u0", "energy"].read(), 9))
    refused = run("pack", store, "energy", "--codec", "int8")
    assert refused.exit_code == 1 and "not packed: spk0/u0: channel 0 reaches 9, the range is" in refused.output
    assert "--replace chooses a range for all" in refused.output
    again = run("pack", store, "energy", "--codec", "int8", "--replace")
    assert again.exit_code == 0 and "energy-int8: 4 utterances packed with int8" in again.output
    assert "dB below the signal, of the worst channel (0)" in again.output


@pytest.mark.parametrize(("words", "said"), [
    (["energy", "--codec", "lz4"], "'lz4' is not one of 'zstd', 'pcodec', 'raw', 'int8'"),
    (["energy", "--codec", "zstd", "--replace"], "loses nothing and has none"),
    (["enery", "--codec", "zstd"], "no feature 'enery' (it has: energy, mean)"),
    (["mean"], "Missing option '--codec'")])
def test_pack_that_is_asked_wrongly_says_what_there_is(store: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["pack", str(store), *words])
    assert result.exit_code == 2 and said in " ".join(result.output.split())


def test_every_store_of_a_command_may_be_a_url(tmp_path: Path) -> None:
    pytest.importorskip("obstore")
    url, other = "memory://commands/s.zarr", "memory://commands/other.zarr"
    with fs.create(url).writer() as w:
        w.declare("x", fs.Spec(made_by="mine", version=1, kind="continuous", frame_rate=50, dim=4))
        for key in "abc":
            w.utterance({"key": key, "speaker": key}, source=key.encode().ljust(32), seconds=0.4)
            w.write(key, "x", np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    for command, *words in (["info"], ["ls", "x"], ["why", "a", "x", "--like", "x"], ["use", "x@"],
                            ["split", "main", "--by", "speaker", "--valid", "30%"], ["pack", "x", "--codec", "int8"],
                            ["pack", "x", "--codec", "zstd"], ["copy", other], ["compact"],
                            ["export", "-o", tmp_path / "x"], ["rm", "--speaker", "a"], ["verify"]):
        done = run(command, url, *words)
        assert done.exit_code == 2 * (command == "use") and "does not exist" not in done.output, done.output
    assert sorted(fs.open(url).utterances) == ["b", "c"] and sorted(fs.open(other).features) == ["x", "x-int8"]
