"""Ten sub-tasks in one answer, each of which needs an expert of its own: is every part answered, and by whom?

    python eval/composite.py                # three seeds; the first run teaches the backbone the form
    python eval/composite.py --seeds 1 --methods token
    python eval/composite.py --report       # trains nothing: the tables of the runs on disk

    A-J|do:abcd;            the question: what ten tags make of one text
    A|do:abcd>bcda          the answer, ten lines, one for each tag
    B|do:abcd>dcba
    ...

The pocket backbone is first taught the form, with the meanings of the tags that it was pre-trained on ("the backbone").
Then every tag gets another meaning, ten domains in conflict with the backbone and with one another, and a LoRA is trained
for each on questions about it alone (`A-A|do:abcd;`), as in MeteoRA (arXiv:2405.13053, its composite-n tasks). No expert
ever sees a question about two tags. Rows:

    backbone       without any adapter, asked for the old meanings: how well it knows the form
    lora           one LoRA of the experts' total rank, on the single questions of all tags
    lora+few       the same, trained on with the few composite questions that "token+few" gets
    told           the experts, each token told the tag of the line that it is about to go on with
    sequence       a gate on the prompt, one expert for all of the answer
    token          a gate per token and linear, taught by labels and loss on single questions
    token+few      the same kind of gate, taught by both on a few composite questions; the experts stay frozen
    all+few        the same, and the experts learn too, as in MeteoRA's released code

A part is right if every token of its line is the most likely one after the right ones before it; an answer if all ten and
the end are, which is when greedy decoding writes it.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

from composite_rows import TAGS, composite, form_rows, meanings, single  # noqa: E402


RESULTS = Path(__file__).parent / "results" / "composite"
FFN = ["gate_proj", "up_proj", "down_proj"]
METHODS = ("backbone", "lora", "lora+few", "told", "sequence", "token", "token+few", "all+few")
RANK, RATE, GATE_RATE, FORM_RATE = 4, 1.5e-3, 2e-2, 1e-3
FORM_STEPS, STEPS, GATE_STEPS = 1800, 150, 600
FEW, TESTED = 200, 64
TOKEN_GATE = {"gate": "token", "gate_training": "both", "router_supervision_coef": 0.03, "top_k": 4}
GATES: dict[str, dict[str, Any]] = {
    "told": {"gate": "given"},
    "sequence": {"gate": "sequence", "gate_training": "labels"},
    "token": TOKEN_GATE,
    "token+few": TOKEN_GATE,
    "all+few": {**TOKEN_GATE, "train_domains": list(TAGS)},
}


class Bench:
    """The backbone that knows the form, and the rows of one seed."""

    def __init__(self, seed: int, folder: Path, form: Path, quick: bool) -> None:
        import torch
        import transformers

        from moe_peft.pocket.world import TAGGED_SKILLS

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        self.seed, self.folder, self.form, self.quick = seed, folder, form, quick
        self.means = meanings(seed)
        rng = random.Random(f"composite/rows/{seed}")
        self.singles = {tag: [single(rng, tag, self.means) for _ in range(600)] for tag in TAGS}
        self.few = [composite(rng, TAGS, self.means) for _ in range(FEW)]
        known = {row["prompt"] for row in self.few}
        tested = (composite(rng, TAGS, self.means) for _ in range(4 * TESTED))
        self.tested = [row for row in tested if row["prompt"] not in known][:TESTED]
        self.of_old = [composite(rng, TAGS, TAGGED_SKILLS) for _ in range(TESTED)]

    def backbone(self) -> Any:
        """In NF4; taught the form first, in fp32 and whole, if nobody has."""
        import torch

        from moe_peft.backbone import load_backbone, load_tokenizer
        from moe_peft.trial import load_pocket

        if not (self.form / "config.json").exists():
            model, self.tokenizer = load_pocket(quantize=False)
            model.requires_grad_(True)
            self.train(model, form_rows((40 if self.quick else FORM_STEPS) * 24), FORM_RATE, FORM_STEPS, batch=24)
            model.save_pretrained(self.form)
            self.tokenizer.save_pretrained(self.form)
        self.tokenizer = load_tokenizer(str(self.form))
        return load_backbone(
            str(self.form), "4bit", "cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float32
        )

    def train(
        self, model: Any, rows: list[Any], rate: float, steps: int, labels: bool = False, batch: int = 32
    ) -> None:
        from moe_peft.trial import TrialSettings, tokenized, train_on

        settings = TrialSettings(rate, 4 if self.quick else steps, batch, self.seed)
        dataset = tokenized(rows, self.tokenizer, list(TAGS) if labels else ())
        if "goes_on" in rows[0]:
            dataset = dataset.map(lambda row: {name: row[name][:-1] for name in ("input_ids", "labels")})
        train_on(model, self.tokenizer, dataset, settings, self.folder)

    def experts(self) -> dict[str, Path]:
        """A LoRA for each tag, trained alone on its single questions; kept for all methods of this seed."""
        from continual import lora_config
        from peft import get_peft_model

        folders = {tag: self.folder / "experts" / tag for tag in TAGS}
        for tag, folder in folders.items():
            if not folder.exists():
                model = get_peft_model(self.backbone(), lora_config(RANK))
                self.train(model, self.singles[tag], RATE, STEPS)
                model.save_pretrained(str(folder))
        return folders

    def all_singles(self) -> list[Any]:
        rows = [row for rows in self.singles.values() for row in rows]
        random.Random(self.seed).shuffle(rows)
        return rows

    def model(self, method: str) -> Any:
        """What `method` ends with."""
        from continual import lora_config
        from peft import get_peft_model

        from moe_peft import from_loras

        if method == "backbone":
            return self.backbone()
        if method.startswith("lora"):
            model = get_peft_model(self.backbone(), lora_config(RANK * len(TAGS)))
            self.train(model, self.all_singles(), RATE, STEPS * len(TAGS) // 2)
            if method == "lora+few":
                self.train(model, self.few, RATE / 3, GATE_STEPS)
            return model
        model = from_loras(self.experts(), self.backbone(), check_base=False, **GATES[method])
        if method.endswith("+few"):
            self.train_by_line(model, self.few)
        elif method != "told":
            self.train(model, self.all_singles(), GATE_RATE, GATE_STEPS, labels=True)
        return model

    def train_by_line(self, model: Any, rows: list[Any], batch: int = 16) -> None:
        """Train what is trainable on loss and labels, where each token has a label of its own: a plain loop, as TRL's
        trainer carries one label for each row."""
        import torch

        ids, targets, lines = encoded(self.tokenizer, rows)
        steps, named = 4 if self.quick else GATE_STEPS, dict(model.named_parameters())
        trained = [p for p in named.values() if p.requires_grad]
        of_gates = [p for name, p in named.items() if p.requires_grad and "router" in name]
        others = [p for name, p in named.items() if p.requires_grad and "router" not in name]
        groups = [{"params": of_gates}, *([{"params": others, "lr": RATE}] if others else [])]
        optimizer = torch.optim.AdamW(groups, lr=GATE_RATE, weight_decay=0.0)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, 10 * (n + 1) / steps) * (1 - n / steps))
        model.train()
        for _ in range(steps):
            chosen = torch.randint(len(ids), (batch,))
            given = {"input_ids": ids[chosen], "labels": targets[chosen], "task_types": next_tags(lines[chosen])}
            given["attention_mask"] = (ids[chosen] != self.tokenizer.pad_token_id).long()
            model(**given).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()

    def parts_right(self, model: Any, rows: list[Any], told: bool = False) -> list[list[bool]]:
        """For each row, whether each line of its answer is right, and its end; `told` says each token's tag to the model."""
        from contextlib import nullcontext

        import torch

        from moe_peft import task_types

        ids, targets, lines = encoded(self.tokenizer, rows)
        types = task_types(model, next_tags(lines)[:, :-1]) if told else nullcontext()
        model.eval()
        with torch.no_grad(), types:  # the labels say where the prompt ends
            given = {"input_ids": ids[:, :-1], "labels": targets[:, :-1]}
            given["attention_mask"] = (given["input_ids"] != self.tokenizer.pad_token_id).long()
            predicted = model(**given, use_cache=False).logits.argmax(-1)
        wrong = (predicted != targets[:, 1:]) & (targets[:, 1:] != -100)
        return [
            [not bool((w & (line[1:] == n)).any()) for n in range(len(TAGS) + 1)]
            for w, line in zip(wrong, lines, strict=True)
        ]


