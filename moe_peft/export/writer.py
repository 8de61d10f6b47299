"""Safetensors written tensor by tensor: first what there will be, then the bytes, so that memory holds one tensor at a time.

`save_pretrained` and `save_file` need all tensors of a shard in memory, which for an 8-billion backbone with eight experts
is 95 GB or a shard of it. Here the names, shapes and dtypes are known before the first byte: the header is written, and
each part of each tensor is computed, appended and forgotten.

A folder appears whole or not at all: everything is written to a hidden sibling, which is renamed at the end.
"""

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import psutil
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from moe_peft.errors import refuse


INDEX_FILE = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_UNFINISHED = ".unfinished"
_LETTERS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Progress = Callable[[int, int], None]
"""Called with the bytes written so far and the bytes there will be."""


class PlannedTensor(NamedTuple):
    """A tensor that is not there yet.

    Attributes:
        name: its key in the checkpoint.
        shape: of the whole tensor.
        dtype: that it is stored in.
        parts: each computes the next piece along the first dimension, in any floating dtype; pieces follow each other in
            the file. More than one where the whole would be many times an ordinary tensor (fused experts).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Callable[[], Tensor], ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def write_checkpoint(
    tensors: Sequence[PlannedTensor],
    folder: Path,
    max_shard_size: int | str = "4GB",
    on_progress: Progress | None = None,
) -> list[str]:
    """Write `model.safetensors`, or shards of it and, last, their index.

    Args:
        tensors: in the order that is best for reading their sources.
        folder: an existing one.
        max_shard_size: bytes, or a text such as "4GB"; a larger tensor has a shard of its own.
        on_progress: called after every part.

    Returns:
        the names of the files.

    Raises:
        ValueError: a shard size that cannot be read, two tensors of one name, or a part that has not the planned size.
        OSError: as the file system raises it.
    """
    named = {tensor.name: tensor for tensor in tensors}
    if len(named) != len(tensors):
        twice = sorted({t.name for t in tensors if sum(t.name == other.name for other in tensors) > 1})
        raise ValueError(f"Two tensors would be called '{twice[0]}'. This is a mistake of moe_peft: please report it.")
    split = _shards(named, max_shard_size)
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for file_name, names in split.filename_to_tensors.items():
        # Wide dtypes first: every tensor then starts at a multiple of its own width.
        shard = sorted((named[name] for name in names), key=lambda tensor: -tensor.dtype.itemsize)
        for written in _write_shard(shard, folder / file_name):
            done += written
            if on_progress is not None:
                on_progress(done, total)
    files = list(split.filename_to_tensors)
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")
        files.append(INDEX_FILE)
    for name in files:
        (folder / name).chmod(0o644)  # a server often runs under another user
    return files


def _shards(named: dict[str, PlannedTensor], max_shard_size: int | str):
    allowed = "a number of bytes, or a text such as '4GB' or '500MB'"
    try:
        split = split_state_dict_into_shards_factory(
            named,
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise refuse("max_shard_size", max_shard_size, allowed, "4GB suits most file systems.") from error
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise refuse("max_shard_size", max_shard_size, allowed, "4GB suits most file systems.")
    return split


def _write_shard(tensors: Iterable[PlannedTensor], path: Path) -> Iterator[int]:
    """Header and tensors of one file; yields the bytes of each part that was written."""
    tensors = list(tensors)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": _LETTERS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to start at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            yield from _write_parts(tensor, file)


def _write_parts(tensor: PlannedTensor, file: BinaryIO) -> Iterator[int]:
    written = 0
    for part in tensor.parts:
        size = _append(part(), tensor.dtype, file)
        written += size
        yield size
    if written != tensor.nbytes:
        raise ValueError(
            f"'{tensor.name}' was planned with {tensor.nbytes} bytes and came out with {written}: a weight has not the "
            "shape that the config says. Check that the base model's folder is whole."
        )


def _append(value: Tensor, dtype: torch.dtype, file: BinaryIO) -> int:
    value = value.to(dtype).contiguous()
    file.write(memoryview(value.view(-1).view(torch.uint8).numpy()))
    return value.nbytes


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; it becomes `out` at the end, or vanishes if anything is raised.

    Raises:
        ValueError: if `out` is there and not empty, or the disk fills up.
    """
    check_is_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{_owned(out)}{os.getpid()}.", suffix=_UNFINISHED, dir=out.parent))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes it private
        os.replace(beside, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(beside, ignore_errors=True)
        free = gigabytes(shutil.disk_usage(out.parent).free)
        raise ValueError(
            f"The disk is full: '{out}' could not be written to its end, and what was written is removed again. "
            f"{free} are free now. Free some space, or name a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _owned(out: Path) -> str:
    """How the name of what this machine writes for `out` begins; the number of the process follows."""
    return f".{out.name}.{socket.gethostname()}."


def remove_abandoned(out: Path) -> None:
    """Remove what an export to `out` has left that was killed on this machine, and so could not remove it itself."""
    for folder in out.parent.glob(f".*{_UNFINISHED}"):
        owner = folder.name.removeprefix(_owned(out)).partition(".")[0]
        if folder.name.startswith(_owned(out)) and owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def check_is_free(out: Path) -> None:
    """Refuse a place that holds something, or that no other folder can take.

    Raises:
        ValueError: if `out` is a file, a folder that is not empty, a mount point or the working folder.
    """
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise refuse("output", str(out), "a new or empty folder", "Nothing is overwritten: name another folder.")
    if out.is_dir() and (os.path.ismount(out) or out.samefile(Path.cwd())):
        allowed = "a folder that may be replaced, which a mount point and the working folder may not"
        raise refuse(
            "output", str(out), allowed, "Name a new folder inside it: the export appears whole, by a rename."
        )


def check_space(out: Path, needed: int) -> None:
    """Refuse before the first byte what would not fit.

    Args:
        out: the folder to be; its nearest parent that exists is looked at.
        needed: bytes.

    Raises:
        ValueError: if the disk has not as much free.
    """
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"'{out}' would take {gigabytes(needed)}, but the disk has {gigabytes(free)} free. Free some space, name a "
            "folder on another disk, or train with fewer experts."
        )


def gigabytes(size: int) -> str:
    """`size` bytes for people.

    >>> gigabytes(2_500_000_000)
    '2.5 GB'
    """
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
