"""What becomes an utterance, under which key, from folders, manifests and other toolkits' lists; and slices."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.audio import Reader
from featstore.corpus import Corpus, Problem, Utterance, corpus, write
from featstore.errors import BadCorpus, BadRequest, MissingUtterance

ROOT = Path(__file__).resolve().parents[2]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows(path: Path, *objects: Any) -> Path:
    return put(path, "".join(json.dumps(item) + "\n" for item in objects))


def keys(found: Corpus) -> list[str]:
    return [utterance.key for utterance in found]


def test_speaker_is_the_first_folder_and_key_the_path_without_extension(tmp_path: Path) -> None:
    found = corpus(touch(tmp_path, "alto/set1/a.wav", "bass/b.FLAC", "c.mp3"))
    assert [(u.key, u.audio, u.speaker) for u in found] == [
        ("alto/set1/a", "alto/set1/a.wav", "alto"), ("bass/b", "bass/b.FLAC", "bass"), ("c", "c.mp3", None)]
    assert found.path(found["bass/b"]) == tmp_path / "bass" / "b.FLAC"
    assert found.name == tmp_path.name


def test_example_corpus_has_seven_speakers() -> None:
    found = corpus(ROOT / "examples" / "corpus")
    assert (len(found), len({u.speaker for u in found}), found.problems) == (11, 7, ())


def test_hidden_files_text_and_pictures_are_ignored(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden.wav", ".git/a.wav", "notes.txt", "cover.jpg", "LICENSE", "a.wav")
    assert keys(corpus(tmp_path)) == ["a"]
    assert corpus(tmp_path).problems == ()


@pytest.mark.parametrize("head", [b"RIFF\0\0\0\0WAVE", b"RF64\0\0\0\0WAVE", b"fLaC", b"OggS", b"FORM\0\0\0\0AIFF",
                                  b"ID3\4", b"caff\0\1"])
def test_recording_without_a_known_extension_is_found_by_its_first_bytes(tmp_path: Path, head: bytes) -> None:
    (tmp_path / "take.v2").write_bytes(head + bytes(20))
    (tmp_path / "other.v2").write_bytes(b"RIFF\0\0\0\0AVI ")
    assert keys(corpus(tmp_path)) == ["take"]


def test_files_of_one_stem_keep_their_extensions_in_their_keys(tmp_path: Path) -> None:
    found = corpus(touch(tmp_path, "x/take.wav", "x/take.flac", "x/other.wav", "y/take.wav"))
    assert keys(found) == ["x/other", "x/take.flac", "x/take.wav", "y/take"]


def test_keys_are_nfc_and_audio_keeps_its_name(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "Übung/é.wav")
    found = corpus(touch(tmp_path, decomposed))
    assert [(u.key, u.audio, u.speaker) for u in found] == [("Übung/é", decomposed, "Übung")]
    assert found.path(found["Übung/é"]).exists()


def test_names_that_differ_only_in_normal_form_are_duplicates(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "é.wav"), unicodedata.normalize("NFC", "é.wav"))
    if len(os.listdir(tmp_path)) < 2:  # noqa: PTH208
        pytest.skip("this file system normalises names")
    with pytest.raises(BadCorpus, match="is not unique"):
        corpus(tmp_path)


def test_name_that_is_not_utf8_is_a_problem_by_name(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    found = corpus(touch(tmp_path, "ok.wav"))
    assert keys(found) == ["ok"]
    assert [problem.path for problem in found.problems] == ["caf\\xe9.wav"]
    assert "not UTF-8" in found.problems[0].reason


def test_key_over_500_bytes_is_a_problem(tmp_path: Path) -> None:
    found = corpus(touch(tmp_path, "歌" * 80 + "/" + "声" * 80 + "/" + "x" * 30 + ".wav", "ok.wav"))
    assert keys(found) == ["ok"]
    assert "512 bytes" in found.problems[0].reason


def test_links_loops_and_pipes(shared: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(shared / "make_symlink_loop.py"), str(tmp_path)], check=True)
    found = corpus(tmp_path)
    assert keys(found) == ["line\nbreak", "loop/real", "unreadable"]
    assert found.problems == (Problem("fifo.wav", "not a regular file (named pipe)"),
                              Problem("loop/dangling.wav", "link to nothing"))


def test_bad_inputs_are_all_found(shared: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(shared / "make_audio_bad.py"), str(tmp_path)], check=True)
    found = corpus(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {u.audio for u in found} == files - {"same_stem/a/take1.txt"}
    assert {"same_stem/a/take1", "same_stem/b/take1", "UPPER", "lossy.mp3", "lossy.ogg"} <= set(keys(found))
    assert found.problems == ()


def test_linked_folder_is_followed_once_and_the_real_one_named_first(tmp_path: Path) -> None:
    touch(tmp_path / "corpus", "real/x.wav")
    touch(tmp_path / "elsewhere", "y.wav")
    (tmp_path / "corpus" / "a_link").symlink_to("real")
    (tmp_path / "corpus" / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus" / "gone").symlink_to("nowhere")
    found = corpus(tmp_path / "corpus")
    assert keys(found) == ["far/y", "real/x"]
    assert found.problems == (Problem("gone", "link to nothing"),)


@pytest.mark.parametrize(("pattern", "path", "speaker", "extra"), [
    ("{speaker}#{song}/{utterance}", "Alto-1#newboy/0000.wav", "Alto-1", {"song": "newboy", "utterance": "0000"}),
    ("{speaker}/{song}_*", "p225/alto_song_12.wav", "p225", {"song": "alto"}),
    ("*/{speaker}/{speaker}_{sentence}_{mic}", "wav48/p225/p225_001_mic1.flac", "p225",
     {"sentence": "001", "mic": "mic1"}),
    ("{language}/{speaker}/{technique}/{song}/{group}/{utterance}", "English/EN-Alto-1/Vibrato/my love/G/0.wav",
     "EN-Alto-1", {"technique": "Vibrato", "song": "my love", "group": "G", "utterance": "0"}),
])
def test_pattern_gives_fields(tmp_path: Path, pattern: str, path: str, speaker: str, extra: dict[str, str]) -> None:
    utterance = corpus(touch(tmp_path, path), pattern=pattern).utterances[0]
    assert (utterance.speaker, utterance.extra) == (speaker, extra)
    assert utterance.language == ("English" if "language" in pattern else None)


KNOWN = {  # data set of docs/corpora.md: a path as it is published; speaker, fields
    "M4Singer": ("Alto-1#newboy/0000.wav", "Alto-1", {"song": "newboy", "utterance": "0000"}),
    "Opencpop": ("2001000001.wav", "opencpop", {}),
    "OpenSinger": ("ManRaw/0_a_b/0_a_b_12.wav", "Man0",
                   {"gender": "Man", "singer": "0", "song": "a_b", "utterance": "12"}),
    "VCTK 0.92": ("p225/p225_001_mic2.flac", "p225", {"sentence": "001", "mic": "mic2"}),
    "LibriTTS": ("dev-clean/1272/128104/1272_128104_000001_000000.wav", "1272",
                 {"subset": "dev-clean", "chapter": "128104", "utterance": "1272_128104_000001_000000"}),
    "LibriSpeech": ("train-clean-100/103/1240/103-1240-0000.flac", "103",
                    {"subset": "train-clean-100", "chapter": "1240", "utterance": "103-1240-0000"}),
    "LJSpeech": ("LJ001-0001.wav", "ljspeech", {}),
    "CSD": ("english/wav/en001a.wav", "csd", {"song": "en001a"}),
    "PJS": ("pjs001/pjs001_song.wav", "pjs", {"song": "001", "part": "song"}),
    "PopBuTFy": ("Female1#singing#Almost_lover_Amateur/Female1#singing#Almost_lover_Amateur_3.mp3", "Female1",
                 {"song": "Almost_lover_Amateur", "utterance": "3"}),
    "PopCS": ("popcs-万有引力/0001_wf0.wav", "popcs", {"song": "万有引力", "utterance": "0001"}),
    "NUS-48E": ("ADIZ/sing/01.wav", "ADIZ", {"part": "sing", "song": "01"}),
    "KiSing": ("421/421_0001.wav", "kising", {"song": "421", "utterance": "421_0001"}),
    "Opera": ("chinese/fem_01/neg_1.wav", "chinese_fem_01",
              {"culture": "chinese", "singer": "fem_01", "emotion": "neg", "song": "1"}),
    "SVCC 2023": ("CDF1/10001.wav", "CDF1", {"utterance": "10001"}),
    "VCC 2018": ("VCC2SF1/10001.wav", "VCC2SF1", {"utterance": "10001"}),
    "GTSinger": ("English/EN-Alto-1/Glissando/my love/Control_Group/0000.wav", "EN-Alto-1",
                 {"technique": "Glissando", "song": "my love", "group": "Control_Group", "utterance": "0000"}),
    "VocalSet": ("female1/arpeggios/belt/f1_arpeggios_belt_c_a.wav", "female1",
                 {"context": "arpeggios", "technique": "belt", "utterance": "f1_arpeggios_belt_c_a"}),
}


def documented() -> dict[str, dict[str, str]]:
    """Data set to the options of its command in docs/corpora.md."""
    lines = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8").splitlines()
    return {line.lstrip("| [").split(" |")[0].split("]")[0].split(" (")[0]:
            dict(re.findall(r"--(pattern|speaker) '?([^'` ]+)'?", line))
            for line in lines if line.startswith("|") and "featstore scan" in line}


@pytest.mark.parametrize("name", KNOWN)
def test_documented_command_fits_the_published_layout(tmp_path: Path, name: str) -> None:
    path, speaker, extra = KNOWN[name]
    found = corpus(touch(tmp_path, path), **documented()[name])
    assert [(u.speaker, dict(u.extra)) for u in found] == [(speaker, extra)]


def test_every_documented_data_set_is_tried() -> None:
    assert documented().keys() - {"your own, singer/song/utterance"} == KNOWN.keys()


def test_file_that_does_not_match_the_pattern_is_a_problem(tmp_path: Path) -> None:
    found = corpus(touch(tmp_path, "a/x_1.wav", "readme.wav"), pattern="{speaker}/{song}_*")
    assert (keys(found), found.problems) == (
        ["a/x_1"], (Problem("readme.wav", "does not match the pattern '{speaker}/{song}_*'"),))


def test_pattern_without_speaker_names_none(tmp_path: Path) -> None:
    assert corpus(touch(tmp_path, "wavs/1.wav"), pattern="wavs/{utterance}").utterances[0].speaker is None


@pytest.mark.parametrize("pattern", ["{speaker", "speaker}", "*", "{}", "{Speaker}", "{path}", "{a b}/{speaker}"])
def test_senseless_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(BadRequest, match="pattern"):
        corpus(tmp_path, pattern=pattern)


def test_speaker_is_fixed_or_made_of_fields(tmp_path: Path) -> None:
    touch(tmp_path, "ManRaw/0_song/a.wav", "WomanRaw/0_song/a.wav")
    assert {u.speaker for u in corpus(tmp_path, speaker="alice")} == {"alice"}
    found = corpus(tmp_path, pattern="{gender}Raw/{singer}_{song}/*", speaker="{gender}{singer}")
    assert {u.speaker for u in found} == {"Man0", "Woman0"}


def test_key_is_made_of_fields(tmp_path: Path) -> None:
    touch(tmp_path, "a/deep/er/x.wav")
    assert keys(corpus(tmp_path, key="{speaker}/{utterance}")) == ["a/x"]
    assert keys(corpus(tmp_path, key="songs/{key}")) == ["songs/a/deep/er/x"]
    with pytest.raises(BadCorpus, match=r"a/deep/er/x.wav has no 'speakr' for the key .*it has: speaker"):
        corpus(tmp_path, key="{speakr}/{utterance}")
    for senseless in ("x", "{speaker", "{speaker.__class__}"):
        with pytest.raises(BadRequest, match="write fields"):
            corpus(tmp_path, key=senseless)


def test_duplicate_keys_name_both_files_and_the_cure(shared: Path) -> None:
    manifest = shared / "audio" / "manifest.csv"
    with pytest.raises(BadCorpus, match=r"berklee_female/aa_A3.flac and berklee_male/aa_A3.flac .*--key '{speaker}/"):
        corpus(manifest)
    found = corpus(manifest, key="{speaker}/{utterance}")
    assert len(found) == 337
    first = found["csd_alto1/nino_dios"]
    assert (first.kind, first.language, first.duration_s, first.extra["licence"]) == (
        "singing", "es", 104.962, "CC-BY-4.0")
    assert all(found.path(u).exists() for u in found)


def test_missing_key_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(MissingUtterance, match=r"no utterance 'a/xx' \(it has: a/x"):
        corpus(touch(tmp_path, "a/x.wav", "b/y.wav"))["a/xx"]


def test_repr_answers_what_it_is(shared: Path) -> None:
    found = corpus(shared / "audio" / "manifest.csv", key="{speaker}/{utterance}")
    assert repr(found) == "<Corpus manifest: 337 utterances, 65 speakers, 0.8 h>"


def test_what_is_no_corpus_is_refused(tmp_path: Path) -> None:
    for name, reason in (("nowhere", "no such file or folder"), ("song.wav", "is not a corpus")):
        with pytest.raises(BadCorpus, match=reason):
            corpus(touch(tmp_path, "song.wav") / name)


def test_csv_columns(tmp_path: Path) -> None:
    text = ("\ufeffpath,speaker,start,end,duration,text,language,kind,take\n"
            "a/x.wav,7,1.5,2.5,1.0,\"one, two\",en,speech,007\n"
            "b.wav,,,,,,,,\n")
    found = corpus(put(tmp_path / "list.csv", text))
    assert found.utterances == (
        Utterance("a/x", "a/x.wav", 1.5, 2.5, "7", "one, two", "en", "speech", 1.0, {"take": "007"}),
        Utterance("b", "b.wav", extra={"take": ""}))


def test_start_and_duration_make_an_end_where_no_end_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", "path,start,duration\nx.wav,1,2\n")
    put(tmp_path / "b.csv", "path,start,end,duration\nx.wav,1,,2\n")
    assert corpus(tmp_path / "a.csv").utterances[0].end_s == 3.0
    assert corpus(tmp_path / "b.csv").utterances[0].end_s is None


def test_absolute_paths_and_those_above_the_manifest(tmp_path: Path) -> None:
    touch(tmp_path, "m/x.wav", "y.wav")
    found = corpus(rows(tmp_path / "m" / "l.jsonl", {"path": str(tmp_path / "m" / "x.wav"), "key": "x"},
                        {"path": "../y.wav", "key": "y"}, {"audio": "./x.wav", "key": "z"}))
    assert [u.audio for u in found] == ["x.wav", f"{tmp_path}/m/../y.wav", "x.wav"]
    assert all(found.path(u).exists() for u in found)


@pytest.mark.parametrize(("text", "reason"), [
    ("file,speaker\nx.wav,a\n", r"l.csv has no column 'path' \(or 'audio'\); it has: file, speaker"),
    ("", "has no column 'path'"),
    ("path,path\nx,y\n", "comes twice"),
    ("path,speaker\nx.wav\n", r"^l.csv:2: 1 cells, but 2 columns"),
    ("path,speaker\nx.wav,a,b\n", r"^l.csv:2: 3 cells, but 2 columns"),
    ("path,speaker\n,a\n", r"^l.csv:2: no path"),
    ("path,start,end\nx.wav,0,1\ny.wav,2,1\n", r"^l.csv:3: ends at 1.0 s, before"),
    ("path,start\nx.wav,nan\n", r"^l.csv:2: start is 'nan', not seconds"),
    ("path,end\nx.wav,inf\n", "not seconds"),
    ("path,start\nx.wav,-1\n", "not seconds"),
    ("path,duration\nx.wav,0\n", "duration 0"),
    ("path\n\"x.wav\n", "not CSV"),
])
def test_malformed_csv_is_refused_by_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(BadCorpus, match=reason):
        corpus(put(tmp_path / "l.csv", text))


@pytest.mark.parametrize(("line", "reason"), [
    ("{", r"^l.jsonl:2: not JSON"),
    ("[1]", r"^l.jsonl:2: list instead of an object"),
    ('{"path": "y.wav", "x": NaN}', "NaN is not a JSON number"),
    ('{"speaker": "a"}', r"^l.jsonl:2: no path"),
    ('{"path": 7}', "no path"),
    ('{"path": "y\\u0000.wav"}', "no path"),
    ('{"path": "y.wav", "speaker": ["a"]}', "speaker is .* not text"),
    ('{"path": "y.wav", "start": true}', "not seconds"),
    ('{"path": "y.wav", "start_s": 2, "end_s": 2}', "before or when it starts"),
    ("[" * 100_000, "not JSON"),
])
def test_malformed_jsonl_is_refused_by_line(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(BadCorpus, match=reason):
        corpus(put(tmp_path / "l.jsonl", '{"path": "x.wav"}\n' + line + "\n"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    for name in ("l.csv", "l.jsonl", "l.jsonl.gz"):
        (tmp_path / name).write_bytes(b"path\nx\xff\xfe.wav\n")
        with pytest.raises(BadCorpus, match=r"l\."):
            corpus(tmp_path / name)


def test_key_that_is_half_a_character_is_a_problem(tmp_path: Path) -> None:
    found = corpus(put(tmp_path / "l.jsonl", '{"path": "x.wav", "key": "\\ud800"}\n'))
    assert (len(found), found.problems[0].reason) == (0, "its key is not Unicode text")


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
names = words.filter(lambda word: not word.startswith((".", "/")) and "/" not in word)
times = st.floats(0, 1e5).map(lambda value: round(value, 6))
utterances = st.builds(
    lambda key, audio, start, length, open_end, speaker, text, duration, extra: Utterance(
        unicodedata.normalize("NFC", key), audio, start, None if open_end else start + length, speaker, text, None,
        None, duration, extra),
    words, names, times, st.floats(0.01, 1e4), st.booleans(), st.none() | words, st.none() | words,
    st.none() | st.floats(0.01, 1e5), st.dictionaries(st.sampled_from(["song", "utterance", "tags"]),
                                                      words | st.integers() | st.lists(words) | st.none()))


@settings(deadline=None)
@given(st.lists(utterances, max_size=6, unique_by=lambda u: u.key))
def test_written_corpus_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, made: list[Utterance]) -> None:
    folder = tmp_path_factory.mktemp("written")
    first = Corpus(folder, "list", tuple(sorted(made, key=lambda u: u.key)))
    write(first, folder / "list.jsonl")
    assert corpus(folder / "list.jsonl") == first
    assert [Utterance.from_json(u.to_json()) for u in first] == list(first)


def test_manifest_in_another_folder_still_finds_the_recordings(tmp_path: Path) -> None:
    found = corpus(touch(tmp_path / "a" / "wavs", "s/x.wav"))
    write(found, tmp_path / "a" / "list.jsonl")
    (tmp_path / "b").mkdir()
    write(found, tmp_path / "b" / "list.jsonl")
    near, far = corpus(tmp_path / "a" / "list.jsonl"), corpus(tmp_path / "b" / "list.jsonl")
    assert [near.utterances[0].audio, far.utterances[0].audio] == ["wavs/s/x.wav", str(tmp_path / "a/wavs/s/x.wav")]
    assert near.path(near["s/x"]) == far.path(far["s/x"]) == tmp_path / "a/wavs/s/x.wav"


def test_failed_write_leaves_the_old_manifest_alone(tmp_path: Path) -> None:
    target = put(tmp_path / "list.jsonl", "old")
    for extra, reason in (({"x": object()}, "cannot be written"), ({"path": "x"}, "may not be called path")):
        with pytest.raises(BadCorpus, match=reason):
            write(Corpus(tmp_path, "x", (Utterance("a", "a.wav", extra=extra),)), target)
    assert (target.read_text(), [path.name for path in tmp_path.iterdir()]) == ("old", ["list.jsonl"])


def test_kaldi_folder(tmp_path: Path) -> None:
    put(tmp_path / "wav.scp", "rec1 wavs/one.wav\nrec2 /data/two.flac\n")
    put(tmp_path / "segments", "u1 rec1 0.5 2.25\nu2 rec1 2.25 -1\nu3 rec2 0 1\n")
    put(tmp_path / "utt2spk", "u1 alice\nu2 bob\n")
    put(tmp_path / "text", "u1 one two three\nu2\n")
    put(tmp_path / "utt2lang", "u1 en\n")
    assert corpus(tmp_path).utterances == (
        Utterance("u1", "wavs/one.wav", 0.5, 2.25, "alice", "one two three", "en"),
        Utterance("u2", "wavs/one.wav", 2.25, None, "bob"),
        Utterance("u3", "/data/two.flac", 0.0, 1.0))


def test_kaldi_command_is_refused_by_name_and_never_run(tmp_path: Path) -> None:
    put(tmp_path / "wav.scp", f"good x.wav\nbad touch {tmp_path}/ran |\nark raw.ark:12\n")
    found = corpus(tmp_path)
    assert keys(found) == ["good"]
    assert [problem.path for problem in found.problems] == ["ark", "bad"]
    assert "nothing is run" in found.problems[1].reason
    assert not (tmp_path / "ran").exists()


def test_kaldi_paths_may_be_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "wavs/x.wav")
    put(tmp_path / "data" / "wav.scp", "x wavs/x.wav\n")
    monkeypatch.chdir(tmp_path)
    found = corpus(tmp_path / "data")
    assert found.path(found["x"]) == tmp_path / "wavs" / "x.wav"


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("wav.scp", "a\n", r"^wav.scp:1: 'a' stands alone"),
    ("wav.scp", "a x.wav\na y.wav\n", r"^wav.scp:2: 'a' comes again"),
    ("segments", "u1 a 0\n", r"^segments:1: 3 words"),
    ("segments", "u1 b 0 1\n", r"^segments:1: recording 'b' is not in wav.scp \(it has: a\)"),
    ("segments", "u1 a 2 1\n", r"^segments:1: ends at"),
    ("segments", "u1 a x 1\n", r"^segments:1: start is 'x'"),
])
def test_malformed_kaldi_table_is_refused_by_line(tmp_path: Path, name: str, text: str, reason: str) -> None:
    put(tmp_path / "wav.scp", "a x.wav\n")
    put(tmp_path / name, text)
    with pytest.raises(BadCorpus, match=reason):
        corpus(tmp_path)


def recording(name: str, path: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "sources": [{"type": "file", "channels": [0], "source": path}], "sampling_rate": 16000,
            "num_samples": 160000, "duration": 10.0, "channel_ids": [0], **more}


def cut(name: str, start: float, duration: float, supervisions: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": name, "start": start, "duration": duration, "channel": 0, "supervisions": supervisions,
            "recording": recording("r", "r.wav"), "type": "MonoCut", **more}


@pytest.mark.parametrize("zipped", [False, True])
def test_lhotse_cuts(tmp_path: Path, zipped: bool) -> None:
    said = {"id": "s", "recording_id": "r", "start": 0, "duration": 1.5, "channel": 0, "text": "ho",
            "language": "English", "speaker": "bob"}
    path = rows(tmp_path / "cuts.jsonl", cut("c1", 0.1, 1.2, [said, {**said, "speaker": "eve"}]),
                cut("c0", 0, 10.0, [said], custom={"song": "x", "path": "y"}))
    if zipped:
        (tmp_path / "cuts.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "cuts.jsonl.gz"
    assert corpus(path).utterances == (
        Utterance("c0", "r.wav", 0.0, None, "bob", "ho", "English", None, 10.0, {"song": "x"}),
        Utterance("c1", "r.wav", 0.1, 1.3, None, "ho ho", "English", None, 1.2))


def test_lhotse_recordings(tmp_path: Path) -> None:
    found = corpus(rows(tmp_path / "recordings.jsonl", recording("a", "a.wav"), recording("b", "/data/b.wav")))
    assert [(u.key, u.audio, u.duration_s, u.end_s) for u in found] == [
        ("a", "a.wav", 10.0, None), ("b", "/data/b.wav", 10.0, None)]


def test_lhotse_rows_that_are_more_than_files_are_problems(tmp_path: Path) -> None:
    command = recording("cmd", "x") | {"sources": [{"type": "command", "channels": [0], "source": "touch ran"}]}
    stereo = recording("r", "r.wav") | {"sources": [{"type": "file", "channels": [0, 1], "source": "r.wav"}]}
    found = corpus(rows(tmp_path / "c.jsonl", cut("ok", 0, 1, []), {"id": "mix", "tracks": [], "type": "MixedCut"},
                        command, recording("fast", "a.wav", transforms=[{"name": "Speed"}]),
                        cut("one", 0, 1, [], recording=stereo)))
    assert keys(found) == ["ok"]
    assert [problem.path for problem in found.problems] == ["cmd", "fast", "mix", "one"]


def test_lhotse_supervisions_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCorpus, match="a supervision without its recording"):
        corpus(rows(tmp_path / "s.jsonl", {"id": "s", "recording_id": "r", "start": 0, "duration": 1, "channel": 0}))


def test_lhotse_itself_writes_what_is_read(tmp_path: Path, shared: Path) -> None:
    lhotse = pytest.importorskip("lhotse", reason="lhotse writes its own manifests")
    made = lhotse.Recording.from_file(shared / "audio" / "vctk_p225" / "p225_003.flac")
    cuts = lhotse.CutSet.from_cuts([made.to_cut().truncate(offset=1.0, duration=2.0)])
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    found = corpus(tmp_path / "cuts.jsonl.gz").utterances[0]
    assert (found.start_s, found.end_s) == (1.0, 3.0)


def wave_of(path: Path) -> tuple[np.ndarray, int]:
    with Reader(path) as reader:
        return np.concatenate(list(reader)), reader.sample_rate


def levels(wave: np.ndarray, rate: int) -> np.ndarray:
    frame = rate // 100
    whole = wave[: len(wave) // frame * frame].reshape(-1, frame).astype(float)
    return 10 * np.log10(np.square(whole).mean(axis=1) + 1e-12)


@pytest.mark.parametrize("song", ["karissa_hobbs/*", "csd_alto2/nino_dios", "csd_bass3/nino_dios", "vocadito_S1/*",
                                  "nit_f001/*", "librivox_sonnets/sonnet_p001"])
@pytest.mark.parametrize("longest", [7, 15])
def test_real_song_is_cut_into_rows_and_no_sound_is_lost(shared: Path, tmp_path: Path, song: str, longest: int) -> None:
    (source,) = (shared / "audio").glob(f"{song}.flac")
    (tmp_path / "x.flac").symlink_to(source)
    found = corpus(tmp_path, slice_s=longest)
    wave, rate = wave_of(source)
    spans = [(round(u.start_s * rate), round((u.end_s or 0) * rate)) for u in found]
    assert keys(found) == [f"x/{number:04d}" for number in range(1, len(found) + 1)]
    assert all(3 * rate <= end - start <= longest * rate for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    level, kept = levels(wave, rate), np.zeros(len(wave), bool)
    for start, end in spans:
        kept[start:end] = True
    lost = ~kept[: len(level) * (rate // 100)].reshape(len(level), -1).all(axis=1)
    assert not (lost & (level > 10 * np.log10(np.square(wave.astype(float)).mean()) - 30)).any()


def song_of(tmp_path: Path, *parts: tuple[float, float]) -> Path:
    """Noise of the given levels and seconds."""
    noise = np.random.default_rng(0)
    wave = np.concatenate([level * noise.standard_normal(round(seconds * 16000)) for level, seconds in parts])
    soundfile.write(tmp_path / "song.wav", wave, 16000, subtype="PCM_16")
    return tmp_path


def cuts_of(tmp_path: Path, longest: float = 15) -> list[tuple[float, float | None]]:
    return [(u.start_s, u.end_s) for u in corpus(tmp_path, slice_s=longest)]


def test_long_silences_are_dropped_with_a_margin(tmp_path: Path) -> None:
    song_of(tmp_path, (0.0, 2.0), (0.1, 5.0), (0.0, 3.0), (0.1, 6.0), (0.0, 1.0))
    assert cuts_of(tmp_path) == [(1.9, 7.1), (9.9, 16.1)]


def test_short_silences_are_where_cuts_fall(tmp_path: Path) -> None:
    song_of(tmp_path, (0.1, 9.0), (0.0, 0.3), (0.1, 10.0))
    ((start, middle), (again, end)) = cuts_of(tmp_path)
    assert (start, end) == (0.0, 19.3)
    assert middle == again
    assert 9.0 <= again <= 9.3


def test_phrase_shorter_than_three_seconds_keeps_silence_around_it(tmp_path: Path) -> None:
    song_of(tmp_path, (0.0, 5.0), (0.1, 1.0), (0.0, 5.0))
    ((start, end),) = cuts_of(tmp_path)
    assert end is not None
    assert start <= 5.0 < 6.0 <= end
    assert end - start == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("seconds", [0.5, 2.999, 3.0, 7.0])
def test_short_recording_is_one_row(tmp_path: Path, seconds: float) -> None:
    assert cuts_of(song_of(tmp_path, (0.1, seconds)), 7) == [(0.0, seconds)]


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from([0.0, 0.001, 0.1, 0.3]), st.floats(0.05, 9).map(lambda s: round(s, 3))),
                      min_size=1, max_size=8), longest=st.floats(7, 20).map(lambda s: round(s, 2)))
def test_any_recording_can_be_cut(tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[float, float]],
                                  longest: float) -> None:
    parts = [*parts, (0.1, 3.0)]
    found = cuts_of(song_of(tmp_path_factory.mktemp("any"), *parts), longest)
    assert all(end is not None and 3.0 - 1e-6 <= end - start <= longest + 1e-6 for start, end in found)
    assert all(before[1] <= after[0] for before, after in pairwise(found))


def test_rows_lie_inside_the_cut_they_were_made_of(tmp_path: Path) -> None:
    song_of(tmp_path, (0.1, 40.0))
    rows(tmp_path / "l.jsonl", {"key": "x", "path": "song.wav", "start": 5.0, "end": 30.5, "text": "all",
                                "speaker": "a"})
    found = corpus(tmp_path / "l.jsonl", slice_s=10)
    assert (found.utterances[0].start_s, found.utterances[-1].end_s) == (5.0, 30.5)
    assert {(u.text, u.speaker) for u in found} == {(None, "a")}


def test_recordings_that_cannot_be_sliced_are_problems(tmp_path: Path) -> None:
    song_of(tmp_path, (0.1, 4.0))
    soundfile.write(tmp_path / "silent.wav", np.zeros(64000), 16000)
    found = corpus(touch(tmp_path, "empty.wav"), slice_s=15)
    assert keys(found) == ["song/0001"]
    assert found.problems == (Problem("empty.wav", "empty file"),
                              Problem("silent.wav", "silent throughout: there is nothing to slice"))


def test_slices_under_seven_seconds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="at least 7 s"):
        corpus(tmp_path, slice_s=5)
