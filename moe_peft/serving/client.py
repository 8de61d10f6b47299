"""Picks the adapter for a prompt from the prompt alone, for any server that holds one plain LoRA per expert.

Beside the LoRAs of `moe-peft export --to loras` lie `router.safetensors` and `router.json`. The choice is a small linear
classifier, or the nearest prototype, on the input embeddings of the prompt, averaged or max-pooled; the embedding table
is read from the base model's own files, the rows of the prompt alone. Nothing of torch, transformers or moe_peft is
needed: numpy, safetensors and tokenizers. This file works by itself, and the export puts a copy beside the LoRAs:

    python client.py EXPORT --base BASE_MODEL --prompt "Is a spoken contract binding?"
    python client.py EXPORT --base BASE_MODEL --prompt "..." --url http://127.0.0.1:8000/v1 --max-tokens 64

With `--url` the prompt goes to that OpenAI-compatible server as `model=<adapter>`, or to the base model where no expert
is near enough.
"""

import argparse
import hashlib
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file


FORMAT = 1
FINGERPRINT_ROWS = 1024

Array = Any  # numpy's own type takes parameters that say nothing here


class Choice(NamedTuple):
    """What a prompt goes to.

    Attributes:
        model: the adapter's name, as the server knows it; None is the base model.
        scores: of each adapter.
    """

    model: str | None
    scores: dict[str, float]


class Selector:
    """`router.safetensors` and `router.json` with the base model's embedding table.

    Args:
        folder: of the export.
        base: the base model's folder; default: the one that was exported from, where it is a folder.

    Raises:
        ValueError: if a file is missing or of another format, or the base model is another one.
    """

    def __init__(self, folder: str | Path, base: str | Path | None = None) -> None:
        folder = Path(folder)
        if not (folder / "router.json").is_file():
            raise ValueError(
                f"'{folder}' holds no router.json. Give the folder that `moe-peft export --to loras` wrote."
            )
        self.about: dict[str, Any] = json.loads((folder / "router.json").read_text())
        if self.about.get("format") != FORMAT:
            found = self.about.get("format")
            raise ValueError(f"`format` in router.json is {found!r}, but must be {FORMAT}. Export the adapter again.")
        self.adapters: list[str] = self.about["adapters"]
        self.tensors = {
            name: tensor.astype(np.float64) for name, tensor in load_file(folder / "router.safetensors").items()
        }
        self.base = Path(base or self.about["base_model"] or "")
        if not self.base.is_dir():
            raise ValueError(
                f"`base` is '{self.base}', but must be the folder of the base model. Pass it as `--base`."
            )
        self.table = EmbeddingTable(self.base, self.about["embedding"]["key"])
        found, wanted = self.table.fingerprint(), self.about["embedding"]["fingerprint"]
        if found != wanted:
            raise ValueError(
                f"The embedding table of '{self.base}' is {found[:12]}, but the adapters were exported from {wanted[:12]}: it is "
                "another base model. Give the one that the adapters were trained on."
            )
        self._tokenizer: Any = None

    def pooled(self, ids: list[int]) -> Array:
        """The prompt's embeddings, averaged or max-pooled, `[d]`."""
        rows = self.table.rows(ids).astype(np.float64) * self.about["embedding"]["scale"]
        return rows.max(0) if self.about["pool"] == "max" else rows.mean(0)

    def scores(self, ids: list[int]) -> Array:
        """Of each adapter: logits, their log-softmax where `log_softmax` says so, or minus the distance to a prototype."""
        x, weight = self.pooled(ids), self.tensors["weight"]
        if self.about["kind"] == "distance":
            return -np.sqrt(np.square(weight - x).sum(1))
        logits = weight @ x + self.tensors.get("bias", 0.0)
        if self.about["log_softmax"]:
            logits = logits - logits.max()
            logits = logits - np.log(np.exp(logits).sum())
        return logits

    def choose(self, prompt: str | list[int]) -> Choice:
        """The adapter for a prompt.

        Args:
            prompt: text, tokenized as the base model's tokenizer does by default; or token ids.

        Raises:
            ValueError: if the prompt has no token, or a token that the base model does not know.
        """
        ids = self.tokenize(prompt) if isinstance(prompt, str) else [int(i) for i in prompt]
        if not ids or min(ids) < 0 or max(ids) >= self.table.shape[0]:
            raise ValueError(
                f"`prompt` has token ids {ids[:8]}, but must have some, from 0 to {self.table.shape[0] - 1}."
            )
        scores = self.scores(ids)
        best, threshold = int(scores.argmax()), self.about["null_threshold"]
        missed = threshold is not None and scores[best] < threshold
        named = dict(zip(self.adapters, scores.tolist(), strict=True))
        return Choice(None if missed else self.adapters[best], named)

    def tokenize(self, text: str) -> list[int]:
        """The text's token ids, special tokens included as the base model's tokenizer adds them."""
        if self._tokenizer is None:
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_file(str(self.base / "tokenizer.json"))
        return list(self._tokenizer.encode(text).ids)


