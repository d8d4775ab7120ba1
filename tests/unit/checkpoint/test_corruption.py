"""What is not what was written is found, named, and passed over by all ranks together."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import threading

import pytest
import torch

from bigtrain.checkpoint import find, load_newest, open_checkpoint, verify
from bigtrain.checkpoint.files import Files, Input
from bigtrain.checkpoint.shards import CHUNK
from bigtrain.errors import CheckpointError, CorruptError, NoGoodError, ReadError
from bigtrain.state import WEIGHT, whole
from tests.helpers.checkpoints import assert_holds, cut, on_ranks, same_bits, saved, some_tensors
from tests.helpers.faulty import FULL

FLIPS, CUTS = (200, 50) if FULL else (20, 5)

OLD, NEW = some_tensors(1), some_tensors(2)
NAMES = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors", "state.json"]
QUICK = Files(pauses=(0.001, 0.001))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    saved(folder, 1, cut("flat", OLD, 3))
    saved(folder, 2, cut("flat", NEW, 3))
    assert sorted(path.name for path in folder.rglob("*.*")) == sorted(NAMES * 2)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


@pytest.fixture
def newest(folder):
    return folder / "step-00000002"


def read_everything(path):
    assert_holds(path, NEW, QUICK)
    with open_checkpoint(path, QUICK) as reader:
        for rank in range(reader.num_writers):
            reader.own(rank)


def assert_found(path, name):
    """Reading everything and verifying both name the file."""
    with pytest.raises(CorruptError) as caught:
        read_everything(path)
    assert caught.value.where == str(path / name)
    found = verify(path, files=QUICK)
    assert {fault.file for fault in found.faults} == {str(path / name)}
    assert all(fault.is_damage for fault in found.faults)


@pytest.mark.parametrize("name", NAMES)
def test_every_flipped_bit_is_found(newest, name):
    whole_file = (newest / name).read_bytes()
    chosen = random.Random(name)
    for _ in range(FLIPS):
        raw = bytearray(whole_file)
        raw[chosen.randrange(len(raw))] ^= 1 << chosen.randrange(8)
        (newest / name).write_bytes(raw)
        assert_found(newest, name)


@pytest.mark.parametrize("name", NAMES)
def test_every_other_length_is_found(newest, name):
    whole_file = (newest / name).read_bytes()
    chosen = random.Random(name)
    for length in (0, len(whole_file) - 1, *(chosen.randrange(len(whole_file)) for _ in range(CUTS))):
        (newest / name).write_bytes(whole_file[:length])
        assert_found(newest, name)
    (newest / name).write_bytes(whole_file + b"\0")
    assert_found(newest, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_missing_or_no_file_is_found(newest, name, tmp_path):
    (newest / name).rename(tmp_path / "kept")
    assert_found(newest, name)
    (newest / name).symlink_to(tmp_path / "kept")  # the right bytes, but elsewhere
    assert_found(newest, name)
    (newest / name).unlink()
    os.mkfifo(newest / name)  # must not block
    assert_found(newest, name)
    (newest / name).unlink()
    (newest / name).mkdir()
    assert_found(newest, name)


def test_swapped_doubled_and_stale_files_are_found(folder, newest):
    first, second = (newest / f"shard-0000{n}.safetensors" for n in (0, 1))
    kept = {path: path.read_bytes() for path in (first, second)}
    second.write_bytes(kept[first])
    assert_found(newest, second.name)
    second.write_bytes(kept[second])
    for name in NAMES[1:]:
        right = (newest / name).read_bytes()
        shutil.copy(folder / "step-00000001" / name, newest / name)
        if (newest / name).read_bytes() != right:  # state.json is the same in both
            assert_found(newest, name)
        (newest / name).write_bytes(right)
    first.write_bytes(kept[second])
    second.write_bytes(kept[first])
    assert {fault.file for fault in verify(newest, files=QUICK).faults} == {str(first), str(second)}


# ---- on all ranks ----------


def load(folder, ranks, **options):
    """Load the newest by rows; returns the tensors of this rank's pieces."""
    pieces = cut("rows", NEW, ranks.size)[ranks.rank].pieces
    held = {}

    def fill(reader):
        for piece in pieces:
            held[piece.key] = torch.empty(piece.data.shape, dtype=piece.dtype)
            reader.read_into(piece.kind, piece.name, piece.box, held[piece.key])

    options.setdefault("files", QUICK)
    reader = load_newest(ranks, folder, fill, wait_s=0.3, **options)
    return reader and (reader.step, held)


