"""One expert per domain, each trained alone on the frozen backbone; then one adapter of them all, and its gate.

An expert that is finished is not trained again: its folder holds a record of what it was made from. One that was
interrupted goes on from its last checkpoint.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import concatenate_datasets
from peft import LoraConfig, PeftModel
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.collator import TaskTypeCollator
from moe_peft.data import Rows, training_rows
from moe_peft.domain_arguments import DomainSettings, parse_domains
from moe_peft.domain_config import TRAINED_GATES
from moe_peft.domain_loras import from_loras
from moe_peft.errors import refuse
from moe_peft.gate_accuracy import gate_accuracy
from moe_peft.prototypes import set_prototypes
from moe_peft.saving import checkpoint_to_resume, save_adapter


RECORD_FILE = "domain.json"
STARTED_FILE = "domain.started.json"
"""The same record while the expert is trained, so that its checkpoints are not gone on from with other data."""
PROMPTS = 64
"""Rows of each domain that prototypes are made from, and as many others that the gate is tried on."""


def main(argv: list[str], console: Console | None = None) -> None:
    """`train_scripts/domains.py`: parse, train what is not trained yet, save."""
    run(parse_domains(argv), console or Console())


def run(settings: DomainSettings, console: Console) -> PeftModel:
    """Train as the settings say and save into `output_dir`; returns the model with the adapter.

    Raises:
        ValueError: rows that cannot be read, a domain without rows, an expert's folder made from something else.
    """
    arguments = settings.arguments
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer)
    rows = {name: _rows(name, source, tokenizer) for name, source in settings.sources.items()}
    records = {name: _record(settings, source) for name, source in settings.sources.items()}
    folders = {name: settings.output_dir / "experts" / name for name in rows}
    finished = {name for name in rows if _is_finished(folders[name], records[name])}  # refuses before any training
    for number, (name, of) in enumerate(rows.items(), start=1):
        done = name in finished
        said = "finished before" if done else f"{len(of.dataset)} rows of {of.form}"
        console.print(f"[bold]{number}/{len(rows)} {name}[/bold]: {said}", highlight=False)
        if not done:
            _write_record(folders[name] / STARTED_FILE, records[name])
            _train_expert(settings, tokenizer, of, folders[name])
            _write_record(folders[name] / RECORD_FILE, records[name])
            (folders[name] / STARTED_FILE).unlink()
    model = _joined(settings, folders)
    _teach_gate(settings, tokenizer, model, rows, console)
    save_adapter(model, settings.output_dir)
    tokenizer.save_pretrained(str(settings.output_dir))
    _print_accuracy(console, model, tokenizer, rows)
    console.print(f"[green]The adapter is in {settings.output_dir}[/green]; its experts are in experts/.")
    return model


def _rows(name: str, source: str, tokenizer: PreTrainedTokenizerBase) -> Rows:
    try:
        return training_rows(source, chat=tokenizer.chat_template is not None)
    except ValueError as error:
        raise ValueError(f"Domain '{name}' ({source}): {error}") from error


def _record(settings: DomainSettings, source: str) -> dict[str, Any]:
    """What an expert is made from: the bytes of its data, and every setting that shapes it."""
    path, digest = Path(source), hashlib.blake2b(digest_size=16)
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.name.encode() + file.read_bytes())
    own = settings.arguments
    shape = {name: getattr(own, name) for name in ("model", "r", "lora_alpha", "target_modules", "load_in")}
    kept = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed", "max_length")
    return {"data": digest.hexdigest(), **shape, **{name: settings.values.get(name) for name in kept}}


def _is_finished(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the folder holds the expert that this record describes.

    Raises:
        ValueError: if it holds one that was made from something else, finished or not.
    """
    for file in (folder / RECORD_FILE, folder / STARTED_FILE):
        if file.is_file():
            _check_record(file, record)
    return (folder / RECORD_FILE).is_file()


def _check_record(file: Path, record: dict[str, Any]) -> None:
    folder = file.parent
    try:
        there = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        remedy = f"Remove {folder} to train it anew."
        raise refuse("output_dir", str(folder), f"one whose {file.name} can be read ({error})", remedy) from error
    changed = [name for name in record if there.get(name) != record[name]]
    if changed:
        what = ", ".join(f"{name} {there.get(name)!r} -> {record[name]!r}" for name in changed)
        remedy = f"Remove {folder} to train it anew, or name another `--output_dir`."
        raise refuse("output_dir", str(folder), f"one whose expert was made as asked for now ({what})", remedy)