class EmbeddingTable:
    """The base model's input embeddings, memory-mapped.

    Args:
        base: a folder with safetensors.
        key: the table's name in the model; a file may leave a leading `model.` out, or have one.
    """

    _TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

    def __init__(self, base: Path, key: str) -> None:
        keys = (key, key.removeprefix("model."), f"model.{key}")
        for path in sorted(base.glob("*.safetensors")):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            name = next((name for name in keys if name in header), None)
            if name is not None:
                entry = header[name]
                break
        else:
            raise ValueError(
                f"No safetensors file of '{base}' holds '{key}', the embedding table. Give the base model."
            )
        self.shape: tuple[int, int] = tuple(entry["shape"])
        self.is_bf16 = entry["dtype"] == "BF16"
        start = 8 + size + entry["data_offsets"][0]
        self.values = np.memmap(path, self._TYPES[entry["dtype"]], "r", start, self.shape)

    def rows(self, ids: list[int]) -> Array:
        """Those rows, `[n, d]` in fp32 or better."""
        rows = np.asarray(self.values[np.asarray(ids)])
        if self.is_bf16:
            return (rows.astype("<u4") << 16).view("<f4")
        return rows.astype("<f8" if rows.dtype == np.float64 else "<f4")

    def fingerprint(self) -> str:
        """As `fingerprint` of the module, of this table."""
        count = min(self.shape[0], FINGERPRINT_ROWS)
        ids = [number * self.shape[0] // count for number in range(count)]
        return fingerprint(self.rows(ids), self.shape)


def fingerprint(rows: Array, shape: tuple[int, int]) -> str:
    """A hash of evenly spaced rows of a table, rounded to bfloat16: the same whether the base was loaded in bf16 or fp32.

    Args:
        rows: `[n, d]`.
        shape: of the table.
    """
    bits = np.ascontiguousarray(rows, "<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return hashlib.sha256(json.dumps(list(shape)).encode() + rounded.tobytes()).hexdigest()


def complete(url: str, model: str, prompt: str, max_tokens: int, timeout: float = 600.0) -> str:
    """The text that an OpenAI-compatible server answers.

    Args:
        url: up to and including `/v1`.
        model: the adapter's or the base model's name there.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)["choices"][0]["text"]


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pick the adapter for a prompt, and ask a server if --url is given.")
    parser.add_argument("folder", help="what `moe-peft export --to loras` wrote")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--base", help="the base model's folder; default: the one that was exported from")
    parser.add_argument("--url", help="of an OpenAI-compatible server, up to and including /v1")
    parser.add_argument("--base-name", help="the base model's name on the server; default: as in router.json")
    parser.add_argument("--max-tokens", type=int, default=64)
    given = parser.parse_args(arguments)
    try:
        selector = Selector(given.folder, given.base)
        choice = selector.choose(given.prompt)
    except ValueError as error:
        sys.exit(str(error))
    model = choice.model or given.base_name or selector.about["base_model"]
    if given.url is None:
        sys.stdout.write(json.dumps({"model": model, "scores": choice.scores}) + "\n")
    else:
        sys.stderr.write(f"{model}\n")
        sys.stdout.write(complete(given.url, model, given.prompt, given.max_tokens) + "\n")


if __name__ == "__main__":
    main()
