"""PyTorch code of one's own: a network learns to tell what is voiced. `python examples/own_training.py [STORE]`"""

import sys
from pathlib import Path

import torch
from torch import nn

import featstore as fs
from featstore.torch import loader
from featstore_extractors import parse

CORPUS = Path(__file__).resolve().parent / "corpus"


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of voiced and unvoiced frames; what pads a row beyond its length does not count."""
    there = torch.arange(batch["f0"].shape[1]) < batch["lengths"][:, None]  # (B, T)
    logits = model(batch["log-mel"][there] / 4 + 1).squeeze(1)
    return nn.functional.binary_cross_entropy_with_logits(logits, (batch["f0"][there] > 0).float())


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "training.zarr")
    store = fs.open(path) if path.exists() else fs.create(path)
    fs.extract(fs.corpus(CORPUS), store, parse("log-mel", "f0:dio"), workers=0)
    main = store.splits.get("main") or fs.split(store, "main", by="speaker", valid="20%")
    train, valid = (store.view(["log-mel", "f0"], like="log-mel", split=f"{main.name}/{p}") for p in ("train", "valid"))
    crops, whole = fs.crops(train, frames=128, batch=16, balance="speaker"), fs.whole(valid, batch_frames=4000)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 64), nn.GELU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step, batch in enumerate(loader(crops, workers=2, stop=101)):
        if step % 50 == 0:
            losses = [loss_of(model, b).item() for b in loader(whole, stop=whole.per_epoch)]
            print(f"step {step}: loss on singers it never heard: {sum(losses) / len(losses):.3f}", flush=True)
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
