"""What `moe-peft shrink` does: load an adapter, cut or group its experts, measure what that costs, print, save."""

import json
import random
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table

from moe_peft.agreement import Agreement
from moe_peft.budget import count_parameters
from moe_peft.errors import nearest, refuse
from moe_peft.export.writer import check_is_free
from moe_peft.loaded import Batch, batches_of, load_adapter
from moe_peft.pruning import SCORES, expert_scores, prune_experts
from moe_peft.recovering import recover
from moe_peft.regrouping import MERGES, SIMILARITIES, group_experts
from moe_peft.report import short_name
from moe_peft.shrinking import ROUTED, SHRUNK, active, measure_shrunk, save_alone


SHRINK_METHODS = ("prune", "group")
RECORD_FILE, RECOVERED = "moe_peft_shrink.json", "recovered"


def shrink_adapter(
    console: Console,
    adapter: str,
    calibration: str,
    output: Path,
    method: str = "prune",
    keep: int | None = None,
    groups: int | None = None,
    by: str | None = None,
    similarity: str | None = None,
    merge: str | None = None,
    recover_steps: int = 0,
    learning_rate: float = 2e-4,
    held_out: str | None = None,
    max_kl: float | None = None,
    limit: int = 512,
    model: str | None = None,
    load_in: str = "4bit",
) -> None:
    """Shrink a routed adapter, measure what it loses on text that nothing was chosen by, save the smaller adapter.

    Raises:
        ValueError: an adapter, model, text or setting that cannot be used, in words; a KL above `max_kl`. Nothing is
            written then.
    """
    chosen = {"keep": keep, "groups": groups, "by": by, "similarity": similarity, "merge": merge}
    _check(method, chosen)
    _check_numbers(recover_steps, learning_rate, max_kl)
    check_is_free(output)
    adapted, tokenizer = load_adapter(adapter, model, load_in)
    text, measured = calibration_and_held_out(calibration, held_out, tokenizer, limit)
    adapted.load_adapter(adapter, SHRUNK)
    lines = _shrink(adapted, text, method, chosen)
    found = {SHRUNK: measure_shrunk(adapted, measured)}
    counts = {name: _parameters(adapted, name) for name in (ROUTED, SHRUNK)}
    if recover_steps:
        recover(adapted, text, recover_steps, learning_rate)
        found[RECOVERED] = measure_shrunk(adapted, measured)
    agreement = list(found.values())[-1]
    console.print(shrink_table(found, counts))
    _print_layers(console, agreement, lines)
    _check_bound(agreement, max_kl)
    record = {
        "adapter": adapter,
        "method": method,
        **{name: value for name, value in chosen.items() if value is not None},
        "calibration": calibration,
        "held_out": held_out,
        "parameters": counts,
        "layers": lines,
        "recover_steps": recover_steps,
        "before_recovery": found[SHRUNK]._asdict() if recover_steps else None,
        **agreement._asdict(),
    }
    own = tokenizer if (Path(adapter).expanduser() / "tokenizer_config.json").is_file() else None
    files = {RECORD_FILE: json.dumps(record, indent=1), **_log_of(adapter)}
    save_alone(adapted, SHRUNK, output, files, own)
    console.print(
        f"Written to {output}: a routed adapter of the same type, with {RECORD_FILE}. Above is what it loses, on "
        f"{agreement.tokens} tokens that nothing was chosen by."
    )


def _log_of(adapter: str) -> dict[str, str]:
    """The log of the run that trained the adapter, where it lies beside it: it says which base was trained on, and how that
    was loaded, which `export` and `bundle` ask for."""
    path = Path(adapter).expanduser() / "training_log.json"
    return {path.name: path.read_text(encoding="utf-8")} if path.is_file() else {}


_OF_METHOD = {"prune": ("keep", "by"), "group": ("groups", "similarity", "merge")}
_WORDS = {"by": SCORES, "similarity": SIMILARITIES, "merge": MERGES}


def _check(method: str, chosen: dict[str, Any]) -> None:
    """Refuse words that there are not, and options of the other method."""
    if method not in SHRINK_METHODS:
        raise refuse("--method", method, " or ".join(map(repr, SHRINK_METHODS)), nearest(method, SHRINK_METHODS))
    for name, value in chosen.items():
        if value is not None and name not in _OF_METHOD[method]:
            allowed = " and ".join(f"`--{option}`" for option in _OF_METHOD[method])
            raise refuse(f"--{name}", value, f"left out with `--method {method}`", f"That takes {allowed}.")
        if value is not None and name in _WORDS and value not in _WORDS[name]:
            raise refuse(f"--{name}", value, " or ".join(map(repr, _WORDS[name])), nearest(value, _WORDS[name]))
    number = _OF_METHOD[method][0]
    if chosen[number] is None:
        doing = "keeps" if method == "prune" else "is left with"
        raise refuse(f"--{number}", None, f"the number of experts that each layer {doing}", "Half is common.")


