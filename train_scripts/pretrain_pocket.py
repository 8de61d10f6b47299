"""
Makes the pocket backbone again, from nothing but a seed: about 630 seconds of one CPU core.

    python train_scripts/pretrain_pocket.py --output_dir moe_peft/pocket/weights

Read it top to bottom: the data are `moe_peft.pocket.world`, packed into rows of a fixed length; the model is a small
Llama; Muon trains the matrices and AdamW the rest; the loss counts answers fully and questions a little. One JSON line
is logged every `--log_every` steps, and at the end the model, its tokenizer, its log and its measured accuracies in
fp32 and NF4 are written to `--output_dir`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from moe_peft.pocket.score import exact_match, per_domain
from moe_peft.pocket.tokenizer import make_tokenizer
from moe_peft.pocket.world import (
    PHRASINGS,
    SKILLS,
    SUMS,
    TAGGED_SKILLS,
    Row,
    fact_rows,
    lookup_row,
    make_world,
    random_row,
    skill_row,
    sum_row,
    tagged_row,
)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output_dir", type=Path, required=True, help="where the model is written")
parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the order of the documents")
parser.add_argument("--world_seed", type=int, default=0, help="of the facts; the suites expect 0")
parser.add_argument("--steps", type=int, default=2200)
parser.add_argument("--rows", type=int, default=32, help="rows per step")
parser.add_argument("--row_length", type=int, default=96, help="tokens per row")
parser.add_argument("--hidden_size", type=int, default=128)
parser.add_argument("--num_layers", type=int, default=4)
parser.add_argument("--num_heads", type=int, default=4)
parser.add_argument("--intermediate_size", type=int, default=352)
parser.add_argument("--muon_lr", type=float, default=0.02)
parser.add_argument("--adamw_lr", type=float, default=0.003)
parser.add_argument("--warmup_steps", type=int, default=50)
parser.add_argument("--decay_share", type=float, default=0.6, help="the last share of the steps decays linearly to 0")
parser.add_argument("--prompt_weight", type=float, default=0.05, help="weight of a question's token; an answer's is 1")
parser.add_argument("--num_threads", type=int, default=1)
parser.add_argument("--log_every", type=int, default=100)
args = parser.parse_args()

torch.set_num_threads(args.num_threads)
torch.manual_seed(args.seed)

# ----- Data: documents one after the other, each closed by an end-of-text; a row starts with a document -----

world = make_world(args.world_seed)
tokenizer = make_tokenizer()
token_id = tokenizer.get_vocab()
eos = tokenizer.eos_token_id


def pack_row(rng: random.Random) -> tuple[list[int], list[float]]:
    """`row_length` token ids and their loss weights."""
    tokens: list[int] = []
    weights: list[float] = []
    while len(tokens) < args.row_length:
        row = random_row(world, rng)
        tokens += [token_id[c] for c in row["prompt"] + row["completion"]] + [eos]
        weights += [args.prompt_weight] * len(row["prompt"]) + [1.0] * (len(row["completion"]) + 1)
    return tokens[: args.row_length], weights[: args.row_length]


def held_out_rows(per_task: int = 100, seed: int = 1) -> list[Row]:
    """`per_task` fresh questions of every skill, tag, kind of sum and lookup, and every fact in both phrasings."""
    rng = random.Random(f"held out/{seed}")
    tasks = [lambda s=s: skill_row(rng, s) for s in SKILLS] + [lambda t=t: tagged_row(rng, t) for t in TAGGED_SKILLS]
    tasks += [lambda k=k: sum_row(rng, k) for k in SUMS] + [lambda: lookup_row(rng)]
    rows = [task() for task in tasks for _ in range(per_task)]
    return rows + [row for phrasing in range(len(PHRASINGS)) for row in fact_rows(world, phrasing)]


def accuracies(model: torch.nn.Module, rows: list[Row]) -> dict[str, float]:
    """Exact match per task, between 0 and 1."""
    return {task: round(score, 3) for task, score in per_domain(rows, exact_match(model, tokenizer, rows)).items()}


# ----- Model -----

config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=args.hidden_size,
    intermediate_size=args.intermediate_size,
    num_hidden_layers=args.num_layers,
    num_attention_heads=args.num_heads,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    pad_token_id=tokenizer.pad_token_id,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=eos,
)
model = LlamaForCausalLM(config)
num_parameters = sum(p.numel() for p in model.parameters())

# ----- Training -----

matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if all(p is not m for m in matrices)]
optimizers = [
    torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.01),
    torch.optim.AdamW(others, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
]


def lr_share(step: int) -> float:
    """The share of the full learning rate in use: a linear warm-up, a plateau, a linear decay."""
    return min(1.0, (step + 1) / args.warmup_steps, (args.steps - step) / (args.decay_share * args.steps))


schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_share) for optimizer in optimizers]
rng = random.Random(f"documents/{args.seed}")
quick_rows = held_out_rows(per_task=16, seed=2)
args.output_dir.mkdir(parents=True, exist_ok=True)
log = (args.output_dir / "training_log.jsonl").open("w")
start = time.process_time()

for step in range(args.steps):
    packed = [pack_row(rng) for _ in range(args.rows)]
    tokens = torch.tensor([tokens for tokens, _ in packed])
    weights = torch.tensor([weights for _, weights in packed])[:, 1:]
    logits = model(tokens[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(weights)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if step % args.log_every == 0 or step == args.steps - 1:
        seconds = round(time.process_time() - start, 1)
        entry = {"step": step, "loss": round(loss.item(), 4), "cpu_seconds": seconds}
        if step:
            entry["exact_match"] = accuracies(model, quick_rows)
        print(json.dumps(entry), file=log, flush=True)
        print(json.dumps(entry), flush=True)

# ----- Saving, and measuring what was saved -----

model.generation_config = GenerationConfig(
    do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=eos
)
model.save_pretrained(args.output_dir)
tokenizer.save_pretrained(args.output_dir)

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
rows = held_out_rows()
results = {"parameters": num_parameters, "fp32": accuracies(model, rows)}
quantized = AutoModelForCausalLM.from_pretrained(args.output_dir, quantization_config=nf4, device_map={"": "cpu"})
results["nf4"] = accuracies(quantized, rows)
print(json.dumps(results), file=log, flush=True)
for task, score in results["fp32"].items():
    print(f"| {task} | {score:.2f} | {results['nf4'][task]:.2f} |")
