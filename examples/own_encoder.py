"""A content encoder of one's own: two layers of convolution over log-mel, 50 frames a second.

python own_encoder.py own.safetensors      writes weights for it: random ones, where yours come from training
featstore extract CORPUS STORE -f own_encoder.OwnEncoder,weights=own.safetensors,layer=1
"""

import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from safetensors.torch import save_file

from featstore_extractors import checkpoint
from featstore_extractors.encoder import Architecture, Encoder
from featstore_extractors.signal import MelContract, mel_filters

WINDOW, HOP, MELS, DIM, LAYERS = 640, 320, 40, 64, 2  # samples at 16 kHz; channels


class Layers(torch.nn.Module):
    """Waveforms (N,) -> the stream (B, T, DIM) that enters the first layer, and that after each."""

    def __init__(self):
        super().__init__()
        mels = MelContract(sample_rate=16000, n_fft=WINDOW, win_length=WINDOW, hop_length=HOP, n_mels=MELS, fmax=8000)
        self.register_buffer("filters", torch.from_numpy(mel_filters(mels)).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(WINDOW), persistent=False)
        self.enter = torch.nn.Conv1d(MELS, DIM, 1)
        self.layers = torch.nn.ModuleList(torch.nn.Conv1d(DIM, DIM, 3, padding=1) for _ in range(LAYERS))

    def hidden(self, waves, wanted):
        lengths = [frames(len(wave)) for wave in waves]
        x = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
        x = torch.stft(x, WINDOW, HOP, window=self.hann, center=False, return_complex=True).abs()
        x = self.enter((self.filters @ x).clamp_min(1e-5).log())  # (B, DIM, T)
        beyond = torch.arange(x.shape[2], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None, None]
        found = {0: x.transpose(1, 2)}
        for number, layer in enumerate(self.layers[: max(wanted)], 1):
            x = x + torch.relu(layer(x.masked_fill(beyond, 0)))  # a row must not see how far others are padded
            found[number] = x.transpose(1, 2)
        return found, lengths


def frames(samples):
    return max(0, (samples - WINDOW) // HOP + 1)


@dataclass(frozen=True)
class OwnEncoder(Encoder):  # the base brings weights=, layer=, mix=, precision=, dtype= and one pass for all layers
    """Waveform (N,) at 16 kHz -> (T, 64); frame i covers samples [320 i, 320 i + 640)."""

    name: ClassVar[str] = "own-encoder"
    version: ClassVar[int] = 1  # raise it whenever a number changes
    frame_rate: ClassVar[Fraction] = Fraction(50)
    centre_s: ClassVar[Fraction] = Fraction(WINDOW, 2 * 16000)
    window: ClassVar[tuple[int, int]] = (60 * 16000, 3 * HOP)  # core and what reaches into its frames
    EXPECTED: ClassVar[str] = "a file that own_encoder.py wrote"
    PRESETS: ClassVar[dict[str, dict[str, str]]] = {"early": {"layer": "1"}}

    def architecture(self):
        return Architecture(LAYERS, DIM, output=LAYERS, facts={"mels": MELS})

    def frames(self, samples):
        return frames(samples)

    def network(self, device):
        network = Layers()
        checkpoint.load_into(network, checkpoint.read(self.path), self.path)
        return network.to(device).eval()


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]) if sys.argv[2:] else 0)
    save_file(Layers().state_dict(), sys.argv[1] if sys.argv[1:] else "own.safetensors")
