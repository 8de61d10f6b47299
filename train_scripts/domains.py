"""
One expert per domain, trained one after another on a frozen backbone, then a gate that chooses among them.

```bash
python train_scripts/domains.py \
    --domains my_domains \
    --model Qwen/Qwen3-0.6B \
    --r 8 --learning_rate 2e-4 --num_train_epochs 1 \
    --gate token --gate_training labels --gate_steps 200 \
    --output_dir output/domains
```

`my_domains` holds a folder, or a jsonl, csv, parquet or txt file, for each domain. On a CPU with the backbone that comes
with the package: leave `--model` out and add `--max_steps 20`. Every field of TRL's `SFTConfig` is an option; it holds for
each expert. Typed again, the same command goes on where it stopped: a finished expert is left as it is, an interrupted
one goes on from its last checkpoint. `output/domains/experts/<domain>` are plain PEFT LoRAs, `output/domains` the adapter
of them all. A LoRA that comes from elsewhere joins in by `moe_peft.from_loras({"law": folder, ...})`.
"""

import sys


def main(argv: list[str]) -> None:
    from moe_peft.domain_training import main as train_domains  # importing registers the adapter types with PEFT

    train_domains(argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
