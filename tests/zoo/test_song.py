"""A song in windows is the song made at once."""

from __future__ import annotations

import acoustics
import numpy as np
import pytest
import torch

from featstore_zoo import song, transformer
from featstore_zoo.vocode import synthesise

pytestmark = pytest.mark.usefixtures("one_thread")
FRAMES = 300
CASES = {"diffwavenet_svc": {"clamp": False}, "transformer_svc": {}, "como_svc": {}, "vits_svc": {}}


def seeded():
    return torch.Generator().manual_seed(4)


def features_of(batch):
    """Frames of a batch as a song gives them."""
    def features(begin, end):
        return {name: x if name in ("singer", "speaker") else x[:, begin:end] for name, x in batch.items()
                if name not in ("wave", "log-mel")}

    return features


def both(name, size, **changes):
    """What a model makes of 300 frames in windows, and at once."""
    model = acoustics.small(name, **changes)
    batch = acoustics.batch_for(model.config, FRAMES, batch=1)
    with torch.inference_mode():
        made = model.song(features_of(batch), FRAMES, seeded(), size)
        whole = model(batch, seeded())[0].numpy()
    return (np.concatenate(list(made)) if model.gives == "wave" else made[0].numpy()), whole


@pytest.fixture
def short(monkeypatch):
    """Attention that reaches 20 frames, so that a short song is longer than it reaches."""
    monkeypatch.setattr(transformer, "REACH", 20)
    monkeypatch.setattr(transformer.RelativeAttention.__init__, "__defaults__", (20,))


@pytest.mark.parametrize("name", CASES)
def test_windows_are_the_whole(name, short):
    made, whole = both(name, 64, **CASES[name])
    assert made.shape == whole.shape
    assert np.abs(made - whole).max() < 1e-4 * np.abs(whole).max()


def test_what_counts_frames_from_where_it_begins_is_given_no_more_than_it_has_learnt_from():
    model, seen = acoustics.small("transformer_svc", variant="plain"), []
    batch = acoustics.batch_for(model.config, 700, batch=1)

    def features(begin, end):
        seen.append(end - begin)
        return features_of(batch)(begin, end)

    with torch.inference_mode():
        made, other = (model.song(features, 700, seeded(), size)[0].numpy() for size in (64, 1024))
        inside = model(features_of(batch)(0, 233 + 128), seeded())[0].numpy()
    assert np.array_equal(made, other) and max(seen) <= 512
    np.testing.assert_allclose(made[:217], inside[:217], rtol=1e-5, atol=1e-5)  # before it fades into the next
    assert np.abs(np.diff(made, axis=0)).max() < 2 * np.abs(np.diff(inside, axis=0)).max()


def test_nothing_beyond_its_reach_is_attended_to(short):
    torch.manual_seed(0)
    attention = transformer.RelativeAttention(8, 2, 4, 0.0)
    x = torch.randn(1, 8, 60)
    other = x.clone()
    other[..., 30] += 1
    with torch.no_grad():
        heard = torch.nonzero((attention(x, None) != attention(other, None)).any(1)[0]).flatten()
    assert (heard.min(), heard.max()) == (10, 50)


@pytest.mark.parametrize(("name", "changes"), [
    ("diffwavenet_svc", {"sampler": "ddpm", "sampling_steps": 20}), ("diffwavenet_svc", {"sampler": "ddim"}),
    ("como_svc", {"heun": True}), ("como_svc", {"stage": "student"}), ("transformer_svc", {}), ("vits_svc", {})])
def test_a_song_that_fits_one_window_is_made_at_once(name, changes):
    made, whole = both(name, 512, **changes)
    np.testing.assert_allclose(made, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 40), ("ddim", 5)])
def test_what_a_frame_depends_on_does_not_widen_with_the_steps(sampler, steps):
    made, whole = both("diffwavenet_svc", 40, sampler=sampler, sampling_steps=steps, clamp=False)
    assert np.abs(made - whole).max() < 1e-4 * np.abs(whole).max()


def test_reach_is_as_far_as_a_denoiser_hears():
    model = acoustics.small("diffwavenet_svc").acoustic_mapper
    assert model.reach == 1 + 2 + 4 + 8 + 1
    x, condition = torch.zeros(1, 101, 20), torch.zeros(1, 101, 24)
    other = x.clone()
    other[0, 50] = 1
    with torch.no_grad():
        a, b = (model.hearing(condition)(y, 3.0) for y in (x, other))
    heard = torch.nonzero((a != b).any(2)[0]).flatten()
    assert (heard.min(), heard.max()) == (50 - model.reach, 50 + model.reach)


@pytest.mark.parametrize("frames", [1, 63, 64, 65, 200, 1000])
def test_pieces_cover_every_frame_once_and_fade_between_windows(frames):
    """A window that knows its place, and one that gives its own beginning: where windows meet both agree, or fade."""
    def place(begin, end):
        return torch.arange(begin, end, dtype=torch.float32)[None, :, None]

    def beginning(begin, end):
        return torch.full((1, end - begin, 1), float(begin))

    for pieces in (song.local(place, frames, 64, 9), song.faded(place, frames, 64, 16, 8)):
        assert torch.equal(song.joined(pieces, frames)[0, :, 0], torch.arange(frames, dtype=torch.float32))
    steps = song.joined(song.faded(beginning, frames, 64, 16, 8), frames)[0, :, 0].diff().abs()
    assert not len(steps) or steps.max() <= 64 / 8


def test_vits_speaks_what_its_generator_makes_of_the_latent():
    model = acoustics.small("vits_svc")
    batch = acoustics.batch_for(model.config, 90, batch=1)
    with torch.inference_mode():
        pieces = list(model.song(features_of(batch), 90, seeded(), 32))
    assert [len(piece) for piece in pieces] == [512, 512, 416]
    assert np.isfinite(synthesise(model.dec, np.zeros((5, 24), np.float32), np.zeros(5, np.float32))).all()