def _check_numbers(steps: int, learning_rate: float, max_kl: float | None) -> None:
    if steps < 0:
        raise refuse("--recover", steps, "a number of steps of at least 0", "A few hundred are common, 0 is none.")
    if not learning_rate > 0:
        raise refuse("--learning-rate", learning_rate, "a number above 0", "2e-4 is common.")
    if max_kl is not None and not max_kl > 0:
        raise refuse("--max-kl", max_kl, "a number above 0", "0.05 nats is a strict bound.")


def _shrink(adapted: PeftModel, text: list[Batch], method: str, chosen: dict[str, Any]) -> list[dict[str, Any]]:
    """Change the adapter `SHRUNK`; what became of each layer."""
    with active(adapted, SHRUNK):
        if method == "group":
            words = chosen["similarity"] or SIMILARITIES[0], chosen["merge"] or MERGES[0]
            lines = group_experts(adapted, text, chosen["groups"], *words, adapter_name=SHRUNK)
        else:
            scores = expert_scores(adapted, text, chosen["by"] or SCORES[0], SHRUNK)
            lines = prune_experts(adapted, chosen["keep"], scores=scores, adapter_name=SHRUNK)
    return [line._asdict() for line in lines]


def _check_bound(agreement: Agreement, max_kl: float | None) -> None:
    if max_kl is not None and agreement.kl_merged > max_kl:
        raise ValueError(
            f"The shrunk model is {agreement.kl_merged:.4f} nats from the routed one (KL), above `--max-kl` {max_kl}: "
            "nothing was written. Leave more experts, recover longer, or raise the bound."
        )


def calibration_and_held_out(
    calibration: str, held_out: str | None, tokenizer: Any, limit: int
) -> tuple[list[Batch], list[Batch]]:
    """Text to fit on and other text to measure on: what is held out, or a quarter of the calibration text."""
    text = batches_of(calibration, tokenizer, limit=limit)["all"]
    if held_out is not None:
        return text, batches_of(held_out, tokenizer, limit=limit)["all"]
    if len(text) < 2:
        raise ValueError(
            f"`--calibration` gives {len(text)} batch of text, too little to keep a part for measuring. Give more than 8 "
            "rows, or other text with `--held-out`."
        )
    random.Random(0).shuffle(text)
    quarter = max(1, len(text) // 4)
    return text[quarter:], text[:quarter]


def _parameters(adapted: PeftModel, adapter_name: str) -> int:
    """Numbers that the adapter stores."""
    with active(adapted, adapter_name):
        for name, parameter in adapted.named_parameters():
            if f".{adapter_name}." in name and adapted.base_model.prefix in name:
                parameter.requires_grad_(True)  # loaded for inference; counted as trained
        return count_parameters(adapted, adapter_name).trainable


def shrink_table(found: dict[str, Agreement], parameters: dict[str, int]) -> Table:
    """Base, routed and each shrunk model beside each other.

    Args:
        found: name of the row -> what was measured; all on the same text.
        parameters: of "default", the routed adapter, and of "shrunk".
    """
    first = next(iter(found.values()))
    table = Table(title="What shrinking costs", caption=f"on {first.tokens} tokens that nothing was chosen by")
    for title in ("", "parameters", "loss", "KL from routed", "same top token"):
        table.add_column(title, justify="right")
    rows = [("base", 0, first.loss_base, first.kl_base, first.top1_base)]
    rows.append(("routed", parameters[ROUTED], first.loss_routed, 0.0, 1.0))
    rows += [(name, parameters[SHRUNK], a.loss_merged, a.kl_merged, a.top1_merged) for name, a in found.items()]
    for name, count, loss, kl, top1 in rows:
        table.add_row(name, f"{count:,}", f"{loss:.3f}", f"{kl:.3f}", f"{top1:.0%}")
    return table


def _print_layers(console: Console, agreement: Agreement, lines: list[dict[str, Any]]) -> None:
    worst = sorted(agreement.layer_error.items(), key=lambda item: -item[1])[:5]
    if worst:
        console.print("Largest errors: " + ", ".join(f"{short_name(name)} {error:.0%}" for name, error in worst))
    shares = [line["share"] for line in lines if "share" in line]
    if shares:
        console.print(
            f"The experts that stay had {min(shares):.0%} to {max(shares):.0%} of their layers' score or use."
        )
