"""The loader: the same batches whatever the workers, tensors without copies, nothing left behind; the example runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import noise
import numpy as np
import pytest

import featstore as fs
from featstore.errors import BadRequest, CorruptSegment

torch = pytest.importorskip("torch")
from featstore.torch import Tensors, loader  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fs.Store:
    return noise.make(tmp_path_factory.mktemp("torch") / "s.zarr", count=24)


@pytest.fixture(scope="module")
def crops(store: fs.Store) -> fs.Batches:
    return fs.crops(store.view(noise.GRID, like="log-mel"), frames=64, batch=8, balance="speaker")


def same(tensors: Tensors, arrays: dict[str, np.ndarray]) -> bool:
    return set(tensors) == set(arrays) and all(
        tensors[name].numpy().dtype == array.dtype and np.array_equal(tensors[name].numpy(), array)
        for name, array in arrays.items())


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (2, "fork"),
                                                   pytest.param(2, "spawn", marks=pytest.mark.slow)])
def test_any_workers_give_the_same_batches_in_order(crops: fs.Batches, workers: int, method: str | None) -> None:
    for number, batch in enumerate(loader(crops, workers=workers, start_method=method, start=5, stop=12)):
        assert same(batch, crops[5 + number])
        assert batch["content"].dtype == torch.float16
        assert all(tensor.is_shared() == (workers > 0) for tensor in batch.values())
    assert number == 6
    assert not multiprocessing.active_children()


def test_training_goes_on_exactly_with_other_workers_and_ranks(crops: fs.Batches) -> None:
    def digest(batches: list[Tensors]) -> list[bytes]:
        return [b"".join(tensor.numpy().tobytes() for tensor in batch.values()) for batch in batches]

    through = digest(list(loader(crops, start=0, stop=10)))
    first = digest(list(loader(crops, workers=2, stop=4)))
    ranks = [list(loader(crops, workers=rank, rank=rank, world=2, start=4, stop=10)) for rank in range(2)]
    joined = [{name: torch.cat([one[name], other[name]]) for name in one} for one, other in zip(*ranks, strict=True)]
    assert first + digest(joined) == through


def test_whole_utterances_come_through_workers_too(store: fs.Store) -> None:
    whole = fs.whole(store.view(noise.GRID, like="log-mel"), batch_frames=3000)
    count = whole.per_epoch or 0
    epoch = list(loader(whole, workers=2, start_method="fork", start=count, stop=2 * count))
    assert all(same(batch, whole[count + i]) for i, batch in enumerate(epoch))
    assert sorted(int(i) for batch in epoch for i in batch["utterance_index"]) == list(range(24))


def test_without_workers_a_tensor_is_the_array_that_was_read(crops: fs.Batches) -> None:
    batch = next(iter(loader(crops)))
    kept = {name: tensor.clone() for name, tensor in batch.items()}
    assert all(tensor.is_contiguous() for tensor in batch.values())
    following = next(iter(loader(crops, start=1)))
    assert all(torch.equal(batch[name], kept[name]) for name in batch)  # a batch is the caller's to keep
    assert not torch.equal(following["f0"], batch["f0"])


def test_the_generator_that_models_use_is_left_alone(crops: fs.Batches) -> None:
    before = torch.get_rng_state()
    list(loader(crops, workers=1, stop=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_in_a_worker_is_told_as_it_is(tmp_path: Path, workers: int) -> None:
    store = noise.make(tmp_path / "s.zarr", count=6)
    crops = fs.crops(store.view(["content"], like="log-mel"), frames=64, batch=4)
    for shard in store.features["content"].folder.glob("segments/*/frames/c/*/*"):
        os.truncate(shard, 1000)
    with pytest.raises(CorruptSegment, match=r"has 1000 bytes, expected .*featstore verify STORE"):
        list(loader(crops, workers=workers, stop=3))
    assert not multiprocessing.active_children()


def test_a_loop_that_is_left_leaves_no_process(crops: fs.Batches) -> None:
    for batch in loader(crops, workers=2):
        assert len(multiprocessing.active_children()) == 2 and len(batch["f0"]) == 8
        break
    assert not multiprocessing.active_children()


ENDLESS = """
import multiprocessing, sys
import featstore as fs
from featstore.torch import loader

if __name__ == "__main__":
    view = fs.open(sys.argv[1]).view(["f0", "content"], like="log-mel")
    for batch in loader(fs.crops(view, frames=64, batch=8), workers=2):
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
"""


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_too(store: fs.Store, tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    child = subprocess.Popen([sys.executable, tmp_path / "endless.py", store.path], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True, start_new_session=True,
                             env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert child.stdout is not None
    workers = [int(pid) for pid in child.stdout.readline().split()]
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, told = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT and told.rstrip().endswith("KeyboardInterrupt")
    assert len(workers) == 2 and not any(_alive(pid) for pid in workers)


def _alive(pid: int, patience_s: float = 10) -> bool:
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def test_ranks_come_from_torch_distributed_where_it_runs(crops: fs.Batches) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        own = next(iter(loader(crops)))
        all_of_them = next(iter(loader(crops, rank=0, world=1)))
    finally:
        torch.distributed.destroy_process_group()
    assert same(own, crops.read(0, rank=1, world=4)) and same(all_of_them, crops[0])


def test_what_cannot_be_loaded_is_refused_at_once(crops: fs.Batches) -> None:
    for options, message in (({"world": 3, "rank": 0}, "batch=8 cannot be cut into 3 equal ranks"),
                             ({"rank": 1}, "rank=1, world=None: give both"),
                             ({"workers": -1}, "workers=-1"), ({"start": -1}, "batches -1 to None"),
                             ({"start": 5, "stop": 2}, "batches 5 to 2")):
        with pytest.raises(BadRequest, match=message):
            loader(crops, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(BadRequest, match=r"device=cuda: torch .* sees no CUDA device here; device='cpu' works"):
            loader(crops, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_tensors_come_to_the_gpu_as_they_are(crops: fs.Batches) -> None:
    for number, batch in enumerate(loader(crops, workers=2, device="cuda", stop=20)):
        assert all(tensor.is_cuda for tensor in batch.values())
        assert same({name: tensor.cpu() for name, tensor in batch.items()}, crops[number])


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    example = ROOT / "examples" / "own_training.py"
    assert len(example.read_text().splitlines()) < 40
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.75 * losses[0]
    assert fs.open(tmp_path / "training.zarr").splits["main"].by == "speaker"
