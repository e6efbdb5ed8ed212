"""What a run learns from, under the names that models use: crops of its training part, held-out utterances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

import featstore as fs
from featstore.batches import SPEAKER
from featstore.errors import BadRequest, nearest
from featstore.view import View

from .hearing import part_of
from .preparation import Training
from .run import Run


class Examples:
    """What a run learns from: crops of its training part, and the utterances it is validated on.

    A batch has the features by their roles, "lengths" (B,), and for a model of numbered voices "singer" (B,), rows.
    """

    def __init__(self, run: Run, store: fs.Store, training: Training) -> None:
        self._roles = {read.name: role for role, items in run.settings.reads.items() for read in items}
        self.contract = run.settings.contract
        self._rows = self._rows_of(run) if run.kind == "acoustic" else None
        self.held_out = self._view(run, store, self._validated(run, store))
        self.crops = fs.crops(self._view(run, store, part_of(store, run.settings.training, "train")),
                              frames=training.frames, batch=training.batch, seed=training.seed,
                              balance=None if training.balance == "none" else training.balance)
        if self._rows is not None:
            self._check_known(run, self._rows)
            self._row_of = torch.tensor([self._rows[name] for name in self.crops.speakers] + [-1])

    def _view(self, run: Run, store: fs.Store, keys: list[str]) -> View:
        like = run.settings.reads["log-mel"][0].name
        return store.view(list(self._roles), like=like, timing=run.settings.timing, utterances=keys)

    @staticmethod
    def _rows_of(run: Run) -> dict[str, int] | None:
        """Singer -> row, where the model numbers its voices."""
        numbered = run.settings.config.speaker == "one-hot"
        return {name: singer.row for name, singer in run.singers.items()} if numbered else None

    def _validated(self, run: Run, store: fs.Store) -> list[str]:
        """The held-out utterances that can be made: by singers that are known, where voices are numbered."""
        keys = part_of(store, run.settings.training, "valid")
        if self._rows is None:
            return keys
        return [key for key in keys if store.utterances[key].speaker in self._rows]

    def _check_known(self, run: Run, rows: Mapping[str, int]) -> None:
        new = [name for name in self.crops.speakers if name not in rows]
        if new:
            raise BadRequest(f"{run.path} does not know the singer {new[0]!r}, whose utterances it would learn from "
                             f"({nearest(new[0], rows)}): the store has changed since the run was prepared. Begin "
                             f"another run with its weights: --init {run.path} -o OTHER")

    def named(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays under the names that models use."""
        return {self._roles[name]: value for name, value in batch.items() if name in self._roles}

    def by_role(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch under the names that models use."""
        found = {self._roles.get(name, name): value for name, value in batch.items()}
        if self._rows is not None:
            found["singer"] = self._row_of.to(batch[SPEAKER].device)[batch[SPEAKER]]
        return found

    def to_validate(self, count: int, frames: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Key and features by role of the first `count` held-out utterances, of each at most `frames` frames."""
        view = self.held_out
        for key in list(view)[:count]:
            found = self.named(view.crop(key, start=0, frames=min(view.length(key), frames)))
            if self._rows is not None:
                found["singer"] = np.array(self._rows[str(view.store.utterances[key].speaker)])
            yield key, found
