"""The probes: linear ones and a small perceptron for classes, values and text, at a bounded cost and by seed alone.

Each takes standardised inputs, so that a feature's scale plays no part, and learns for about STEPS steps whatever the
amount of data. What is compared between features is how much such a weak reader finds (Alain and Bengio, 2016).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np

Array = np.ndarray
Probe = Literal["linear", "mlp"]
PROBES: tuple[Probe, ...] = ("linear", "mlp")

HIDDEN = 64
STEPS = 400       # of a perceptron on frames or utterances
BATCH = 512
PENALTIES = tuple(10.0 ** power for power in range(7))  # of ridge and logistic regression, on the sum over examples
INNER = 4         # folds of what is learnt from, by units, on which a penalty is chosen
CTC_STEPS = 400
CTC_BATCH = 16


def classify(probe: Probe, learnt: Array, classes: Array, units: Array, asked: Array, seed: int) -> Array:
    """Classes (m,) of `asked` (m, D) by a probe that learnt from (n, D) and classes (n,), each class equally often.

    units: (n,) which belong together; a linear probe's penalty is chosen on a fold of other units.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is fixed: what it gives is what is compared
        penalty = _penalty_of_classes(learnt, classes, units, seed) if probe == "linear" else 0.0
        learnt, asked = standardised(learnt, asked)
        often = _balanced(classes)
        model = _logistic(penalty) if probe == "linear" else _perceptron("classes", len(often), seed)
        return model.fit(learnt[often], classes[often]).predict(asked)


