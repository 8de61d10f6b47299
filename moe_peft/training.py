"""Supervised fine-tuning of any adapter on any causal language model, with TRL's own trainer.

`moe-peft train` calls `main`; `train_scripts/sft.py` is the same run, to be read from top to bottom and changed.
"""

import json
import shlex
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer  # pyright: ignore[reportPrivateImportUsage]
from trl.chat_template_utils import get_training_chat_template

from moe_peft.arguments import PROGRAM, Settings, parse
from moe_peft.backbone import load_backbone, load_tokenizer, model_path
from moe_peft.banner import installed, parameter_counts, print_banner
from moe_peft.card import describe_adapter
from moe_peft.catalogue import CARD_FILE, RECIPE_FILE
from moe_peft.collator import TaskTypeCollator
from moe_peft.data import Rows, TaskTypes, training_rows
from moe_peft.errors import nearest, refuse
from moe_peft.export.checkpoint import base_sha256
from moe_peft.portable_lora import WEIGHTS_FILE
from moe_peft.saving import begin, checkpoint_to_resume, put_in_place
from moe_peft.upcycling import init_experts_from_lora


LOG_FILE = "training_log.json"


def main(argv: Sequence[str], console: Console | None = None) -> None:
    """`moe-peft train`: parse, train, save.

    Raises:
        ValueError, ImportError: for whatever the user can set right, in words.
    """
    run(parse(argv, PROGRAM), console or Console())


def run(settings: Settings, console: Console) -> SFTTrainer:
    """Train as `settings` say and save into `output_dir`; returns the trainer with the trained model."""
    arguments, training = settings.arguments, settings.training
    resume = checkpoint_to_resume(training.resume_from_checkpoint, settings.output_dir)
    if resume is None and (settings.output_dir / WEIGHTS_FILE).is_file():
        remedy = (
            "Name another, move that adapter away, or go on from its last checkpoint with `--resume_from_checkpoint`."
        )
        raise refuse("output_dir", str(settings.output_dir), "a folder without a trained adapter", remedy)
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer, trust_remote_code=training.trust_remote_code)
    rows, eval_rows = load_rows(settings, tokenizer)
    model = load_model(settings)
    trainer = make_trainer(settings, model, tokenizer, rows, eval_rows)
    if trainer.is_world_process_zero():
        print_banner(console, trainer, settings, rows, notes(settings, trainer, rows))
    start = time.monotonic()
    written = settings.output_dir / CARD_FILE
    card = written.read_text(encoding="utf-8") if written.is_file() else None  # TRL's checkpoints write over it
    trainer.train(resume_from_checkpoint=resume)
    finish(trainer, settings, time.monotonic() - start, card)
    if trainer.is_world_process_zero():
        print_next(console, settings)
    return trainer


def task_types_of(config: Any) -> TaskTypes | None:
    """The task types that the adapter tells apart; None where it does not look at them."""
    if getattr(config, "balance", None) == "localized":
        return TaskTypes()
    names = list(getattr(config, "domains", None) or ()) if getattr(config, "supervised", False) else []
    if names:
        meaning = f"a whole number from 0 to {len(names) - 1}, the place of the row's domain in `domains`"
        few = f"{', '.join(names[:6])}{' ...' if len(names) > 6 else ''}"
        need = (
            f"The gate learns from it: add a column `domain` with a name of `domains` ({few}), or `task_type` with its place "
            "from 0. `--set 'domains=[...]'` names others; `--set gate_training=loss` learns without."
        )
        return TaskTypes(len(names), meaning, need, names)
    groups = len(getattr(config, "expert_groups", None) or ())
    if not groups:
        return None
    meaning = f"a whole number from 0 to {groups - 1}, for each type an entry of `expert_groups`"
    need = f"The adapter's experts are chosen by it, {meaning}. Add the column, or train a method with a router that learns."
    return TaskTypes(groups, meaning, need)


def load_rows(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, Rows | None]:
    """The rows to train on and to evaluate on, in TRL's formats.

    Raises:
        ValueError: see `training_rows`; or the adapter's balance and the way of batching exclude each other.
    """
    arguments, training = settings.arguments, settings.training
    task = settings.source.config.task_type
    if task not in (None, "CAUSAL_LM"):
        remedy = "A reward model trains with train_scripts/reward_dmoerm.py, or TRL's RewardTrainer."
        raise refuse(
            f"task_type of {settings.source.name}", str(task), "'CAUSAL_LM' for supervised fine-tuning", remedy
        )
    types = task_types_of(settings.source.config)
    if types and (training.packing or training.padding_free):
        raise ValueError(
            f"`{'packing' if training.packing else 'padding_free'}` is True, but `balance` = 'localized' and "
            "`expert_groups` need one sample per row, as they look at the task type of each. Turn it off, or `--set "
            "balance=none`."
        )

    def read(source: str, split: str) -> Rows:
        return training_rows(
            source,
            split,
            chat=tokenizer.chat_template is not None or training.chat_template_path is not None,
            text_field=training.dataset_text_field,
            keep=("task_type",) if types else (),
            types=types,
        )

    rows = read(arguments.dataset, arguments.split)
    share = _share(arguments.eval_split)
    if share is not None and arguments.eval_dataset is None:
        parts = rows.dataset.train_test_split(test_size=share, seed=training.seed)
        rows, eval_rows = rows._replace(dataset=parts["train"]), rows._replace(dataset=parts["test"])
    elif share is not None:
        raise ValueError(
            f"`--eval_split` is {arguments.eval_split}, a share to hold out of `--dataset`, but `--eval_dataset` is "
            "given as well. Leave one out."
        )
    elif arguments.eval_dataset or arguments.eval_split:
        eval_rows = read(arguments.eval_dataset or arguments.dataset, arguments.eval_split or "train")
    else:
        eval_rows = None
    _decide_loss(settings, tokenizer, rows)
    if types:
        training.remove_unused_columns = False  # the trainer would drop the task types with them
    return rows, eval_rows


