"""A copy in the background goes past the page cache; where that cannot be, it goes through it, and is the same."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
from pathlib import Path

import pytest
import torch

from bigtrain.checkpoint import Background, Ranks, save, verify
from bigtrain.checkpoint import files as files_module
from bigtrain.dist import World
from bigtrain.errors import SaveError
from tests.helpers.checkpoints import assert_holds, cut

# Whole pages, then what ends inside of one, then what is smaller than any: in a file they lie in this order.
SHAPES = {"pages": (1536, 1024), "odd": (1037, 1211), "large and odd": (2_000_003,), "small": (3, 5), "one": ()}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(5)
    return {
        (kind, name): torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg")
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def local(tmp_path):
    """A folder on a local disk."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    kind = files_module._file_system_of(descriptor)
    os.close(descriptor)
    if kind not in files_module._DIRECT:
        pytest.skip(f"temporary files lie on {kind}")
    return tmp_path


def in_background(folder, tensors, step=1):
    background = Background(World(), folder)
    background.start(step, cut("rows", tensors, 1)[0], extra={})
    path = background.wait()
    assert verify(path).is_good
    assert_holds(path, tensors)
    return path / "shard-00000.safetensors"


def cached(path):
    """How many bytes of a file are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", path]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_only_the_edges_are_in_the_page_cache(local, tensors):
    path = local / "plain"
    save(Ranks(World()), path, 1, cut("rows", tensors, 1)[0], extra={})
    plain = path / "step-00000001" / "shard-00000.safetensors"
    assert cached(plain) >= plain.stat().st_size > 30 << 20
    background = Background(World(), local / "direct")
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    ours = background.wait() / "shard-00000.safetensors"
    assert cached(ours) < 1 << 20  # the header, and the last page
    assert ours.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("refused", [1, 2, 3])
@pytest.mark.parametrize("reason", [errno.EINVAL, errno.EFAULT])
def test_what_a_device_does_not_take_directly_goes_through_the_cache(local, tensors, monkeypatch, reason, refused):
    pwritev, direct = os.pwritev, []

    def refusing(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            direct.append(offset)
            if len(direct) == refused:
                raise OSError(reason, os.strerror(reason))
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refusing)
    path = in_background(local, tensors)
    assert len(direct) == refused  # it is not tried again
    assert cached(path) > path.stat().st_size // 4


def test_a_write_that_ends_inside_of_a_page(local, tensors, monkeypatch):
    pwritev, short = os.pwritev, []

    def writes_less(descriptor, buffers, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and not short:
            short.append(pwritev(descriptor, [buffers[0][: 1 << 19]], offset))
            return short[0] - 100
        return pwritev(descriptor, buffers, offset)

    monkeypatch.setattr(os, "pwritev", writes_less)
    in_background(local, tensors)
    assert short


def test_an_error_that_is_no_refusal_is_an_error(local, tensors, monkeypatch):
    def failing(descriptor, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwritev", failing)
    background = Background(World(), local)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    with pytest.raises(Exception, match="Input/output error"):
        background.wait()
    assert list(local.iterdir()) == []


def test_elsewhere_it_is_not_tried(local, tensors, monkeypatch):
    monkeypatch.setattr(files_module, "_DIRECT", ("nfs4",))
    path = in_background(local, tensors)
    assert cached(path) >= path.stat().st_size


def test_a_file_that_stays_direct_is_an_error(local, tensors, monkeypatch):
    """And is not written to again and again: a system that does not let go of it."""
    pwritev, control = os.pwritev, fcntl.fcntl

    def refusing(descriptor, buffers, offset):
        if control(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwritev(descriptor, buffers, offset)

    def stuck(descriptor, command, *arguments):
        if command == fcntl.F_SETFL and not arguments[0] & os.O_DIRECT:
            raise OSError(errno.EPERM, "Operation not permitted")
        return control(descriptor, command, *arguments)

    monkeypatch.setattr(os, "pwritev", refusing)
    monkeypatch.setattr(fcntl, "fcntl", stuck)
    background = Background(World(), local)
    background.start(1, cut("rows", tensors, 1)[0], extra={})
    with pytest.raises(SaveError, match="Operation not permitted"):
        background.wait()


def test_mount_points_of_any_name(tmp_path, monkeypatch):
    """Only some characters are escaped in what the system says of its mounts; a line ends where it says that."""
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    odd = f"49 27 9999:1 / /mnt/form\x0cfeed,\u2028,\x85,50\xa027\xa0{number} rw - tmpfs tmpfs rw"
    lines = [odd, "", f"51 27 {number} / /mnt rw shared:1 - xfs /dev/vdb rw - x", ""]
    monkeypatch.setattr(Path, "read_bytes", lambda path: "\n".join(lines).encode())
    monkeypatch.setattr(Path, "read_text", lambda path, **options: "\n".join(lines))
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert files_module._file_system_of(descriptor) == "xfs"
        del lines[2]
        assert files_module._file_system_of(descriptor) is None
    finally:
        os.close(descriptor)
