"""The frozen model that an adapter sits on, and its tokenizer: from a folder or the Hub, in 4 bits unless told otherwise."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moe_peft.errors import nearest, refuse
from moe_peft.pocket import POCKET_DIR


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def model_path(name: str) -> str:
    """A folder or an id on the Hub; 'pocket' is the backbone that comes with this package.

    Raises:
        ValueError: if it looks like a folder and there is none, or the folder holds no model.
    """
    if name == "pocket":
        return str(POCKET_DIR)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            adapter = (
                " It holds an adapter: that goes with `--adapter`." if (path / "adapter_config.json").is_file() else ""
            )
            raise ValueError(f"The folder '{name}' has no config.json, so it holds no model.{adapter}")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        around = [p.name for p in path.parent.glob("*/")] if path.parent.is_dir() else []
        raise ValueError(
            f"There is no model folder '{name}'. {nearest(path.name, [*around, 'pocket'])} An id on the Hub reads "
            "'someone/model'."
        )
    return name


def load_tokenizer(model: str, tokenizer: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        model: as for `load_backbone`.
        tokenizer: where it is, if it is not with the model.
        kwargs: for `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: if there is none.
    """
    alone = tokenizer is not None and Path(tokenizer).expanduser().is_dir()  # an adapter's folder, say: no model in it
    path = str(Path(tokenizer).expanduser()) if tokenizer is not None and alone else model_path(tokenizer or model)
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(
            f"The folder '{path}' has no tokenizer (no tokenizer.json or tokenizer_config.json). Copy these files "
            "from where the model came from, or say where they are with `--tokenizer`."
        )
    try:
        return AutoTokenizer.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer of '{path}' cannot be loaded: {_first_sentence(error)}") from error


def load_backbone(
    name: str, load_in: str = "4bit", device: torch.device | str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """The model, ready for an adapter.

    Args:
        name: a folder, an id on the Hub, or 'pocket'.
        load_in: "4bit" (NF4 with double quantisation, as QLoRA), "8bit" or "none". A checkpoint that is quantised
            already stays as it is.
        device: all of the model goes there; None leaves placing it to others, as FSDP and DeepSpeed want.
        kwargs: for `from_pretrained`; `dtype` is also the dtype that 4-bit weights compute in.

    Raises:
        ValueError: unknown `load_in`, or a model that cannot be loaded.
        ImportError: bitsandbytes is needed and not installed.
    """
    check_load_in(load_in)
    path = model_path(name)
    shared = {key: kwargs[key] for key in ("trust_remote_code", "revision", "token") if key in kwargs}
    if device is not None:
        kwargs.setdefault("device_map", {"": device})
    try:
        config = AutoConfig.from_pretrained(path, **shared)
        if getattr(config, "quantization_config", None) is None and load_in != "none":
            kwargs.setdefault("quantization_config", quantisation(load_in, kwargs.get("dtype", torch.float32)))
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model '{name}' cannot be loaded: {_first_sentence(error)}") from error
    return keep_trainable(model)


def keep_trainable(model: PreTrainedModel) -> PreTrainedModel:
    """Keep bitsandbytes from repacking 4-bit weights for inference, after which CPU training is silently wrong.

    Layers that carry an adapter are covered when it is injected; the others lie on the gradient's way as well.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (nn.Module types it as a tensor)
    return model


def check_load_in(load_in: str) -> None:
    """
    Raises:
        ValueError: if it is not one of the three.
    """
    if load_in not in ("4bit", "8bit", "none"):
        raise refuse("load_in", load_in, "'4bit', '8bit' or 'none'", nearest(load_in, ("4bit", "8bit", "none")))


def quantisation(load_in: str, compute_dtype: Any) -> BitsAndBytesConfig:
    """For `from_pretrained`: NF4 with double quantisation, or 8 bits.

    Raises:
        ValueError: unknown `load_in`.
        ImportError: bitsandbytes is not installed.
    """
    check_load_in(load_in)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Loading in {load_in} needs bitsandbytes: pip install bitsandbytes, or train without: `--load_in none`."
        ) from error
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300].rsplit(" ", 1)[0] + " ..."
