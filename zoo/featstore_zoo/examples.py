"""What a run learns from, under the names that models use: crops of its training part, held-out utterances."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

import featstore as fs

from .preparation import Training
from .run import Run


class Examples:
    """What a run learns from: crops of its training part, and the utterances it is validated on."""

    def __init__(self, run: Run, store: fs.Store, training: Training) -> None:
        self._roles = {read.name: role for role, items in run.settings.reads.items() for read in items}
        contract, like = run.settings.contract, run.settings.reads["log-mel"][0].name
        split = run.settings.training.get("split")
        names, timing = list(self._roles), run.settings.timing
        if split:
            here = store.view(names, like=like, timing=timing, split=f"{split}/train")
            self.held_out = store.view(names, like=like, timing=timing, split=f"{split}/valid")
        else:
            known = run.settings.training.get("held_out", [])
            kept = [key for key in store.utterances if key not in set(known)]
            here = store.view(names, like=like, timing=timing, utterances=kept)
            self.held_out = store.view(names, like=like, timing=timing, utterances=list(known))
        self.crops = fs.crops(here, frames=training.frames, batch=training.batch, seed=training.seed,
                              balance=None if training.balance == "none" else training.balance)
        self.contract = contract

    def named(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays under the names that models use."""
        return {self._roles[name]: value for name, value in batch.items() if name in self._roles}

    def by_role(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch under the names that models use."""
        return {self._roles.get(name, name): value for name, value in batch.items()}