def load_model(settings: Settings) -> PreTrainedModel:
    """The frozen backbone: in 4 bits unless told otherwise, computing in the precision of the run."""
    arguments, training = settings.arguments, settings.training
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    sharded = bool(training.fsdp or training.deepspeed)
    options = {"dtype": dtype, "trust_remote_code": training.trust_remote_code, **_mapping(training.model_init_kwargs)}
    training.model_init_kwargs = None  # used here; TRL would warn that it cannot use them any more
    return load_backbone(arguments.model, arguments.load_in, None if sharded else training.device, **options)


def make_trainer(
    settings: Settings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, eval_rows: Rows | None
) -> SFTTrainer:
    """TRL's trainer with the adapter injected.

    Raises:
        ValueError: if the adapter fits no layer of the model, or no row is left to train on.
    """
    config = settings.source.config
    config.task_type = config.task_type or "CAUSAL_LM"
    try:
        trainer = SFTTrainer(
            model=model,
            args=settings.training,
            train_dataset=rows.dataset,
            eval_dataset=None if eval_rows is None else eval_rows.dataset,
            processing_class=tokenizer,
            peft_config=config,
        )
    except ValueError as error:
        if "arget modules" in str(error):
            raise ValueError(_no_target(model, config)) from error
        if "router_aux_loss_coef" in str(error):  # TRL's field of the same name is for backbones that are mixtures
            raise ValueError(
                f"`router_aux_loss_coef` = {settings.training.router_aux_loss_coef} went to the trainer, which balances "
                f"the backbone's routers, and {type(model).__name__} has none. For the adapter's: `--set "
                f"router_aux_loss_coef={settings.training.router_aux_loss_coef}`."
            ) from error
        raise
    if settings.arguments.experts_from:
        init_experts_from_lora(cast(PeftModel, trainer.model), settings.arguments.experts_from)
    types = task_types_of(config)
    if types:
        trainer.data_collator = TaskTypeCollator(trainer.data_collator, num_types=types.count)
    if not len(prepared_rows(trainer)):
        raise ValueError(
            f"None of the {len(rows.dataset)} rows is left: in all of them the prompt alone fills `max_length` = "
            f"{settings.training.max_length}. Raise `--max_length`."
        )
    return trainer


def notes(settings: Settings, trainer: SFTTrainer, rows: Rows) -> list[str]:
    """What somebody might otherwise find out too late."""
    said, training = [], settings.training
    prepared = prepared_rows(trainer)
    lost = len(rows.dataset) - len(prepared)
    if not training.packing and lost > 0:
        said.append(
            f"{lost} of {len(rows.dataset)} rows are left out: their prompts alone fill `max_length` = {training.max_length}."
        )
    if not training.packing and training.max_length:
        cut = sum(len(ids) >= training.max_length for ids in prepared["input_ids"])
        if cut:
            said.append(f"{cut} rows are cut at `max_length` = {training.max_length} tokens.")
    if settings.arguments.experts_from:
        said.append(f"The experts start from {', '.join(settings.arguments.experts_from)}.")
    if settings.source.weights:
        said.append(
            f"'{settings.source.name}' lends its settings; its trained weights are not loaded and the experts start fresh."
        )
    if rows.conversational and "messages" in rows.dataset.column_names and not training.assistant_only_loss:
        said.append(
            "The loss counts the user's turns too; `--assistant_only_loss` needs a template that marks the answers."
        )
    return said


