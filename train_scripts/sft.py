"""
Supervised fine-tuning of a mixture of LoRA experts, from top to bottom; `moe-peft train` is the same run as a command.

```bash
python train_scripts/sft.py \
    --adapter molora \
    --model Qwen/Qwen3-0.6B \
    --dataset trl-lib/Capybara \
    --eval_split test \
    --learning_rate 1.0e-3 \
    --num_train_epochs 1 \
    --output_dir output/molora
```

On a CPU in a minute, with the backbone that comes with the package:

```bash
python train_scripts/sft.py --adapter mola --dataset my_rows.jsonl --max_steps 20 --output_dir output/mola
```

On several GPUs: `accelerate launch train_scripts/sft.py ...`. Every field of TRL's `SFTConfig` is an option. `--adapter`
is a name of the catalogue, a folder with an `adapter_config.json` or an id on the Hub; `--set r=16` changes a field of it.
"""

import sys


def main(argv: list[str]) -> None:
    from trl import SFTTrainer

    from moe_peft import TaskTypeCollator, init_experts_from_lora  # importing registers the adapter types with PEFT
    from moe_peft.arguments import parse
    from moe_peft.backbone import load_tokenizer
    from moe_peft.saving import checkpoint_to_resume, save_adapter
    from moe_peft.training import load_model, load_rows

    # The method's recipe, then --config, then the command line; what is misspelt anywhere is an error.
    settings = parse(argv, program="python train_scripts/sft.py")
    arguments, training, adapter = settings.arguments, settings.training, settings.source.config

    # Load the rows, in one of TRL's formats; moe_peft/data.py has the table
    tokenizer = load_tokenizer(arguments.model, arguments.tokenizer, trust_remote_code=training.trust_remote_code)
    rows, eval_rows = load_rows(settings, tokenizer)
    print(f"{len(rows.dataset)} rows of {rows.form}: {rows.dataset[0]}")

    # Load the frozen backbone: NF4 with double quantisation unless told otherwise
    model = load_model(settings)

    # Initialize the SFT trainer
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=rows.dataset,
        eval_dataset=None if eval_rows is None else eval_rows.dataset,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.model.print_trainable_parameters()
    if arguments.experts_from:  # Rocket: every expert starts as a trained LoRA; see `moe-peft bank`
        init_experts_from_lora(trainer.model, arguments.experts_from)
    if getattr(adapter, "balance", None) == "localized":  # LoRAMoE: the samples' task types have to reach the model
        trainer.data_collator = TaskTypeCollator(trainer.data_collator)

    # Train the model
    output_dir = settings.output_dir
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training.resume_from_checkpoint, output_dir))

    # Save the adapter: whole, or not at all
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, output_dir)
        tokenizer.save_pretrained(output_dir)
        print(f"Adapter saved to {output_dir}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.dataset)


if __name__ == "__main__":
    main(sys.argv[1:])