def assert_loaded(results, step, tensors):
    for rank, result in enumerate(results):
        assert not isinstance(result, BaseException), result
        assert result[0] == step
        for piece in cut("rows", tensors, len(results))[rank].pieces:
            assert same_bits(result[1][piece.key], piece.data)


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def test_all_ranks_load_the_newest(folder):
    assert_loaded(on_ranks(2, lambda ranks: load(folder, ranks)), 2, NEW)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [40, -3, None])
def test_all_ranks_fall_back_together(folder, newest, name, at, caplog):
    if at is None:
        (newest / name).unlink()
    else:
        flip(newest / name, at)
    bad = sorted((path.name, path.read_bytes()) for path in newest.iterdir())
    with caplog.at_level(logging.WARNING):
        results = on_ranks(2, lambda ranks: load(folder, ranks))
    assert_loaded(results, 1, OLD)
    assert "step-00000002 is damaged; going on from step-00000001 instead" in caplog.text
    assert name in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002.bad"]
    assert sorted((path.name, path.read_bytes()) for path in (folder / "step-00000002.bad").iterdir()) == bad
    assert_holds(saved(folder, 2, cut("rows", NEW, 2)), NEW)  # its step can be saved again


def test_falling_back_can_be_turned_off(folder, newest):
    flip(newest / NAMES[1], -1)
    for error in on_ranks(2, lambda ranks: load(folder, ranks, fall_back=False)):
        assert isinstance(error, CorruptError)
        assert error.where == str(newest / NAMES[1])
    assert [path.name for path in find(folder)] == ["step-00000002", "step-00000001"]


def test_if_all_are_bad_each_bad_file_is_listed(folder):
    flip(folder / "step-00000002" / "manifest.json", 100)
    flip(folder / "step-00000001" / NAMES[2], -1)
    for error in on_ranks(2, lambda ranks: load(folder, ranks)):
        assert isinstance(error, NoGoodError)
        for name in ("step-00000002/manifest.json", "step-00000001/shard-00001.safetensors"):
            assert name in str(error)
    assert len(find(folder)) == 2  # nothing was renamed


def test_how_far_it_falls_back_is_bounded(folder):
    for step in (3, 4, 5):
        saved(folder, step, cut("flat", NEW, 2))
    for step in (3, 4, 5):
        (folder / f"step-0000000{step}" / "state.json").unlink()
    for error in on_ranks(2, lambda ranks: load(folder, ranks, at_most=2)):
        assert isinstance(error, NoGoodError)
        assert "2 older ones were not tried" in str(error)
    assert_loaded(on_ranks(2, lambda ranks: load(folder, ranks, at_most=3)), 2, NEW)


def test_only_damaged_ones_are_no_reason_to_start_anew(folder):
    for path in find(folder):
        path.rename(path.with_name(path.name + ".bad"))
    for error in on_ranks(2, lambda ranks: load(folder, ranks)):
        assert isinstance(error, NoGoodError)
        assert "step-00000001.bad, step-00000002.bad" in str(error)


def test_nothing_is_loaded_where_there_is_nothing(tmp_path):
    assert on_ranks(2, lambda ranks: load(tmp_path / "none", ranks)) == [None, None]


def test_garbage_beside_them_is_left_alone(folder, caplog):
    (folder / "latest").write_text("step-00000009")
    (folder / "step-00000000").symlink_to(folder / "step-00000001")
    (folder / "step-9").mkdir()
    (folder / "step-00000009.tmp-3").mkdir()
    assert_loaded(on_ranks(2, lambda ranks: load(folder, ranks)), 2, NEW)
    assert not caplog.records


