"""
MixDA's first stage: bottleneck adapters for named domains, each learnt from plain text beside a frozen backbone, one after
another, while general text keeps its outputs. Masked text for encoders, causal for decoders.

```bash
python train_scripts/mixda_domains.py \
    --model FacebookAI/roberta-large \
    --domain law=data/law.txt --domain medicine=data/medicine.jsonl \
    --general data/wiki.txt \
    --learning_rate 1.0e-4 \
    --num_train_epochs 10 \
    --output_dir output/domains
```

Leaves one adapter for each domain, `output/domains/law` and so on. A domain that is finished is passed over when the same
command is given again; one that was interrupted goes on with `--resume_from_checkpoint true`. Every field of transformers'
`TrainingArguments` is an option. The second stage is train_scripts/mixda_task.py.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Arguments:
    """What is learnt from what; `--domain` is given once for each domain."""

    domain: list[str] = field(
        default_factory=list, metadata={"help": "NAME=TEXT, once for each domain.", "action": "extend"}
    )
    general: str | None = field(default=None, metadata={"help": "General text, whose outputs are to stay."})
    model: str = field(default="pocket", metadata={"help": "A folder or an id on the Hub; 'pocket' comes with this."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    set: list[str] = field(
        default_factory=list, metadata={"help": "FIELD=VALUE of BottleneckMoeConfig.", "action": "extend"}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens per row."})
    mask_share: float = field(default=0.15, metadata={"help": "Of the tokens, for an encoder."})
    domain_weight: float = field(default=0.5, metadata={"help": "Of the domain's loss beside the old-knowledge loss."})
    distance: str = field(default="output", metadata={"help": "'output' (the code's) or 'ffn' (the paper's)."})
    load_in: str = field(default="none", metadata={"help": "4bit, 8bit or none; of decoders alone."})


def main(argv: list[str]) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForMaskedLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments
    from trl import TrlParser  # a parser that also reads --config FILE.yaml

    from moe_peft import BottleneckMoeConfig
    from moe_peft.arguments import parsed_by_trl
    from moe_peft.backbone import load_backbone, load_tokenizer, model_path
    from moe_peft.data import training_rows
    from moe_peft.mixda import named_paths
    from moe_peft.old_knowledge import OldKnowledgeLoss, text_blocks
    from moe_peft.plain_yaml import pairs
    from moe_peft.saving import checkpoint_to_resume, save_adapter

    parser = TrlParser((Arguments, TrainingArguments))
    arguments, training = parsed_by_trl(parser, argv)
    domains = named_paths(arguments.domain)
    output = Path(training.output_dir or "output/domains")
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer)
    masked = tokenizer.mask_token is not None

    # Read all the text before anything is trained: what is missing shows at once
    def blocks(source: str) -> list[dict]:
        return text_blocks(training_rows(source, chat=False).dataset["text"], tokenizer, arguments.block_size)

    texts = {name: blocks(source) for name, source in domains.items()}
    general = None if arguments.general is None else blocks(arguments.general)
    if general is None:
        print("No --general text: nothing keeps the old knowledge.")
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=masked, mlm_probability=arguments.mask_share)
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)  # general text is looked at whole

    for name, rows in texts.items():
        folder = output / name
        if (folder / "adapter_config.json").is_file():
            print(f"{name}: finished already, in {folder}.")
            continue
        print(f"{name}: {len(rows)} rows of {arguments.block_size} tokens, {'masked' if masked else 'causal'}")

        # A fresh copy of the frozen backbone with this domain's adapter alone
        if masked:
            base = AutoModelForMaskedLM.from_pretrained(model_path(arguments.model))
        else:
            base = load_backbone(arguments.model, arguments.load_in, training.device)
        config = BottleneckMoeConfig(**{"gate": "none", **pairs(arguments.set), "domains": [name]})
        model = get_peft_model(base, config)
        model.print_trainable_parameters()

        loss = None
        if general is not None:
            size = training.per_device_train_batch_size
            loss = OldKnowledgeLoss(model, general, pad, size, arguments.domain_weight, arguments.distance)
        training.output_dir, training.label_names = str(folder), ["labels"]
        trainer = Trainer(model, training, collate, rows, compute_loss_func=loss)
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training.resume_from_checkpoint, folder))
        measured = trainer.evaluate(rows[: 4 * training.per_device_eval_batch_size])["eval_loss"]
        print(f"{name}: loss {measured:.3f} (perplexity {math.exp(min(measured, 20)):.1f}) on its first rows")
        if trainer.is_world_process_zero():
            save_adapter(model, folder)
            print(f"{name}: saved to {folder}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
