"""
What MixDA's old-knowledge loss keeps: one domain learnt with it and without it, by a decoder and an encoder.

    python eval/old_knowledge.py                  # the pocket backbone, and a small RoBERTa trained here first: minutes

General text is the pocket backbone's own world; the domain is the text of the suite `fact8tag`, whose answers contradict
it. Every run has the same steps, rows and start. Printed for each: the loss on held-out text of both kinds whenever it is
measured, and at the end the general loss at the lowest domain loss that every run reached (interpolated).
"""

import argparse
import json
import random
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import (
    DataCollatorForLanguageModeling,
    RobertaConfig,
    RobertaForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from moe_peft import BottleneckMoeConfig
from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.old_knowledge import OldKnowledgeLoss
from moe_peft.pocket import make_suite, make_world
from moe_peft.pocket.tokenizer import make_tokenizer
from moe_peft.pocket.world import random_row


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400)
parser.add_argument("--rows", type=int, default=32, help="per step, of each kind")
parser.add_argument("--every", type=int, default=50, help="steps between measurements")
parser.add_argument("--learning_rate", type=float, default=3e-3)
parser.add_argument("--bottleneck_size", type=int, default=64)
parser.add_argument("--pretrain_steps", type=int, default=1500, help="of the encoder")
parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.05], help="of the domain's loss")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--only", choices=("decoder", "encoder"))
parser.add_argument("--output", type=Path, help="a JSON file for every figure")
args = parser.parse_args()
torch.set_num_threads(1)


def tokenised(rows, tokenizer):
    end = tokenizer.eos_token_id
    return [{"input_ids": [*tokenizer(r["prompt"] + r["completion"])["input_ids"], end]} for r in rows]


class EvenMask:
    """The same masks at every measurement."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, rows):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return self.collate(rows)


@torch.no_grad()
def loss_on(model, rows, collate) -> float:
    training = model.training
    model.eval()
    losses = [model(**collate(rows[i : i + 64])).loss.item() for i in range(0, len(rows), 64)]
    model.train(training)
    return sum(losses) / len(losses)


class Measure(TrainerCallback):
    def __init__(self, domain, general, collate):
        self.domain, self.general, self.collate, self.found = domain, general, EvenMask(collate), []

    def on_step_end(self, arguments, state, control, model=None, **kwargs):
        if state.global_step % args.every == 0:
            pair = tuple(loss_on(model, rows, self.collate) for rows in (self.domain, self.general))
            self.found.append((state.global_step, *pair))


def fit(model, rows, collate, steps, learning_rate, loss=None, callbacks=()):
    arguments = TrainingArguments(
        "/tmp", max_steps=steps, per_device_train_batch_size=args.rows, learning_rate=learning_rate, warmup_steps=20,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", weight_decay=0.05,
    )  # fmt: skip
    Trainer(model, arguments, collate, rows, compute_loss_func=loss, callbacks=list(callbacks)).train()


def at(curve, domain_loss: float) -> float:
    """The general loss where the domain loss first falls to this, between two measurements."""
    for (_, d0, g0), (_, d1, g1) in zip(curve, curve[1:], strict=False):
        if d0 >= domain_loss >= d1:
            return g0 + (g1 - g0) * (d0 - domain_loss) / max(d0 - d1, 1e-9)
    return curve[-1][2]


def world_rows(seed, count):
    rng, world = random.Random(seed), make_world()
    return [random_row(world, rng) for _ in range(count)]


def compare(kind, make_model, tokenizer, collate, seed):
    suite = make_suite("fact8tag", seed)
    domain, domain_test = tokenised(suite.train, tokenizer), tokenised(suite.test[:256], tokenizer)
    general, general_test = (tokenised(world_rows(s, n), tokenizer) for s, n in ((11 + seed, 2000), (99, 512)))
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    runs = {"without": (None, None)} | {f"{d}, {w}": (d, w) for d in ("output", "ffn") for w in args.weights}
    curves = {}
    for label, (distance, weight) in runs.items():
        base = make_model()
        set_seed(seed)
        model = get_peft_model(
            base, BottleneckMoeConfig(domains=["facts"], gate="none", bottleneck_size=args.bottleneck_size)
        )
        start = [(0, *(loss_on(model, rows, EvenMask(collate)) for rows in (domain_test, general_test)))]
        loss = None
        if distance is not None:
            loss = OldKnowledgeLoss(model, general, pad, args.rows, weight, distance)
        measure = Measure(domain_test, general_test, collate)
        set_seed(seed)
        fit(model, domain, collate, args.steps, args.learning_rate, loss, [measure])
        curves[label] = start + measure.found
    reached = max(min(d for _, d, _ in curve) for curve in curves.values())
    print(
        f"\n{kind}, seed {seed}: general loss before {curves['without'][0][2]:.3f}, domain {curves['without'][0][1]:.3f}"
    )
    for label, curve in curves.items():
        print(
            f"  {label:14s} end: domain {curve[-1][1]:.3f} general {curve[-1][2]:.3f};  at domain {reached:.3f}: general "
            f"{at(curve, reached):.3f}",
            flush=True,
        )
    return {"kind": kind, "seed": seed, "reached": reached, "curves": curves}


def pretrained_encoder():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    set_seed(0)
    config = RobertaConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, vocab_size=len(tokenizer),
        max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    fit(model, tokenised(world_rows(5, 20000), tokenizer), collate, args.pretrain_steps, 2e-3)
    return model, tokenizer, collate


results = []
if args.only != "encoder":
    tokenizer = load_tokenizer("pocket")
    for seed in args.seeds:
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        results.append(compare("decoder", lambda: load_backbone("pocket", "none", "cpu"), tokenizer, collate, seed))
if args.only != "decoder":
    encoder, tokenizer, collate = pretrained_encoder()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}

    def make_encoder():
        model = RobertaForMaskedLM(encoder.config)
        model.load_state_dict(state)
        return model

    for seed in args.seeds:
        results.append(compare("encoder", make_encoder, tokenizer, collate, seed))
if args.output is not None:
    args.output.write_text(
        json.dumps({"settings": {**vars(args), "output": str(args.output)}, "runs": results}, indent=1)
    )
