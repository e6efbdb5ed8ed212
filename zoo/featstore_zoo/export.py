"""Vocoders as ONNX, for programs without torch: any number of frames, weight norm folded, 32-bit floats.

Inputs are `log_mel` (1, T, n_mels) and, for NSF-HiFiGAN, `f0` (1, T) in Hz and `noise` (1, K, T hop), normal numbers
with K = harmonics + 1 (zeros give a voice without hiss); the output is `wave` (1, T hop). The mel contract stands in
the model's metadata.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featstore.errors import BadRequest, CannotLoad
from featstore_extractors.signal import MelContract

from .run import Run, put_file
from .vocoder import window

FRAMES = 20  # of the example that the graph is traced with; any number may be given to it later
OPSET = 18


def to_onnx(run: Run, out: Path) -> None:
    """Write the vocoder of a run.

    Raises:
        BadRequest: if it draws noise at every step, and so is no function of its inputs: DiffWave.
        CannotLoad: if the weights are missing, or the packages onnx and onnxscript are.
    """
    if run.kind != "vocoder":
        raise BadRequest(f"{run.path} is of kind {run.kind}: only vocoders are exported")
    graph, inputs = graph_of(copy.deepcopy(run.model))
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise CannotLoad(f"ONNX export needs {error.name}: pip install onnx onnxscript") from error
    frames = torch.export.Dim("frames", min=2)
    hop = run.settings.config.hop_length
    shapes = {"log_mel": {1: frames}, "f0": {1: frames}, "noise": {2: hop * frames}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(graph, tuple(inputs.values()), dynamo=True, opset_version=OPSET,
                                    input_names=list(inputs), output_names=["wave"], verbose=False,
                                    dynamic_shapes=tuple(shapes[name] for name in inputs))
    if program is None:
        raise CannotLoad(f"{run.settings.model} cannot be written as ONNX by torch {torch.__version__}")
    proto = program.model_proto
    for name, value in (("model", run.settings.model), ("contract", json.dumps(vars(run.settings.contract)))):
        proto.metadata_props.append(onnx.StringStringEntryProto(key=name, value=value))
    put_file(out, proto.SerializeToString())


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """A logger and those below it tell errors alone: the exporter warns of packages that nothing here needs."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def graph_of(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The vocoder as a function of tensors alone, and an example of each of its inputs."""
    from .nsf_hifigan import Model as Nsf
    from .vocos import Model as Vocos

    vocoder: Any = model.eval()
    vocoder.fold()
    config = vocoder.config
    mel = torch.full((1, FRAMES, config.n_mels), -4.0)
    if isinstance(vocoder, Nsf):
        noise = torch.zeros(1, config.harmonics + 1, FRAMES * config.hop_length)
        return _NsfGraph(vocoder), {"log_mel": mel, "f0": torch.full((1, FRAMES), 220.0), "noise": noise}
    if vocoder.needs_generator:
        raise BadRequest(f"{type(vocoder).__module__} draws noise in every step and is no function of its inputs: it "
                         "cannot be exported; take a vocoder such as HiFi-GAN")
    return (_SpectralGraph(vocoder) if isinstance(vocoder, Vocos) else _PlainGraph(vocoder)), {"log_mel": mel}


class _PlainGraph(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, log_mel: Tensor) -> Tensor:
        wave: Tensor = self.model.render(log_mel)
        return wave


class _NsfGraph(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, log_mel: Tensor, f0: Tensor, noise: Tensor) -> Tensor:
        first = torch.zeros(1, self.model.config.harmonics + 1)
        source = self.model.m_source.excite(f0, first, noise, 0, f0.shape[1])
        wave: Tensor = self.model.render(log_mel, source)
        return wave


class _SpectralGraph(nn.Module):
    """A vocoder that ends in an inverse STFT, which ONNX does not have: as one transposed convolution."""

    basis: Tensor
    square: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        contract = MelContract(**{f.name: getattr(model.config, f.name) for f in fields(MelContract)})
        taper = window(contract, torch.device("cpu"), torch.float64)
        n_fft, self.hop = contract.n_fft, contract.hop_length
        self.start = (n_fft - self.hop) // 2 if contract.padding == "frames" else n_fft // 2
        bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64)
        angle = 2 * math.pi / n_fft * torch.outer(bins, torch.arange(n_fft, dtype=torch.float64))
        scale = torch.full_like(bins, 2 / n_fft)
        scale[0] = scale[-1] = 1 / n_fft  # of a real signal every other bin stands for two
        basis = torch.cat([angle.cos() * scale[:, None], -angle.sin() * scale[:, None]]) * taper
        self.register_buffer("basis", basis[:, None].float())
        self.register_buffer("square", taper.square()[None, None].float())

    def forward(self, log_mel: Tensor) -> Tensor:
        real, imaginary = self.model.spectrum(log_mel)
        spectrum = torch.cat([real, imaginary], 2).transpose(1, 2)  # (B, 2 bins, T)
        total = F.conv_transpose1d(spectrum, self.basis, stride=self.hop)
        weight = F.conv_transpose1d(torch.ones_like(spectrum[:, :1]), self.square, stride=self.hop)
        stop = self.start + log_mel.shape[1] * self.hop
        wave = F.pad(total / weight.clamp_min(1e-8), (0, self.start))[:, 0, self.start:stop]
        return wave