def test_a_link_in_place_of_the_newest_is_not_passed_over_in_silence(folder, tmp_path):
    """As where somebody has moved it to another disk: the run would be trained anew from an older one."""
    newest = find(folder)[0].rename(tmp_path / "elsewhere")
    (folder / "step-00000002").symlink_to(newest)
    for error in on_ranks(2, lambda ranks: load(folder, ranks)):
        assert isinstance(error, CheckpointError)
        assert "step-00000002 is a link or a file, which is not followed" in str(error)


# ---- the storage ----------


class Failing:
    """Lets the first operations of a kind fail."""

    def __init__(self, operation, name, times, number=errno.EIO):
        self.left, self.operation, self.name, self.number = times, operation, name, number
        self.lock = threading.Lock()

    def __call__(self, operation, path):
        with self.lock:
            if operation == self.operation and path.name == self.name and self.left:
                self.left -= 1
                raise OSError(self.number, os.strerror(self.number), str(path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", ["open", "read"])
def test_an_io_error_that_passes_is_not_noticed(newest, name, operation):
    assert_holds(newest, NEW, Files(Failing(operation, name, 2), pauses=(0.001, 0.001)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_io_error_that_stays_is_no_corruption(folder, newest, name, number):
    files = Files(Failing("open", name, -1, number), pauses=(0.001, 0.001))
    with pytest.raises(ReadError, match=os.strerror(number)) as caught:
        assert_holds(newest, NEW, files)
    assert caught.value.where == str(newest / name)
    assert not any(fault.is_damage for fault in verify(newest, files=files).faults)
    for error in on_ranks(2, lambda ranks: load(folder, ranks, files=files)):
        assert isinstance(error, ReadError)
    assert len(find(folder)) == 2  # nothing was set aside


def test_a_mismatch_that_passes_is_said_and_not_believed(tmp_path, caplog):
    """The storage gives wrong bytes once, and the right ones when the file is opened anew."""
    tensors = {(WEIGHT, "w"): torch.arange(1000.0)}
    path = saved(tmp_path, 1, cut("rows", tensors, 1))
    shard, seen = path / NAMES[1], []

    def lie(operation, where):
        seen.append(operation if where == shard else None)
        # Wrong before the data are read (the header was read before them), right again before the third open.
        if where == shard and (operation, seen.count(operation)) in (("read", 2), ("open", 3)):
            flip(shard, -1)

    with open_checkpoint(path, Files(lie)) as reader:
        out = torch.empty(1000)
        with caplog.at_level(logging.WARNING):
            reader.read_into(WEIGHT, "w", whole((1000,)), out)
    assert torch.equal(out, tensors[WEIGHT, "w"])
    assert "was read wrongly once" in caplog.text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """What two threads read together, of a length that is no multiple of anything."""
    tensors = {(WEIGHT, "w"): torch.randn(7, 300_007), (WEIGHT, "b"): torch.randn(5)}
    return tensors, saved(tmp_path_factory.mktemp("large"), 1, cut("replicated", tensors, 1))


@pytest.mark.parametrize("at", [0, 1_000_000, 4_100_000, 8_390_000])
def test_every_flipped_bit_is_found_where_two_threads_read(large, tmp_path, at):
    _, path = large
    shard = shutil.copytree(path, tmp_path / path.name) / "shard-00000.safetensors"
    raw = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header + at] ^= 4
    shard.write_bytes(raw)
    with (
        open_checkpoint(shard.parent, QUICK) as reader,
        pytest.raises(CorruptError, match=r"the bytes from [\d,]+ on") as caught,
    ):
        reader.read_into(WEIGHT, "w", whole((7, 300_007)), torch.empty(7, 300_007))
    begin = int(caught.value.problem.partition("bytes from ")[2].partition(" on")[0].replace(",", ""))
    assert begin <= header + at < begin + CHUNK
    assert [fault.file for fault in verify(shard.parent, files=QUICK).faults] == [str(shard)]


@pytest.mark.parametrize(("cores", "processes", "threads"), [(1, None, 1), (2, None, 2), (2, "2", 1), (8, "4", 2)])
def test_two_threads_read_where_there_are_cores(large, monkeypatch, cores, processes, threads):
    tensors, path = large
    seen, honest, both = set(), Input.read, threading.Barrier(threads)

    def read(self, offset, into):
        if into.nbytes == CHUNK and threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            both.wait(20)  # each has work to do when the other begins
        honest(self, offset, into)

    monkeypatch.setattr(Input, "read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    with open_checkpoint(path, QUICK) as reader:
        out = torch.empty(7, 300_007)
        reader.read_into(WEIGHT, "w", whole((7, 300_007)), out)
    assert torch.equal(out, tensors[WEIGHT, "w"])
    assert len(seen) == threads


def test_what_two_threads_read_wrongly_once_is_read_again(large, caplog, monkeypatch):
    tensors, path = large
    lied, honest = [], Input.read

    def read(self, offset, into):
        honest(self, offset, into)
        if self.path.name.startswith("shard") and into.nbytes == CHUNK and len(lied) < 3:
            lied.append(offset)
            into[17] ^= 1

    monkeypatch.setattr(Input, "read", read)
    assert_holds(path, tensors, QUICK)
    assert len(lied) == 3
    assert "was read wrongly once" in caplog.text


@pytest.mark.parametrize("chunk", range(3, 8))
def test_an_error_in_either_thread_is_an_error(large, chunk):
    """The file stays open until both have ended, and is read again from the beginning."""
    tensors, path = large
    seen = {"read": 0}
    lock = threading.Lock()

    def fail(operation, path):
        if operation == "read" and path.name.startswith("shard"):
            with lock:
                seen["read"] += 1
                number = seen["read"]
            if number == chunk or (is_for_good and number > chunk):
                raise OSError(errno.EIO, "Input/output error")

    is_for_good = False
    assert_holds(path, tensors, Files(fail, pauses=(0.001,)))
    assert seen["read"] > chunk
    is_for_good, seen["read"] = True, 0
    with pytest.raises(ReadError, match="Input/output error"):
        assert_holds(path, tensors, Files(fail, pauses=(0.001,)))


def test_a_folder_that_may_not_be_looked_into_is_no_crash(newest):
    def refuse(operation, path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    files = Files(refuse, pauses=(0.001,))
    with pytest.raises(ReadError, match=f"cannot read {newest}: Permission denied"):
        open_checkpoint(newest, files)
    assert not verify(newest, files=files).faults[0].is_damage


def test_a_checkpoint_under_another_steps_name_is_none(folder):
    """Loaded, it would stay the newest for ever, and what is trained after it would be lost at the next start."""
    shutil.copytree(folder / "step-00000001", folder / "step-00000009")
    with pytest.raises(CorruptError, match="it is of step 1: the folder has been renamed"):
        open_checkpoint(folder / "step-00000009")
    assert not verify(folder / "step-00000009").is_good
    for step, _ in on_ranks(2, lambda ranks: load(folder, ranks)):
        assert step == 2
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002", "step-00000009.bad"]
    shutil.copytree(folder / "step-00000001", folder / "before_the_change")  # a name that says nothing
    assert open_checkpoint(folder / "before_the_change").step == 1


def test_ranks_wait_for_what_rank_0_sees(folder):
    """A shared file system shows a new checkpoint to one machine later than to another."""
    late = Files(Failing("open", "manifest.json", 6, errno.ENOENT), pauses=(0.001,))
    late.pause = lambda seconds: None
    results = on_ranks(2, lambda ranks: load(folder, ranks, files=late if ranks.rank else QUICK))
    assert_loaded(results, 2, NEW)
    assert len(find(folder)) == 2


class Stale(Files):
    """Shows an old file for a while."""

    def __init__(self, old, times):
        super().__init__(pauses=(0.001,))
        self.old, self.left = old, times

    def open(self, path):
        if path.name == self.old.name and path != self.old and self.left:
            self.left -= 1
            return super().open(self.old)
        return super().open(path)

    def pause(self, seconds):
        pass


def test_ranks_wait_for_the_very_manifest_that_rank_0_sees(folder):
    stale = Stale(folder / "step-00000001" / "manifest.json", 3)
    results = on_ranks(2, lambda ranks: load(folder, ranks, files=stale if ranks.rank else QUICK))
    assert_loaded(results, 2, NEW)
    assert stale.left == 0
    assert len(find(folder)) == 2


def test_every_header_is_verified_though_nothing_in_the_file_is_needed(tmp_path):
    """What ranks kept for themselves stands there, and is asked for when it is too late to fall back."""
    for step in (1, 2):
        saved(tmp_path, step, cut("flat", {(WEIGHT, "w"): torch.arange(12.0)}, 3))
    flip(tmp_path / "step-00000002" / "shard-00002.safetensors", 40)
    results = on_ranks(2, lambda ranks: load_newest(ranks, tmp_path, lambda reader: None, files=QUICK))
    assert [reader.step for reader in results] == [1, 1]


@pytest.mark.parametrize(("title", "expected"), [("weight:up[0:2/7,0:5/5]", [2.0, 1.0]), ("step:up[]", [1.0])])
def test_counters_are_right_whatever_else_is_damaged(folder, newest, title, expected):
    """An engine compares them, and one rank that stopped for a wrong one would leave the others in a collective."""
    for shard in newest.glob("*.safetensors"):
        raw = shard.read_bytes()
        length = 8 + int.from_bytes(raw[:8], "little")
        if title in (header := json.loads(raw[8:length])):
            flip(shard, length + header[title]["data_offsets"][0])
    seen = [[], []]

    def compare(reader, rank):
        reader.read_into(WEIGHT, "up", whole((7, 5)), torch.empty(7, 5))
        counter = torch.full((), -1.0)
        reader.read_into("step", "up", whole(()), counter)
        seen[rank].append(counter.item())

    results = on_ranks(2, lambda ranks: load_newest(ranks, folder, lambda r: compare(r, ranks.rank), files=QUICK))
    assert [reader.step for reader in results] == [1, 1]
    assert seen == [expected, expected]


def test_a_rank_that_never_sees_it_is_no_corruption(folder, tmp_path):
    (tmp_path / "other").mkdir()
    for error in on_ranks(2, lambda ranks: load(tmp_path / "other" if ranks.rank else folder, ranks)):
        assert not isinstance(error, BaseException), error  # ranks take the path of rank 0
    blind = Files(Failing("open", "manifest.json", -1, errno.ENOENT), pauses=(0.001,))
    for error in on_ranks(2, lambda ranks: load(folder, ranks, files=blind if ranks.rank else QUICK)):
        assert isinstance(error, ReadError)
        assert "does not see" in str(error)
    assert len(find(folder)) == 2


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path, newest):
    (tmp_path / "link").symlink_to(newest)
    for path in (tmp_path / "none", tmp_path / "link", newest / "state.json"):
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            open_checkpoint(path)
        with pytest.raises(CheckpointError, match="there is no checkpoint at"):
            verify(path)


@pytest.mark.parametrize("layout", ["rows", "flat", "columns"])
def test_damage_is_found_by_either_of_two_threads(tmp_path, layout):
    """A box of two files is read by two threads, where the machine has a core for the second."""
    tensors = {("weight", "w"): torch.randn(1500, 1501, generator=torch.Generator().manual_seed(0))}  # 9 MB
    path = saved(tmp_path, 1, cut(layout, tensors, 2))
    files = Files()
    files.has_spare_core = lambda: True
    assert_holds(path, tensors, files)
    for shard in sorted(path.glob("*.safetensors")):
        whole_file = bytearray(shard.read_bytes())
        whole_file[-100_000] ^= 1
        shard.write_bytes(whole_file)
        with open_checkpoint(path, files) as reader, pytest.raises(CorruptError, match=shard.name):
            reader.read_into("weight", "w", whole((1500, 1501)), torch.empty(1500, 1501))
        whole_file[-100_000] ^= 1
        shard.write_bytes(whole_file)
    assert_holds(path, tensors, files)
