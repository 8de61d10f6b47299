"""Tensors in a folder of safetensors files, read one by one. Nothing stays open, so memory holds what is in use."""

import difflib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor


WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.yaml", "LICENSE*", "NOTICE*"]
"""What is fetched from the Hub: weights in safetensors, configs and the tokenizer; no pickles, no code."""


def local_folder(name: str | Path) -> Path:
    """The folder itself, or the Hub's files of that id in the local cache.

    Raises:
        ValueError: if there is neither.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") != 1:
        raise ValueError(f"There is no folder '{name}'. Give one, or an id on the Hub such as 'someone/model'.")
    try:
        return Path(snapshot_download(text, allow_patterns=WANTED))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"'{name}' is no folder here and cannot be fetched from the Hub: {reason}") from error


class Checkpoint:
    """The tensors of `<stem>.safetensors`, or of the shards that its index names.

    Of a model that also sees, only the language model is looked at, under the names that it has alone.

    Attributes:
        folder: where it lies.
        paths: the files.
        files: tensor name -> file.
        shapes, dtypes: tensor name -> shape, and the dtype's letters as safetensors writes them ("BF16").
    """

    def __init__(self, folder: Path, stem: str = "model", inside: str | None = None) -> None:
        """Read the headers.

        Args:
            folder: with the files.
            stem: of their names.
            inside: the prefix that the language model has in a larger one, if it is one; it becomes "model.".

        Raises:
            ValueError: no safetensors, a shard that is missing or cut short.
        """
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.paths = self._find(stem)
        for path in self.paths:
            try:
                with safe_open(path, framework="pt") as file:
                    for stored in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                        piece = file.get_slice(stored)
                        self.files[stored] = path
                        self.shapes[stored], self.dtypes[stored] = tuple(piece.get_shape()), piece.get_dtype()
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"`{path}` cannot be read: {error}. A download or a save that was interrupted leaves such a file; "
                    "fetch it anew."
                ) from error

        self._stored = {name: name for name in self.files}
        if inside is not None and any(name.startswith(inside) for name in self.files):
            self._look_inside(inside)

    def _look_inside(self, prefix: str) -> None:
        """Keep the language model only, under the names that it has alone."""
        kept = {name: f"model.{name.removeprefix(prefix)}" for name in self.files if name.startswith(prefix)}
        kept |= {name: name for name in self.files if name == "lm_head.weight"}
        self._stored = {alone: name for name, alone in kept.items()}
        for table in (self.files, self.shapes, self.dtypes):
            values = {alone: table[name] for name, alone in kept.items()}
            table.clear()
            table.update(values)

    def _find(self, stem: str) -> list[Path]:
        index = self.folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in shards if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(
                    f"'{self.folder}' lacks {missing[0]}, which its index names ({len(missing)} of {len(shards)} shards "
                    "are missing). Fetch the model anew."
                )
            return [self.folder / name for name in shards]
        single = self.folder / f"{stem}.safetensors"
        if single.is_file():
            return [single]
        pickled = " It has pickled weights (.bin), which are not read." if any(self.folder.glob("*.bin")) else ""
        raise ValueError(f"'{self.folder}' has no {stem}.safetensors.{pickled} Save the model with save_pretrained.")

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or some of its rows, as it is stored.

        Raises:
            ValueError: if there is no tensor of that name.
        """
        if name not in self.files:
            close = difflib.get_close_matches(name, self.files, n=1)
            hint = f" The nearest is '{close[0]}'." if close else ""
            raise ValueError(
                f"'{self.folder}' has no tensor '{name}', which its config asks for.{hint} Fetch it anew."
            )
        # Opened for each read: what is mapped into memory is released with the tensor.
        with safe_open(self.files[name], framework="pt") as file:
            if rows is None:
                return file.get_tensor(self._stored[name])
            return file.get_slice(self._stored[name])[rows[0] : rows[1]]

    def hashes(self) -> dict[str, str]:
        """sha256 of each file, by its name."""
        return {path.name: sha256(path) for path in self.paths}


def base_sha256(base: Path) -> dict[str, str]:
    """sha256 of each weights file of a base model, by its name; several are read at a time.

    Raises:
        ValueError: if it has none in safetensors.
    """
    paths = Checkpoint(base).paths
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(sha256, paths), strict=True))


def sha256(path: Path) -> str:
    """Of a file of any size, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def torch_dtype(letters: str) -> torch.dtype:
    """The dtype that safetensors writes as "BF16", "F32", ...

    Raises:
        ValueError: if it is none that a weight can be computed with.
    """
    if letters not in _DTYPES:
        raise ValueError(
            f"The base model stores tensors as '{letters}', which experts cannot be merged into. Give the model in 16 or 32 "
            "bits."
        )
    return _DTYPES[letters]
