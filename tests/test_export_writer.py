"""The writer: what the format's own reader finds in its files, how much memory it holds, and what a failure leaves."""

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_export_helpers import make_adapter, make_base

from moe_peft.export import export_moe, writer
from moe_peft.export.writer import (
    PlannedTensor,
    check_is_free,
    remove_abandoned,
    whole_folder,
    write_checkpoint,
)


def planned(name, value, parts=1, dtype=None):
    pieces = tuple(piece.clone for piece in value.chunk(parts)) if value.dim() else (value.clone,)
    return PlannedTensor(name, tuple(value.shape), dtype or value.dtype, pieces)


VALUES = {
    "a.weight": torch.randn(6, 5, dtype=torch.float32),
    "b.bias": torch.randn(3).to(torch.bfloat16),  # 6 bytes: the next tensor would start off its own width
    "c.weight": torch.randn(4, 2, 3, dtype=torch.float64),
    "d.half": torch.randn(7, dtype=torch.float16),
    "e.count": torch.arange(3),
    "f.scalar": torch.tensor(2.5),
    "g.empty": torch.empty(0, 4),
}


@pytest.mark.parametrize("max_shard_size", ["4GB", 200, "1KB", 1])
def test_the_formats_own_reader_finds_every_tensor(max_shard_size, tmp_path):
    tensors = [planned(name, value, parts=2 if name[0] in "ac" else 1) for name, value in VALUES.items()]
    before = os.umask(0o077)  # of a careful user
    try:
        files = write_checkpoint(tensors, tmp_path, max_shard_size)
    finally:
        os.umask(before)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    read = {}
    for path in tmp_path.glob("*.safetensors"):
        read.update(load_file(path))
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # where the tensors start
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert read.keys() == VALUES.keys()
    for name, value in VALUES.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


def test_one_file_or_shards_with_an_index(tmp_path):
    tensors = [planned(f"t{i}", torch.full((100,), float(i))) for i in range(5)]
    (tmp_path / "one").mkdir()
    assert write_checkpoint(tensors, tmp_path / "one") == ["model.safetensors"]
    (tmp_path / "many").mkdir()
    assert write_checkpoint(tensors, tmp_path / "many", 800) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2000}
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "many" / file)[name][0] == float(name[1:])


def test_values_are_cast_and_progress_is_told(tmp_path):
    seen = []
    tensors = [planned("a", torch.randn(4, 3), parts=2, dtype=torch.bfloat16), planned("b", torch.ones(2))]
    write_checkpoint(tensors, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 32), (20, 32), (32, 32)]
    assert load_file(tmp_path / "model.safetensors")["a"].dtype == torch.bfloat16


def test_one_tensor_lives_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def make():
        nonlocal most
        value = torch.ones(1000)
        alive.add(value)
        most = max(most, len(alive))
        return value

    write_checkpoint([PlannedTensor(f"t{i}", (2000,), torch.float32, (make, make)) for i in range(20)], tmp_path)
    assert most <= 2  # the one that was written may be let go of after the next is made