def regress(probe: Probe, learnt: Array, values: Array, units: Array, asked: Array, seed: int) -> Array:
    """Values (m,) of `asked` (m, D) by a probe that learnt from (n, D) and values (n,).

    units: (n,) which belong together; a linear probe's penalty is chosen on folds of other units.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import Ridge

    penalty = _penalty_of_values(learnt, values, units) if probe == "linear" else 0.0
    learnt, asked = standardised(learnt, asked)
    mean, scale = values.mean(), max(float(values.std()), 1e-9)
    model = Ridge(alpha=penalty) if probe == "linear" else _perceptron("values", len(values), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(learnt, (values - mean) / scale).predict(asked) * scale + mean


def transcribe(probe: Probe, learnt: Sequence[Array], texts: Sequence[str], asked: Sequence[Array],
               seed: int) -> list[str]:
    """Texts of the sequences `asked`, each (T, D), by a probe that learnt from others: CTC (Graves et al., 2006).

    Each frame is read by itself, without its neighbours; the best path is taken, without a language model.
    """
    import torch
    from torch import nn

    letters = sorted(set("".join(texts)))
    number = {letter: i + 1 for i, letter in enumerate(letters)}  # 0 is the blank
    flat, wanted = standardised(np.concatenate(learnt), np.concatenate(asked))
    learnt, asked = _cut(flat, learnt), _cut(wanted, asked)
    lines = [[number[c] for c in line] for line in texts]
    least = [len(line) + sum(a == b for a, b in pairwise(line)) for line in lines]  # frames: a blank between equal ones
    fits = [i for i, frames in enumerate(learnt) if len(frames) >= least[i]]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the layers draw their weights from the global generator
        outputs, dim = len(letters) + 1, flat.shape[1]
        model = nn.Linear(dim, outputs) if probe == "linear" else nn.Sequential(
            nn.Linear(dim, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, outputs))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, CTC_STEPS)
    for _ in range(CTC_STEPS if fits else 0):
        batch = [fits[i] for i in torch.randint(len(fits), (CTC_BATCH,), generator=generator).tolist()]
        frames = nn.utils.rnn.pad_sequence([torch.from_numpy(learnt[i]) for i in batch])  # (T, B, D)
        loss = nn.functional.ctc_loss(
            model(frames).log_softmax(-1), torch.tensor([n for i in batch for n in lines[i]]),
            torch.tensor([len(learnt[i]) for i in batch]), torch.tensor([len(lines[i]) for i in batch]))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    with torch.inference_mode():
        paths = [model(torch.from_numpy(frames)).argmax(-1).tolist() for frames in asked]
    return ["".join(letters[n - 1] for n, _ in groupby(path) if n) for path in paths]


@contextmanager
def one_thread() -> Iterator[None]:
    """Numbers that do not depend on how many cores there are; such small products gain nothing by more of them."""
    import torch
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def edits(found: str, expected: str) -> int:
    """Insertions, deletions and substitutions that turn one text into the other (Levenshtein, 1966)."""
    row = list(range(len(expected) + 1))
    for i, letter in enumerate(found, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(expected, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def standardised(learnt: Array, asked: Array) -> tuple[Array, Array]:
    """Both with the mean and deviation of what is learnt from taken out, by channel; a constant channel is zeros."""
    mean, scale = learnt.mean(0, dtype=np.float64), learnt.std(0, dtype=np.float64)
    still = scale <= 1e-6 * (1 + np.abs(mean))
    shrink = np.where(still, 0, 1 / np.where(still, 1, scale))
    return ((learnt - mean) * shrink).astype(np.float32), ((asked - mean) * shrink).astype(np.float32)


def _logistic(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1 / penalty, max_iter=300, warm_start=True)


def _penalty_of_classes(x: Array, classes: Array, units: Array, seed: int) -> float:
    """The penalty that is right most often on a fold of units that it did not learn from, as a mean over classes; of
    equal ones the strongest. One fold: many fits of thousands of frames would take minutes for each feature."""
    from sklearn.metrics import recall_score
    from sklearn.model_selection import StratifiedGroupKFold

    folds = min(INNER, int(np.unique(classes, return_counts=True)[1].min()), len(np.unique(units)))
    if folds < 2:
        return PENALTIES[0]
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    learn, check = next(iter(parts.split(x, classes, units)))
    if len(np.unique(classes[learn])) < 2 or not len(check):
        return PENALTIES[0]
    learnt, asked = standardised(x[learn], x[check])
    often = _balanced(classes[learn])
    learnt, told = learnt[often], classes[learn][often]
    model, best, right = _logistic(PENALTIES[-1]), PENALTIES[-1], -1.0
    for penalty in reversed(PENALTIES):  # each goes on from the stronger one's weights
        model.set_params(C=1 / penalty)
        found = recall_score(classes[check], model.fit(learnt, told).predict(asked), labels=np.unique(classes[check]),
                             average="macro", zero_division=0)
        if found > right:
            best, right = penalty, found
    return best


def _penalty_of_values(x: Array, values: Array, units: Array) -> float:
    """The penalty of least squared error on folds of units that it did not learn from.

    Ridge for all penalties at once: w = V (V' X'y) / (l + penalty), with X'X = V diag(l) V'.
    """
    from sklearn.model_selection import GroupKFold

    if len(np.unique(units)) < INNER:
        return PENALTIES[0]
    penalties, errors = np.array(PENALTIES), np.zeros(len(PENALTIES))
    for learn, check in GroupKFold(INNER).split(x, values, units):
        learnt, asked = (part.astype(np.float64) for part in standardised(x[learn], x[check]))
        mean = values[learn].mean()
        sizes, turn = np.linalg.eigh(learnt.T @ learnt)
        along = turn.T @ (learnt.T @ (values[learn] - mean))
        weights = turn @ (along[:, None] / (np.maximum(sizes, 0)[:, None] + penalties))  # (D, penalties)
        errors += ((asked @ weights - (values[check] - mean)[:, None]) ** 2).sum(0)
    return float(penalties[errors.argmin()])


def _perceptron(answers: Literal["classes", "values"], count: int, seed: int) -> Any:
    """One hidden layer, HIDDEN wide, for about STEPS steps of Adam."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    kind = MLPClassifier if answers == "classes" else MLPRegressor
    batch = min(BATCH, max(count // 8, 1))
    epochs = max(1, round(STEPS * batch / count))
    return kind(hidden_layer_sizes=(HIDDEN,), batch_size=batch, max_iter=epochs, n_iter_no_change=epochs, alpha=1e-3,
                learning_rate_init=5e-3, random_state=seed)


def _balanced(classes: Array) -> Array:
    """Places of examples, those of rare classes several times, so that each class comes equally often."""
    own = [np.flatnonzero(classes == number) for number in np.unique(classes)]
    return np.concatenate([np.resize(places, max(map(len, own))) for places in own])


def _cut(flat: Array, like: Sequence[Array]) -> list[Array]:
    return np.split(flat, np.cumsum([len(frames) for frames in like])[:-1])
