"""
A reward model of capability experts with a fusion head (DMoERM, arXiv:2403.01197), from top to bottom.

```bash
python train_scripts/reward_dmoerm.py \
    --model Qwen/Qwen3-0.6B \
    --dataset pairs.jsonl \
    --output_dir output/dmoerm
```

A row of the data has `chosen`, `rejected`, perhaps `prompt`, and `capability`: what the pair was judged for ("harmlessness"),
or nothing where it was judged as a whole. First every capability gets a LoRA and a score head, trained on its pairs; then
all of them are frozen, and a small head learns from the other pairs what they add up to. With categories of prompts
(`--categories chat=kind,brief facts=true,brief`, and a `category` in each row judged as a whole) each has a head of its own.

Every field of TRL's `RewardConfig` is an option and holds for the experts; the head has `--fusion_learning_rate` and
`--fusion_epochs`. `--resume_from_checkpoint true` takes the experts that are there and goes on with the next.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Arguments:
    """What a run needs beside TRL's `RewardConfig`."""

    dataset: str = field(metadata={"help": "Pairs: a json, jsonl, csv or parquet file, a folder of them, or an id."})
    split: str = field(default="train", metadata={"help": "Which split; a slice works: 'train[:300]'."})
    model: str = field(default="pocket", metadata={"help": "A folder or an id on the Hub, or 'pocket'."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where it is, if not with the model."})
    adapter: str = field(
        default="dmoerm", metadata={"help": "The LoRA of each capability, as `moe-peft train --adapter`."}
    )
    set: list[str] = field(default_factory=list, metadata={"help": "Change fields of it: --set r=8 lora_alpha=16."})
    categories: list[str] = field(
        default_factory=list, metadata={"help": "NAME=CAPABILITY,CAPABILITY for each category."}
    )
    fusion_size: int | None = field(default=None, metadata={"help": "Width of the head; by default the hidden size."})
    fusion_learning_rate: float = field(default=1e-3, metadata={"help": "The paper's is 1e-6, and many more pairs."})
    fusion_epochs: float = field(default=3.0, metadata={"help": "Passes over the pairs judged as a whole."})
    held_out: float = field(default=0.1, metadata={"help": "Share of the pairs judged as a whole to measure on."})
    load_in: str = field(default="4bit", metadata={"help": "4bit, 8bit or none."})


def main(argv: list[str]) -> None:
    from peft import PeftModel, get_peft_model
    from trl import RewardConfig, RewardTrainer, TrlParser

    from moe_peft.arguments import parsed_by_trl
    from moe_peft.backbone import load_tokenizer, model_path
    from moe_peft.catalogue import adapter_config, recipe
    from moe_peft.plain_yaml import pairs
    from moe_peft.preferences import preferences
    from moe_peft.reward_fusion import (
        EXPERTS_FOLDER,
        check_categories,
        check_names,
        fuse,
        load_classifier,
        save_expert,
    )
    from moe_peft.reward_router import fit_router

    on_gpu = torch.cuda.is_available()
    parser = TrlParser((Arguments, RewardConfig), prog="python train_scripts/reward_dmoerm.py")
    parser.set_defaults(bf16=on_gpu, use_cpu=not on_gpu, output_dir="output/dmoerm", **recipe("dmoerm"))
    arguments, training = parsed_by_trl(parser, argv)
    if not 0 < arguments.held_out < 1:
        raise ValueError(f"`held_out` is {arguments.held_out}, a share, but must be above 0 and below 1, as 0.1.")
    output, resume = Path(training.output_dir), bool(training.resume_from_checkpoint)
    training.resume_from_checkpoint = None
    if not resume and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"`output_dir` is {output}, which is not empty. Name another, or `--resume_from_checkpoint true`."
        )
    categories = {name: str(of).split(",") for name, of in pairs(arguments.categories).items()} or None

    # The pairs, by what they were judged for; some of those judged as a whole are kept to measure on
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = preferences(arguments.dataset, arguments.split, categories=None if categories is None else list(categories))
    check_names("capability", list(rows.by_capability))
    if categories is not None:
        check_categories(categories, list(rows.by_capability))
    parts = rows.overall.train_test_split(test_size=arguments.held_out, seed=training.seed)

    # The frozen backbone with one output
    torch.manual_seed(training.seed)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    path = model_path(arguments.model)
    backbone = load_classifier(path, tokenizer.pad_token_id, arguments.load_in, training.device, dtype=dtype)

    # Stage 1: a LoRA and a score head for each capability, one after the other
    experts, alone = None, {}
    for name, judged in rows.by_capability.items():
        there = output / EXPERTS_FOLDER / name
        if resume and (there / "adapter_config.json").is_file():
            print(f"{name}: taken from {there}.")
            if experts is None:
                experts = PeftModel.from_pretrained(backbone, str(there), adapter_name=name)
            else:
                experts.load_adapter(str(there), adapter_name=name)
            experts.set_adapter(name, inference_mode=True)  # frozen: TRL would round what it takes for trainable
            steps = 0
        else:
            config = adapter_config(arguments.adapter, **pairs(arguments.set)).config
            if experts is None:
                experts = get_peft_model(backbone, config, adapter_name=name)
            else:
                experts.add_adapter(name, config)
                experts.set_adapter(name)
            steps = len(judged)
            print(f"{name}: {steps} pairs.")
        stage = dataclasses.replace(training, output_dir=str(output / "stages" / name))
        trainer = RewardTrainer(model=experts, args=stage, train_dataset=judged, processing_class=tokenizer)
        for parameter in (p for p in experts.parameters() if p.requires_grad):
            parameter.data = (
                parameter.data.float()
            )  # TRL stores those of a 4-bit model in bf16, where small steps are lost
        if steps:
            trainer.train()
            save_expert(experts, name, there)
        alone[name] = trainer.evaluate(parts["test"].select_columns(judged.column_names))["eval_accuracy"]

    # Stage 2: the experts frozen, a head over their states; with categories, one for each and a router
    fused = fuse(experts, list(rows.by_capability), arguments.fusion_size, categories).to(training.device)
    stage = dataclasses.replace(
        training,
        output_dir=str(output / "stages" / "fusion"),
        learning_rate=arguments.fusion_learning_rate,
        num_train_epochs=arguments.fusion_epochs,
        gradient_checkpointing=False,  # the experts run without gradients
    )
    together = {}
    for head in fused.config.heads:
        mine = {
            key: part if categories is None else part.filter(lambda row, h=head: row["category"] == h)
            for key, part in parts.items()
        }
        columns = [column for column in mine["train"].column_names if column != "category"]
        mine = {key: part.select_columns(columns) for key, part in mine.items()}
        with fused.category(head):
            trainer = RewardTrainer(model=fused, args=stage, train_dataset=mine["train"], processing_class=tokenizer)
            trainer.train()
            if len(mine["test"]):
                together[head] = trainer.evaluate(mine["test"])["eval_accuracy"]
    if categories is not None:
        right = fit_router(fused, tokenizer, parts["train"]["prompt"], parts["train"]["category"])
        print(f"The router sends {right:.0%} of the prompts that it was fitted to where they belong.")

    # Save: config, heads, and every expert as a PEFT adapter
    fused.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"Right on {len(parts['test'])} held-out pairs judged as a whole:")
    for name, accuracy in {
        **{f"{n} alone": a for n, a in alone.items()},
        **{f"fusion, {n}": a for n, a in together.items()},
    }.items():
        print(f"  {name:<24} {accuracy:.1%}")
    loaded = "" if arguments.load_in == "none" else f", load_in={arguments.load_in!r}"
    print(f"Saved to {output}: `RewardFusionModel.from_pretrained({str(output)!r}{loaded})`.")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