@pytest.mark.parametrize("size", ["much", "4 apples", 0, -1])
def test_a_shard_size_that_cannot_be_read(size, tmp_path):
    with pytest.raises(
        ValueError, match="`max_shard_size` is .*, but must be a number of bytes, or a text such as '4GB'"
    ):
        write_checkpoint([planned("a", torch.ones(2))], tmp_path, size)
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_size_and_a_name_that_comes_twice(tmp_path):
    wrong = PlannedTensor("a", (3,), torch.float32, (partial(torch.ones, 2),))
    with pytest.raises(ValueError, match="'a' was planned with 12 bytes and came out with 8"):
        write_checkpoint([wrong], tmp_path)
    with pytest.raises(ValueError, match="Two tensors would be called 'a'"):
        write_checkpoint([planned("a", torch.ones(2)), planned("a", torch.ones(2))], tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with whole_folder(out) as beside:
        (beside / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o755
    assert list(out.parent.iterdir()) == [out]

    def fail(error):
        with whole_folder(tmp_path / "other") as beside:
            (beside / "file").write_text("x")
            raise error

    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            fail(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_an_empty_folder_is_filled_and_any_other_is_left_alone(tmp_path):
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as beside:
        (beside / "file").write_text("x")
    for place in (tmp_path / "empty", tmp_path / "empty" / "file"):
        with (
            pytest.raises(
                ValueError, match="`output` is .*, but must be a new or empty folder. Nothing is overwritten"
            ),
            whole_folder(place),
        ):
            pass
    assert (tmp_path / "empty" / "file").read_text() == "x"


def test_a_folder_that_cannot_be_replaced_is_refused_up_front(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mounted)
    with pytest.raises(ValueError, match="`output` is .*mounted', but must be .* a mount point .* Name a new folder"):
        check_is_free(mounted)
    monkeypatch.chdir(tmp_path / "work")
    for working in (Path("."), tmp_path / "work"):
        with pytest.raises(ValueError, match="`output` is .* the working folder may not. Name a new folder inside it"):
            check_is_free(working)
    check_is_free(tmp_path / "work" / "new")


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "out.1"
    code = (
        "import os, signal, sys; from pathlib import Path; from moe_peft.export.writer import whole_folder\n"
        "with whole_folder(Path(sys.argv[1])) as beside:\n"
        "    (beside / 'file').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    here, dead = socket.gethostname(), left.name.split(".")[-3]
    others = [
        f".out.1.{here}.{os.getpid()}.abc.unfinished",  # at work
        f".out.1.elsewhere.{dead}.abc.unfinished",
        f".out.{here}.{dead}.abc.unfinished",
        f".out.1.{here}.{dead}.abc",
        ".out.1.abc.unfinished",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    remove_abandoned(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
    remove_abandoned(tmp_path / "nowhere" / "out")


@pytest.fixture
def tiny(tmp_path):
    base = make_base(tmp_path / "base")
    return str(base), str(make_adapter(tmp_path / "adapter", base)), tmp_path / "out"


@pytest.mark.parametrize("after", [0, 40])
def test_a_disk_that_fills_up_leaves_nothing(after, tiny, monkeypatch):
    count = 0
    append = writer._append

    def full(value, dtype, file):
        nonlocal count
        count += 1
        if count > after:
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(value, dtype, file)

    monkeypatch.setattr(writer, "_append", full)
    base, adapter, out = tiny
    with pytest.raises(ValueError, match="The disk is full: '.*out' could not be written to its end.*GB are free now"):
        export_moe(base, adapter, out, verify=False, max_shard_size="50KB")
    assert sorted(path.name for path in out.parent.iterdir()) == ["adapter", "base"]


def test_another_error_of_the_disk_is_not_taken_for_a_full_one(tiny, monkeypatch):
    def broken(value, dtype, file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(writer, "_append", broken)
    base, adapter, out = tiny
    with pytest.raises(OSError, match="Input/output error"):
        export_moe(base, adapter, out, verify=False)
    assert sorted(path.name for path in out.parent.iterdir()) == ["adapter", "base"]


def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    monkeypatch.setattr(writer, "_append", None)
    base, adapter, out = tiny
    with pytest.raises(ValueError, match=r"'.*out' would take \d.* MB, but the disk has 0.0 MB free. Free some space"):
        export_moe(base, adapter, out, verify=False)
    assert not out.exists()


PEAK = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import moe_peft.export.check  # everything that is imported, before the first look
from moe_peft.export import export_moe

def memory(field):  # not ru_maxrss, which a process inherits from the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) // 1024

before = memory("VmRSS")
plan = export_moe(sys.argv[1], sys.argv[2], sys.argv[3], max_shard_size="400MB", verify=False)
print(plan.nbytes // 2**20, memory("VmHWM") - before, max(t.nbytes for t in plan.tensors) // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(("layers", "size"), [(2, 280), pytest.param(8, 1000, marks=pytest.mark.slow)])
def test_memory_stays_at_a_few_tensors_whatever_the_size(layers, size, tmp_path):
    """`size` MB and more are written from a fifth of that; the largest tensor has 8 MB (16 MB while it is computed)."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": layers, "initializer_range": 0.02}
    base = make_base(tmp_path / "base", "llama", dtype="bfloat16", **sizes)
    adapter = make_adapter(tmp_path / "adapter", base, experts=6, attention=False)
    command = [sys.executable, "-c", PEAK, str(base), str(adapter), str(tmp_path / "out")]
    # glibc otherwise keeps freed blocks of this size for later, a varying amount of them.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    here = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    written, grown, largest = map(int, done.stdout.split()[-3:])
    shutil.rmtree(tmp_path / "out")
    print(f"{written} MB written, {grown} MB more memory, largest tensor {largest} MB")
    assert written > size
    assert grown < 100