def next_tags(lines: Any) -> Any:
    """The place of the tag whose line the token after each one is of, `[B, S]`; the ends count as the first and last."""
    import torch

    return torch.cat((lines[:, 1:], lines[:, -1:]), dim=1).clamp(0, len(TAGS) - 1)


def encoded(tokenizer: Any, rows: list[Any]) -> tuple[Any, Any, Any]:
    """Ids, labels and the number of the line that each token belongs to (-1 in the prompt, 10 for the end), right-padded `[B, S]`."""
    import torch

    found = []
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer, line = [], []
        for number, part in enumerate(row["completion"].splitlines(keepends=True)):
            more = tokenizer(part, add_special_tokens=False)["input_ids"]
            answer, line = answer + more, line + [number] * len(more)
        answer, line = [*answer, tokenizer.eos_token_id], [*line, len(TAGS)]
        found.append((prompt + answer, [-100] * len(prompt) + answer, [-1] * len(prompt) + line))
    longest = max(len(ids) for ids, _, _ in found)
    pads = (tokenizer.pad_token_id, -100, -1)
    columns = zip(*found, strict=True)
    return tuple(
        torch.tensor([x + [pad] * (longest - len(x)) for x in c]) for c, pad in zip(columns, pads, strict=True)
    )


def traced(bench: Bench, model: Any) -> dict[str, Any]:
    """One composite question, what the model writes, and which expert led each token of it."""
    from moe_peft import expert_trace

    row = bench.tested[0]
    trace = expert_trace(model, bench.tokenizer, row["prompt"], max_new_tokens=160)
    return {
        "prompt": row["prompt"],
        "wanted": row["completion"],
        "answer": "".join(trace.tokens),
        "tokens": trace.tokens,
        "experts": trace.answered(),
        "shares": [round(share, 3) for share in trace.shares().amax(-1).tolist()],
    }


