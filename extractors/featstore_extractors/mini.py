"""The content encoder in the box: small, its weights beside this file, so that nothing is downloaded.

It knows phones from synthesisers and little else; docs/mini/encoder.md says how it was made and how far to trust it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

from . import checkpoint
from .encoder import SAMPLE_RATE, Architecture, Encoder, Network
from .imports import required

HOP_LENGTH = 320  # that of convnext.py, which needs torch


@dataclass(frozen=True)
class Mini(Encoder):
    """Content of speech and singing: waveform (N,) -> (N // 320, D), 50 frames a second; D = 128 in the box.

    phones: the phones' probabilities (N // 320, P) in place of the content; they are a softmax of a linear map of it.
    Presets: phones. There is one layer. Another encoder of this kind is given by `weights`: a safetensors file that
    `python -m featstore_zoo.mini encoder` made.
    """

    phones: bool = False

    name: ClassVar[str] = "mini"
    DEFAULT: ClassVar[str] = "featstore/mini"
    EXPECTED: ClassVar[str] = "a safetensors file that `python -m featstore_zoo.mini encoder` made"
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"phones": {"phones": True}}

    def architecture(self) -> Architecture:
        facts = {"blocks": self._sizes["blocks"], "width": self._sizes["width"], "hop_length": HOP_LENGTH}
        return Architecture(layers=0, dim=self._sizes["dim"], output=0, facts=facts)

    def network(self, device: str) -> Network:
        required("torch", "encoders")
        from .convnext import ContentNet, Sizes

        network = ContentNet(Sizes(**self._sizes))
        tensors = {name: tensor.float() for name, tensor in checkpoint.read(self.path).items()}  # half in the file
        checkpoint.load_into(network, tensors, self.path)
        network.requires_grad_(False).eval().to(device)
        if self.compile:
            for block in network.blocks:
                block.compile(dynamic=True)
        return network

    @property
    def frame_rate(self) -> Fraction:
        return Fraction(SAMPLE_RATE, HOP_LENGTH)

    @property
    def centre_s(self) -> Fraction:
        return Fraction(HOP_LENGTH, 2 * SAMPLE_RATE)

    @property
    def window(self) -> tuple[int, int]:
        """24 s with all that a frame depends on around it: pieces give what the whole gives."""
        reach = self._sizes["blocks"] * 7 + 2  # frames
        return 24 * SAMPLE_RATE, reach * HOP_LENGTH

    @property
    def projected(self) -> int:
        return len(self.inventory) if self.phones else 0

    def frames(self, samples: int) -> int:
        return samples // HOP_LENGTH

    def mixed(self, network: Any, layers: Sequence[Any]) -> Any:
        content = super().mixed(network, layers)
        return network.phones(content).float().softmax(-1) if self.phones else content

    @property
    def recorded(self) -> dict[str, Any]:
        return {**super().recorded, "phones": self.phones}

    @property
    def inventory(self) -> list[str]:
        """The phones, by channel of `phones=true`: IPA, the first of them silence."""
        return list(self._header["phones"])

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(self._header["sizes"])

    @property
    def _header(self) -> dict[str, Any]:
        return header(self.path)


def header(path: Path) -> dict[str, Any]:
    """What such a file says of itself: its sizes and phones. ValueError for a file of another kind."""
    metadata = checkpoint.metadata(path)
    try:
        return {"sizes": json.loads(metadata["sizes"]), "phones": json.loads(metadata["phones"])}
    except (KeyError, ValueError):
        raise ValueError(f"{path} is no content encoder of this kind: expected {Mini.EXPECTED}") from None
