"""A song in another voice, from Python: python convert_song.py song.wav alice runs/a runs/voc

runs/a and runs/voc are folders that `featstore train` or `featstore zoo import` made. Writes song-alice.wav, moved to
where alice sings, and song-alice-as-it-is.wav, in the key of the song; its features are extracted once for both.
"""

import sys
from pathlib import Path

from featstore_zoo import convert, run

song, singer, model, vocoder = sys.argv[1:]
for name, known in run.load(model).singers.items():
    print(f"{model} knows {name}" + (f", who sings about {known.median_hz:.0f} Hz" if known.median_hz else ""))
for key, suffix in (("auto", ""), (0, "-as-it-is")):
    made = convert.file(song, to=singer, run=model, vocoder=vocoder, key=key, seed=0,
                        out=f"{Path(song).stem}-{singer}{suffix}.wav")
    print(f"{made.path}: {made.seconds:.1f} s of sound in {made.took_s:.1f} s, {made.semitones:+g} semitones")
    for remark in made.remarks:
        print(f"  {remark}")
