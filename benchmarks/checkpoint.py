"""What checkpoints cost beside PyTorch's own: DCP, DCP in the background, and torch.save, on the same state and disk.

    python benchmarks/checkpoint.py [--gb 2] [--folder DIR] [--rounds 3] [--only lost [--device cuda]]

Everything runs in one process, the contenders in turn (A-B-B-A), and medians are shown with the least and the most.
torch has one thread; bigtrain reads large tensors with two.
The state is weights and Adam's two moments in float32.

- lost: a training of matrix products goes on while a checkpoint is written; what its steps take more than their median
  without one, summed until the commit. `first` is the first save of the process, `later` those after it. bigtrain
  copies the optimizer's moments while the step after the save computes its gradients; the end of that step, where an
  optimizer would change them, waits for the copy, and that is lost, too. `--device cuda` has state and training on a
  GPU.
- write, read: seconds, and the share of the speed of a raw copy of as many bytes to the same disk with the same fsync
  (of a raw read from the page cache). Reading verifies every byte; nobody else does.
- the copy alone, hashing alone: the bare operations, in memory that is there; what does them cannot be faster.
- reshard: what three ranks of fsdp read of what two of ZeRO-3 wrote, beside what two of ZeRO-3 read of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from bigtrain.checkpoint import Background, Ranks, open_checkpoint, save, writing
from bigtrain.checkpoint.shards import CHUNK, hash_of
from bigtrain.dist import World
from bigtrain.state import EngineState, Piece, boxes_of_slice, whole

WIDTH = 2048
RANKS = Ranks(World())


def make_state(gigabytes: float) -> dict[tuple[str, str], Tensor]:
    """Square matrices with their moments."""
    count = max(1, round(gigabytes * 1e9 / (3 * 4 * WIDTH * WIDTH)))
    generator = torch.Generator().manual_seed(0)
    return {
        (kind, f"layers.{number}.weight"): torch.randn(WIDTH, WIDTH, generator=generator)
        for number in range(count)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def whole_pieces(state: dict[tuple[str, str], Tensor]) -> EngineState:
    """All of it, as one rank holds it."""
    pieces = [Piece(name, kind, tuple(t.shape), t.dtype, whole(t.shape), t, True) for (kind, name), t in state.items()]
    return EngineState(pieces, {})


def slices(state: dict[tuple[str, str], Tensor], rank: int, size: int, *, rows: bool) -> EngineState:
    """What a rank holds under ZeRO-3 (flat slices) or fsdp (rows)."""
    pieces = []
    for (kind, name), tensor in state.items():
        unit = tensor.shape[1] if rows else 1
        every = -(-tensor.numel() // unit // size) * unit
        start, stop = (min(n * every, tensor.numel()) for n in (rank, rank + 1))
        for box, _ in boxes_of_slice(tuple(tensor.shape), start, stop):
            pieces.append(
                Piece(name, kind, tuple(tensor.shape), tensor.dtype, box, tensor[box.slices].contiguous(), True)
            )
    return EngineState(pieces, {})


def named(state: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """The same as PyTorch's own take it."""
    return {f"{kind}.{name}": tensor for (kind, name), tensor in state.items()}


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def interleaved(actions: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Every action, so often, in turn and back."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    number = itertools.count()
    for turn in range(rounds):
        for name in list(actions)[:: 1 if turn % 2 == 0 else -1]:
            os.sync()
            found[name].append(actions[name](next(number)))
    return found


# ---- time lost by training ----------


class Training:
    """Matrix products: of some 0.1 s on one thread, or of 50 ms on a large GPU."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        width, dtype = (8192, torch.bfloat16) if self._is_gpu else (768, torch.float32)
        self._count = 32 if self._is_gpu else 8
        self._left, self._right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))

    def steps(
        self,
        seconds: float,
        is_done: Callable[[], bool] = lambda: True,
        before_update: Callable[[], None] = lambda: None,
    ) -> Iterator[float]:
        """Train for so long, and until it is done: what each step took."""

        def step() -> None:
            for _ in range(self._count):
                self._left @ self._right
            before_update()
            if self._is_gpu:
                torch.cuda.synchronize()

        began = time.perf_counter()
        while time.perf_counter() - began < seconds or not is_done():
            yield timed(step)

    def loses(self, start: Callable[[], Callable[[], bool]], before_update: Callable[[], None] = lambda: None) -> float:
        """Seconds that it loses from the call that begins a save until it is committed."""
        os.sync()
        normal = statistics.median(self.steps(2.0))
        began = time.perf_counter()
        is_done = start()
        stall = time.perf_counter() - began
        return stall + sum(max(0.0, step - normal) for step in self.steps(0.0, is_done, before_update))


def ours_in_background(background: Background, state: EngineState, number: int) -> Callable[[], bool]:
    """Begin a save; the answer tells whether it is committed."""
    background.start(number + 1, state, extra={})
    done = []

    def is_done() -> bool:
        done.extend([1] if background.poll() else [])
        return bool(done)

    return is_done


# ---- raw copies ----------


def raw_write(path: Path, state: dict[tuple[str, str], Tensor]) -> None:
    """As many bytes, with one fsync."""
    with open(path, "wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def raw_read(path: Path, out: dict[tuple[str, str], Tensor]) -> None:
    """Into memory that is there."""
    with open(path, "rb", buffering=0) as file:
        for tensor in out.values():
            view = tensor.view(-1).view(torch.uint8).numpy().data
            while view:
                view = view[file.readinto(view) :]


def hash_all(state: dict[tuple[str, str], Tensor]) -> None:
    """What verifying costs where the bytes are no longer in a cache."""
    for tensor in state.values():
        view = tensor.view(-1).view(torch.uint8).numpy().data
        for start in range(0, view.nbytes, CHUNK):
            hash_of(view[start : start + CHUNK])


def save_without_hashing(path: Path, pieces: EngineState) -> None:
    """What it writes is no checkpoint that anybody could read: only the time counts."""
    hash_, writing.hash_of = writing.hash_of, lambda view: bytes(16)
    try:
        save(RANKS, path, 1, pieces, extra={})
    finally:
        writing.hash_of = hash_


def copy_all(state: dict[tuple[str, str], Tensor], out: dict[tuple[str, str], Tensor]) -> None:
    """What no copy of the state that training waits for can do without."""
    for key, tensor in state.items():
        out[key].copy_(tensor)


def read_pieces(path: Path, state: EngineState) -> None:
    """All of what a rank holds."""
    with open_checkpoint(path) as reader:
        for piece in state.pieces:
            reader.read_into(piece.kind, piece.name, piece.box, piece.data)


def show(title: str, found: dict[str, list[float]], base: str | None = None) -> None:
    """A table."""
    print(f"\n{title}")
    for name, times in found.items():
        median = statistics.median(times)
        share = f"  {statistics.median(found[base]) / median:5.2f} of {base}" if base else ""
        print(f"  {name:24} {median:8.3f} s  ({min(times):.3f} to {max(times):.3f}){share}")


def compare_lost(state: dict[tuple[str, str], Tensor], folder: Path, rounds: int, device: torch.device) -> None:
    state = {key: tensor.to(device) for key, tensor in state.items()}
    pieces = whole_pieces(state)
    size = sum(tensor.nbytes for tensor in state.values())
    training = Training(device)
    background = Background(World(device=device), folder / "ours")
    background.reserve(size)

    def ours(number: int) -> float:
        return training.loses(lambda: ours_in_background(background, pieces, number), background.wait_for_copy)

    copy = {key: torch.empty_like(t, device="cpu", pin_memory=device.type == "cuda") for key, t in state.items()}
    copy_all(state, copy)  # so that the copy has been written once, and the state is read as often as in training
    background_first = ours(0)

    def dcp_async(number: int) -> float:
        def start() -> Callable[[], bool]:
            future = dcp.async_save(named(state), checkpoint_id=folder / f"dcp-{number}")
            return future.done

        return training.loses(start)

    dcp_first = dcp_async(10**6)
    found = interleaved(
        {
            "bigtrain background": lambda n: ours(n + 1),
            "dcp.async_save": dcp_async,
            "the copy alone": lambda n: timed(lambda: copy_all(state, copy)),
        },
        rounds,
    )
    show("lost by training, first save", {"bigtrain background": [background_first], "dcp.async_save": [dcp_first]})
    show("lost by training, later saves", found)


def compare_writing(state: dict[tuple[str, str], Tensor], folder: Path, rounds: int) -> None:
    pieces = whole_pieces(state)

    def clean(action: Callable[[Path], object]) -> Callable[[int], float]:
        def run(number: int) -> float:
            path = folder / f"w-{number}"
            seconds = timed(lambda: action(path))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            return seconds

        return run

    found = interleaved(
        {
            "raw": clean(lambda path: raw_write(path, state)),
            "bigtrain": clean(lambda path: save(RANKS, path, 1, pieces, extra={})),
            "bigtrain, not hashing": clean(lambda path: save_without_hashing(path, pieces)),
            "dcp.save": clean(lambda path: dcp.save(named(state), checkpoint_id=path)),
            "torch.save": clean(lambda path: torch.save(named(state), path)),
        },
        rounds,
    )
    show("write", found, "raw")
    print("  (torch.save and dcp.save in this version: torch.save does not fsync)")


def compare_reading(state: dict[tuple[str, str], Tensor], folder: Path, rounds: int) -> None:
    out = {key: tensor.clone() for key, tensor in state.items()}  # memory that has been touched
    ours = save(RANKS, folder / "r", 1, whole_pieces(state), extra={})
    raw_write(folder / "raw", state)
    dcp.save(named(state), checkpoint_id=folder / "dcp")
    torch.save(named(state), folder / "torch")
    found = interleaved(
        {
            "raw": lambda n: timed(lambda: raw_read(folder / "raw", out)),
            "bigtrain, verified": lambda n: timed(lambda: read_pieces(ours, whole_pieces(out))),
            "dcp.load": lambda n: timed(lambda: dcp.load(named(out), checkpoint_id=folder / "dcp")),
            "torch.load": lambda n: timed(lambda: torch.load(folder / "torch", weights_only=True)),
            "hashing alone": lambda n: timed(lambda: hash_all(out)),
        },
        rounds,
    )
    show("read, from the page cache", found, "raw")


def compare_resharding(state: dict[tuple[str, str], Tensor], folder: Path, rounds: int) -> None:
    written = _written_by_two(state, folder)
    same = [slices(state, rank, 2, rows=False) for rank in range(2)]
    other = [slices(state, rank, 3, rows=True) for rank in range(3)]
    found = interleaved(
        {
            "same layout, 2 ranks": lambda n: sum(timed(lambda s=s: read_pieces(written, s)) for s in same),
            "ZeRO-3 × 2 to fsdp × 3": lambda n: sum(timed(lambda s=s: read_pieces(written, s)) for s in other),
        },
        rounds,
    )
    show("load of all ranks, one after the other", found, "same layout, 2 ranks")


def _written_by_two(state: dict[tuple[str, str], Tensor], folder: Path) -> Path:
    """A checkpoint of two ranks of ZeRO-3, written by two processes."""
    import torch.multiprocessing as multiprocessing

    meet = folder / "meet"
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_write_as_rank, args=(state, rank, folder, meet)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        if rank.exitcode:
            raise SystemExit(f"a writer ended with {rank.exitcode}")
    return folder / "two" / "step-00000001"


def _write_as_rank(state: dict[tuple[str, str], Tensor], rank: int, folder: Path, meet: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    world = World(rank, 2, rank, torch.device("cpu"), dist.group.WORLD)
    save(Ranks(world), folder / "two", 1, slices(state, rank, 2, rows=False), extra={})
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0, help="size of the state")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; by default a temporary folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["resharding", "writing", "reading", "lost"], help="one of the tables")
    parser.add_argument("--device", type=torch.device, default="cpu", help="of the training that `lost` disturbs")
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # DCP's, that there is one process
    torch.set_num_threads(1)
    state = make_state(given.gb)
    size = sum(tensor.nbytes for tensor in state.values())
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, a state of {size / 1e9:.2f} GB")
    parts = {"resharding": compare_resharding, "writing": compare_writing, "reading": compare_reading}
    parts = {name: part for name, part in parts.items() if given.only in (None, name)}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for name, part in parts.items():
            (Path(folder) / name).mkdir()
            part(state, Path(folder) / name, given.rounds)
            shutil.rmtree(Path(folder) / name)
        if given.only not in (None, "lost"):
            return
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=0, world_size=1)  # async_save's wish
        compare_lost(state, Path(folder), given.rounds, given.device)


if __name__ == "__main__":
    main()