def finish(trainer: SFTTrainer, settings: Settings, seconds: float, card: str | None = None) -> None:
    """Save the adapter, the tokenizer, the recipe of this run, its log and its card into `output_dir`, in one step.

    Args:
        card: what stood in `output_dir` before the run, to be gone on from.
    """
    output = settings.output_dir
    main_process = trainer.is_world_process_zero()
    beside = begin(output) if main_process else output
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(beside if main_process else output))
    if main_process:
        recipe = f"# This run again: moe-peft train --config {RECIPE_FILE}\n{yaml.safe_dump(settings.given, sort_keys=False)}"
        (beside / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        log = run_log(trainer, settings, seconds)
        (beside / LOG_FILE).write_text(json.dumps(log, indent=1, default=str), encoding="utf-8")
        known = settings.source.name, settings.arguments.dataset, log, card, model_path(settings.arguments.model)
        describe_adapter(trainer.model, beside, *known)
        put_in_place(beside, output)
    trainer.accelerator.wait_for_everyone()
    if settings.training.push_to_hub:
        trainer.push_to_hub(dataset_name=settings.arguments.dataset)


def run_log(trainer: SFTTrainer, settings: Settings, seconds: float) -> dict[str, Any]:
    """Everything about a run that a later reader may ask for."""
    device = settings.training.device
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "settings": settings.given,
        "versions": {name: version(name) for name in installed()},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "parameters": parameter_counts(trainer.model),
        "base_sha256": _base_sha256(settings),
        "seconds": round(seconds, 1),
        "peak_device_memory_bytes": peak,
        "log": trainer.state.log_history,
    }


def _base_sha256(settings: Settings) -> dict[str, str] | None:
    """Which weights the adapter was trained on, by file, for whoever serves it; None where they are no safetensors."""
    if "model_init_kwargs" in settings.given:  # it may name another revision
        return None
    name = model_path(settings.arguments.model)
    try:
        return base_sha256(Path(name if Path(name).is_dir() else snapshot_download(name, local_files_only=True)))
    except (ValueError, OSError):
        return None


def print_next(console: Console, settings: Settings) -> None:
    """Where everything is, and what to type now."""
    output = settings.output_dir
    console.print(f"[green]The adapter is in {output}[/green], with {RECIPE_FILE} and {LOG_FILE}.")
    if settings.source.config.peft_type == "SHARD_POOL" or getattr(settings.source.config, "routing", "") == "random":
        console.print("Next, look into it, or write it as one plain LoRA, exactly:")
        for command in (f"inspect {output}", f"merge {output} --output {output / 'merged'}"):
            console.print(f"  moe-peft {command}", highlight=False, markup=False, soft_wrap=True)
        return
    arguments = settings.arguments
    data = shlex.quote(arguments.dataset + (f"#{arguments.split}" if arguments.split != "train" else ""))
    if settings.source.config.peft_type == "BOTTLENECK_MOE":  # nothing that it could be merged into
        console.print("Next, look into its gates:")
        console.print(f"  moe-peft inspect {output} --data {data}", highlight=False, markup=False, soft_wrap=True)
    elif hasattr(settings.source.config, "routing"):
        exact = settings.source.config.peft_type == "FFN_MOE"
        then = "write it as a stock MoE checkpoint" if exact else "fit one plain LoRA to it"
        console.print(f"Next, look into its routers, or {then}:")
        console.print(f"  moe-peft inspect {output} --data {data}", highlight=False, markup=False, soft_wrap=True)
        merge = f"  moe-peft merge {output} --calibration {data} --output {output / 'merged'}"
        export = f"  moe-peft export {output} --to moe --output {output / 'exported'}"
        console.print(export if exact else merge, highlight=False, markup=False, soft_wrap=True)


def prepared_rows(trainer: SFTTrainer) -> Dataset:
    """The rows as TRL prepared them: tokenised, masked, cut or packed."""
    return cast(Dataset, trainer.train_dataset)


def _mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    if isinstance(value, str):  # a path or a word: SFTConfig reads what starts with a brace itself
        raise refuse("model_init_kwargs", value, "a mapping", """Write '{"attn_implementation": "sdpa"}', say.""")
    return value or {}


def _share(eval_split: str | None) -> float | None:
    try:
        share = float(eval_split or "")
    except ValueError:
        return None
    if not 0 < share < 1:
        raise ValueError(
            f"`--eval_split` is {eval_split}, but a share to hold out must be above 0 and below 1, as 0.1."
        )
    return share


def _decide_loss(settings: Settings, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> None:
    """Whole conversations are trained on the assistant's turns wherever the chat template can tell them apart."""
    training = settings.training
    if training.assistant_only_loss is not None:
        return
    training.assistant_only_loss = False
    if "messages" not in rows.dataset.column_names or training.chat_template_path is not None:
        return
    try:
        get_training_chat_template(tokenizer)  # None if it marks the answers, a marked one if TRL knows the family
    except ValueError:
        return
    training.assistant_only_loss = True


def _no_target(model: nn.Module, config: Any) -> str:
    linear = {
        name.rsplit(".", 1)[-1] for name, m in model.named_modules() if hasattr(m, "in_features") or hasattr(m, "nf")
    }
    names = sorted(linear - {"lm_head"})
    wanted = sorted(config.target_modules) if isinstance(config.target_modules, (set, list)) else config.target_modules
    hint = nearest(wanted[0] if isinstance(wanted, list) else str(wanted), names)
    return (
        f"`target_modules` = {wanted} matches no layer of {type(model).__name__}, whose linear layers are called "
        f"{', '.join(names)}. {hint + ' ' if hint.startswith('Did') else ''}Write `--set target_modules=[NAME,NAME]` or "
        "`--set target_modules=all-linear`."
    )