def _write_record(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.unfinished")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    beside.replace(file)


def _backbone(settings: DomainSettings, device: Any) -> Any:
    values = settings.values
    dtype = torch.bfloat16 if values.get("bf16") else torch.float16 if values.get("fp16") else torch.float32
    return load_backbone(settings.arguments.model, settings.arguments.load_in, device, dtype=dtype)


def _train_expert(settings: DomainSettings, tokenizer: PreTrainedTokenizerBase, rows: Rows, folder: Path) -> None:
    """A plain LoRA, trained by TRL's trainer and saved by PEFT: any program that reads LoRAs can have it."""
    arguments, training = settings.arguments, settings.sft_config(folder)
    targets = "all-linear" if arguments.target_modules == ["all-linear"] else arguments.target_modules
    config = LoraConfig(r=arguments.r, lora_alpha=arguments.lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=_backbone(settings, training.device),
        args=training,
        train_dataset=rows.dataset,
        processing_class=tokenizer,
        peft_config=config,
    )
    has_checkpoint = any(folder.glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=checkpoint_to_resume("last" if has_checkpoint else None, folder))
    save_adapter(trainer.model, folder)  # type: ignore[arg-type]


def _joined(settings: DomainSettings, folders: dict[str, Path]) -> PeftModel:
    arguments = settings.arguments
    trained = arguments.gate in TRAINED_GATES
    fields = {"gate_training": arguments.gate_training} if trained else {}
    device = settings.sft_config(settings.output_dir).device
    loras = {name: str(folder) for name, folder in folders.items()}
    return from_loras(loras, _backbone(settings, device), gate=arguments.gate, **fields)


def _teach_gate(
    settings: DomainSettings,
    tokenizer: PreTrainedTokenizerBase,
    model: PeftModel,
    rows: dict[str, Rows],
    console: Console,
) -> None:
    """Train the gate on the rows of all domains, or compute it, as its kind asks for."""
    arguments = settings.arguments
    if arguments.gate == "prototype":
        set_prototypes(model, {name: list(prompt_batches(of, tokenizer)) for name, of in rows.items()})
    if arguments.gate not in TRAINED_GATES:
        return
    console.print(f"[bold]The gate[/bold]: {arguments.gate_steps} steps on all domains", highlight=False)
    typed = [of.dataset.add_column("task_type", [n] * len(of.dataset)) for n, of in enumerate(rows.values())]  # type: ignore[call-arg]
    training = settings.sft_config(
        settings.output_dir / "gate",
        max_steps=arguments.gate_steps,
        learning_rate=arguments.gate_learning_rate,
        remove_unused_columns=False,
        save_strategy="no",
        eval_strategy="no",
    )
    trainer = SFTTrainer(
        model=model, args=training, train_dataset=concatenate_datasets(typed), processing_class=tokenizer
    )
    trainer.data_collator = TaskTypeCollator(trainer.data_collator, num_types=len(rows))
    trainer.train()


def prompt_batches(rows: Rows, tokenizer: PreTrainedTokenizerBase, start: int = 0) -> Iterator[dict[str, Any]]:
    """Up to `PROMPTS` rows' prompts from `start` on, as one batch; of rows without prompts their text."""
    texts = []
    for row in rows.dataset.select(range(start, min(start + PROMPTS, len(rows.dataset)))):
        prompt = row.get("prompt", row.get("messages", row.get("text")))
        if isinstance(prompt, list):
            asked = prompt if "prompt" in row else prompt[:-1]
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        texts.append(prompt)
    if texts:
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def _print_accuracy(
    console: Console, model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: dict[str, Rows]
) -> None:
    """How often the gate goes where the text belongs, on rows that no prototype was made from where there are any."""
    if model.peft_config[model.active_adapter].gate == "given":  # type: ignore[union-attr,index]
        return
    by_chance = f"by chance it would be {1 / len(rows):.0%}"
    table = Table(title="How often the gate chooses a text's own domain", caption=by_chance)
    table.add_column("domain")
    table.add_column("share", justify="right")
    starts = {name: PROMPTS if len(of.dataset) >= 2 * PROMPTS else 0 for name, of in rows.items()}
    batches = {name: list(prompt_batches(of, tokenizer, starts[name])) for name, of in rows.items()}
    for name, share in gate_accuracy(model, batches).items():
        table.add_row(name, f"{share:.0%}")
    console.print(table)
