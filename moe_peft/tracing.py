"""Which expert answered: the routers' decisions behind each token of an answer, for a person to read.

The decision behind a token is the one at the position before it, where the token was predicted.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.table import Table
from torch import Tensor

from moe_peft.errors import refuse
from moe_peft.report import short_name
from moe_peft.routing import Routing, dense_weights
from moe_peft.routing_control import seeing
from moe_peft.routing_places import places_of


NOTHING = "-"
"""What a token is said to be answered by where no expert has any weight: null experts, or holes."""


class ExpertTrace(NamedTuple):
    """An answer and who gave it.

    Attributes:
        tokens: of the answer, as text.
        experts: their names; layers with fewer have the first of them.
        layers: names of the layers whose routers decide.
        weights: `[layers, tokens, experts]`, what multiplied each expert's output.
    """

    tokens: list[str]
    experts: list[str]
    layers: list[str]
    weights: Tensor

    def shares(self, layer: str | None = None) -> Tensor:
        """Each expert's share of a token's weight, `[tokens, experts]`, summing to 1 or, with no expert at all, 0.

        Args:
            layer: one of `layers`; None is the mean over all.
        """
        if layer is not None and layer not in self.layers:
            raise refuse(
                "layer", layer, f"one of the {len(self.layers)} layers, such as {self.layers[0]!r}", "See `layers`."
            )
        weights = self.weights if layer is None else self.weights[self.layers.index(layer)].unsqueeze(0)
        total = weights.sum(-1, keepdim=True)
        return torch.where(total > 0, weights / total, 0.0).mean(0)

    def answered(self, layer: str | None = None) -> list[str]:
        """The expert with the largest share, for each token."""
        shares = self.shares(layer)
        best = shares.argmax(-1).tolist()
        return [self.experts[e] if shares[t, e] > 0 else NOTHING for t, e in enumerate(best)]

    def parts(self, layer: str | None = None) -> list[tuple[str, str, float]]:
        """`(expert, text, mean share)` of each run of tokens with one expert."""
        shares, runs = self.shares(layer).amax(-1).tolist(), []
        for name, text, share in zip(self.answered(layer), self.tokens, shares, strict=True):
            if runs and runs[-1][0] == name:
                runs[-1] = (name, runs[-1][1] + text, [*runs[-1][2], share])
            else:
                runs.append((name, text, [share]))
        return [(name, text, sum(some) / len(some)) for name, text, some in runs]

    def table(self, layer: str | None = None, by_token: bool = False) -> Table:
        """For a terminal: a row for each part of the answer, or each token of it."""
        where = f"{len(self.layers)} routers" if layer is None else short_name(layer)
        table = Table(title=f"Which expert answered ({where})", show_lines=False)
        for title in ("expert", "share", "answer"):
            table.add_column(title, justify="right" if title == "share" else "left", overflow="fold")
        rows = self.parts(layer)
        if by_token:
            shares = self.shares(layer).amax(-1).tolist()
            rows = list(zip(self.answered(layer), self.tokens, shares, strict=True))
        for name, text, share in rows:
            table.add_row(name, f"{100 * share:.0f} %", repr(text)[1:-1])
        return table


@torch.no_grad()
def expert_trace(
    model: PeftModel,
    tokenizer: Any,
    prompt: str | Tensor | list[int],
    answer: str | Tensor | list[int] | None = None,
    adapter_name: str = "default",
    **generate: Any,
) -> ExpertTrace:
    """Which expert answered which token of the answer to a prompt.

    Args:
        model: with the adapter active. Blocks of `moe_peft.routing` hold.
        tokenizer: of the base model.
        prompt: text or token ids.
        answer: text or token ids whose trace is wanted; None lets the model generate one, greedily unless `generate` says
            otherwise.
        generate: for `model.generate`, such as `max_new_tokens=64`; `domain` is one of them.

    Raises:
        ValueError: if the adapter does not route, or prompt or answer have no token.
    """
    prompt_ids, was_training = _ids(tokenizer, prompt, "prompt"), model.training
    domain = generate.pop("domain", None)
    model.eval()
    try:
        if answer is None:
            whole = _answered(model, prompt_ids, {**generate, **({} if domain is None else {"domain": domain})})
        else:
            more = tokenizer(answer, add_special_tokens=False)["input_ids"] if isinstance(answer, str) else answer
            whole = torch.cat((prompt_ids, _ids(tokenizer, more, "answer")))
        decided = _decisions(model, whole, len(prompt_ids), adapter_name, domain)
    finally:
        model.train(was_training)
    start = len(prompt_ids)
    names = max((place.names for place, _ in decided), key=len)
    weights = torch.zeros(len(decided), len(whole) - start, len(names))
    for row, (place, seen) in enumerate(decided):
        weights[row, :, : len(place.names)] = seen[start - 1 : -1, : len(place.names)].float().cpu()
    tokens = [tokenizer.decode([token]) for token in whole[start:].tolist()]
    return ExpertTrace(tokens, list(names), [place.layer for place, _ in decided], weights)


def _ids(tokenizer: Any, text: Any, field: str) -> Tensor:
    ids = torch.as_tensor(tokenizer(text)["input_ids"] if isinstance(text, str) else text).reshape(-1)
    if not len(ids):
        raise refuse(field, text, "at least one token", "Without one there is nothing to trace.")
    return ids.long().cpu()


def _answered(model: PeftModel, prompt: Tensor, generate: dict[str, Any]) -> Tensor:
    """Prompt and generated answer, one row."""
    device = next(model.parameters()).device
    row = prompt.unsqueeze(0).to(device)
    settings = {"do_sample": False, **generate}
    whole = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **settings)[0].cpu()
    if len(whole) == len(prompt):
        raise refuse("answer", None, "at least one token", "The model generated none: raise `max_new_tokens`.")
    return whole


def _decisions(
    model: PeftModel, whole: Tensor, prompt: int, adapter_name: str, domain: Any
) -> list[tuple[Any, Tensor]]:
    """Each deciding router of the adapter, and its weights `[S, N]` in one pass over prompt and answer."""
    places = {id(place.router): place for place in places_of(model, adapter_name)}
    seen: dict[int, Tensor] = {}

    def see(router: Any, routing: Routing) -> None:
        if id(router) in places:  # a router of the model is asked by every layer, with one answer
            seen[id(router)] = dense_weights(routing)

    row = whole.unsqueeze(0).to(next(model.parameters()).device)
    more: dict[str, Any] = {} if domain is None else {"domain": domain}
    if any(getattr(place.router, "by_sequence", False) for place in places.values()):
        more["prompt_mask"] = (torch.arange(len(whole)) < prompt).unsqueeze(0).to(row.device)
    with seeing(model, see):
        model(input_ids=row, **more)
    return [(places[key], weights) for key, weights in seen.items()]
