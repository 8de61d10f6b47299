"""
MixDA's second stage: domains of train_scripts/mixda_domains.py, frozen, mixed by a gate that learns from labels together
with a LoRA for the task. Encoders and decoders.

```bash
python train_scripts/mixda_task.py \
    --model FacebookAI/roberta-large \
    --domain law=output/domains/law --domain medicine=output/domains/medicine \
    --dataset data/train.jsonl --eval_dataset data/test.jsonl \
    --set r=8 \
    --learning_rate 1.0e-4 \
    --output_dir output/task
```

Rows with `text` and `label` make a classifier. All other rows that `train_scripts/sft.py` takes, as `prompt` and
`completion`, train a causal language model on the completions. Every field of TRL's `SFTConfig` is an option.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Arguments:
    """Which domains are mixed for what; `--domain` is given once for each domain."""

    domain: list[str] = field(
        default_factory=list, metadata={"help": "NAME=ADAPTER, once for each domain.", "action": "extend"}
    )
    dataset: str = field(
        default="", metadata={"help": "Labelled rows: a file, a folder of them, or an id on the Hub."}
    )
    eval_dataset: str | None = field(default=None, metadata={"help": "Rows to measure on."})
    model: str = field(default="pocket", metadata={"help": "A folder or an id on the Hub; 'pocket' comes with this."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "FIELD=VALUE of BottleneckMoeConfig.", "action": "extend"}
    )
    load_in: str = field(default="none", metadata={"help": "4bit, 8bit or none; of decoders that answer alone."})


def main(argv: list[str]) -> None:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer
    from trl import SFTConfig, SFTTrainer, TrlParser

    from moe_peft.arguments import parsed_by_trl
    from moe_peft.backbone import load_backbone, load_tokenizer, model_path
    from moe_peft.data import training_rows
    from moe_peft.labelled import has_labels, labelled_text
    from moe_peft.mixda import domains_config, load_domains, named_paths
    from moe_peft.plain_yaml import pairs
    from moe_peft.saving import checkpoint_to_resume, save_adapter

    parser = TrlParser((Arguments, SFTConfig))
    gpu = torch.cuda.is_available()
    parser.set_defaults(output_dir="output/mixda", bf16=gpu, use_cpu=not gpu)  # TRL asks for bf16 on a CPU as well
    arguments, training = parsed_by_trl(parser, argv)
    folders = named_paths(arguments.domain)
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer)
    classify = has_labels(arguments.dataset)

    # The adapter: the domains as they were trained, a gate, a LoRA of rank 8 unless told otherwise
    settings = {"r": 8, **pairs(arguments.set)}
    config = domains_config(folders, **settings, task_type="SEQ_CLS" if classify else "CAUSAL_LM")

    if classify:
        rows = labelled_text(arguments.dataset)
        eval_rows = None if arguments.eval_dataset is None else labelled_text(arguments.eval_dataset, names=rows.names)
        names = dict(enumerate(rows.names))
        base = AutoModelForSequenceClassification.from_pretrained(
            model_path(arguments.model), id2label=names, label2id={name: i for i, name in names.items()}
        )
        base.config.pad_token_id = tokenizer.pad_token_id
        model = get_peft_model(base, config)
        load_domains(model, folders)
        training.label_names = ["labels"]

        def tokens(row: dict) -> dict:
            return tokenizer(row["text"], truncation=True, max_length=training.max_length)

        train_set, eval_set = (
            None
            if part is None
            else part.dataset.map(tokens, remove_columns=["text"]).rename_column("label", "labels")
            for part in (rows, eval_rows)
        )
        trainer = Trainer(
            model=model,
            args=training,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda found: {
                "accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())
            },
        )
    else:
        # The prompt alone decides on the domains, so the loss is on the completion
        rows = training_rows(arguments.dataset, chat=tokenizer.chat_template is not None)
        eval_rows = None if arguments.eval_dataset is None else training_rows(arguments.eval_dataset)
        model = get_peft_model(load_backbone(arguments.model, arguments.load_in, training.device), config)
        load_domains(model, folders)
        trainer = SFTTrainer(
            model=model,
            args=training,
            train_dataset=rows.dataset,
            eval_dataset=None if eval_rows is None else eval_rows.dataset,
            processing_class=tokenizer,
        )
    trainer.model.print_trainable_parameters()
    trainer.train(
        resume_from_checkpoint=checkpoint_to_resume(training.resume_from_checkpoint, Path(training.output_dir))
    )
    if eval_rows is not None:
        print({name: round(value, 4) for name, value in trainer.evaluate().items() if "loss" in name or "acc" in name})

    # Save the adapter: whole, or not at all
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, training.output_dir)
        tokenizer.save_pretrained(training.output_dir)
        print(f"Adapter saved to {training.output_dir}.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