def run(method: str, bench: Bench) -> dict[str, Any]:
    """Scores of one method on one seed."""
    import torch

    torch.manual_seed(bench.seed)
    model = bench.model(method)
    rows = bench.of_old if method == "backbone" else bench.tested
    right = bench.parts_right(model, rows, told=method == "told")
    found: dict[str, Any] = {
        "method": method,
        "seed": bench.seed,
        "meanings": bench.means,
        "parts": statistics.mean(part for row in right for part in row[: len(TAGS)]),
        "answers": statistics.mean(all(row) for row in right),
        "by_tag": {tag: statistics.mean(row[n] for row in right) for n, tag in enumerate(TAGS)},
    }
    if method.startswith(("token", "all")):
        found["trace"] = traced(bench, model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument(
        "--form", type=Path, help="folder of the backbone that knows the form; made if it is not there"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps each: does everything run?")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        form = options.form or Path(scratch, "form")
        for seed in range(0 if options.report else options.seeds):
            bench = Bench(seed, Path(scratch, str(seed)), form, options.quick)
            for method in options.methods:
                if not any((one["method"], one["seed"]) == (method, seed) for one in done):
                    done.append(run(method, bench))
                    with path.open("a") as file:
                        file.write(json.dumps(done[-1]) + "\n")
                    print(f"seed {seed}, {method}: {done[-1]['parts']:.2f} of the parts", flush=True)
    if not done:
        raise SystemExit(f"{path} holds no runs; run without --report first.")
    from composite_report import write_report

    print(write_report(done, options.output, TAGS, METHODS))


if __name__ == "__main__":
    main()
