"""Which of the exported LoRAs answers a prompt, decided from the prompt's input embeddings alone: read off the adapter's
own router where the model has one router that looks at nothing else, or fitted to labelled text.

A selector is a file of tensors and a file of words; `moe_peft/serving/client.py` reads both without torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_peft.errors import nearest, refuse
from moe_peft.merge import routed_layers
from moe_peft.serving.client import FINGERPRINT_ROWS, FORMAT, fingerprint


KINDS = ("prototypes", "logistic")
"""How `fit_selector` tells the domains apart."""


class Selector(NamedTuple):
    """A classifier of prompts.

    Attributes:
        kind: "linear", or "distance" to prototypes.
        pool: "mean" or "max" of the prompt's embeddings.
        weight: `[E, d]`.
        bias: `[E]` or None.
        log_softmax: whether the threshold is one on log-probabilities.
        null_threshold: the score below which a prompt goes to the base model, or None.
        fitted: to labelled text, rather than the adapter's own router.
        exact: whether the chosen LoRA computes what the adapter computes for that prompt.
    """

    kind: str
    pool: str
    weight: Tensor
    bias: Tensor | None = None
    log_softmax: bool = False
    null_threshold: float | None = None
    fitted: bool = False
    exact: bool = False

    def scores(self, pooled: Tensor) -> Tensor:
        """`[T, E]` of pooled embeddings `[T, d]`."""
        if self.kind == "distance":
            return -torch.cdist(pooled, self.weight)
        logits = pooled @ self.weight.T + (0 if self.bias is None else self.bias)
        return logits.log_softmax(-1) if self.log_softmax else logits


def selector_of(model: PeftModel, adapter_name: str = "default") -> Selector | None:
    """The adapter's own choice, where a prompt's embeddings decide it for the whole model; else None.

    Its best expert is that of the router. Under a rule that mixes several the LoRA of the best one is a part of what the
    adapter computes, and `exact` says so.

    Raises:
        ValueError: if the router looks at the embeddings in a way that no linear classifier does.
    """
    config: Any = model.peft_config[adapter_name]
    layers = routed_layers(model, adapter_name)
    routers = [e for layer in layers.values() if getattr(e := layer.experts(adapter_name), "router", None) is not None]
    gate = getattr(config, "gate", None)
    if gate in ("sequence", "prototype"):
        return _of_gate(routers[0], gate)
    whole = getattr(config, "router_scope", "linear") == "model" and config.router_granularity == "sequence"
    if not whole or not routers:
        return None
    fields = {"scoring_func": "cosine", "router_act": None, "num_null_experts": 0, "balance": "bias"}
    for field, usual in fields.items():
        value = getattr(config, field)
        if (value == usual) if isinstance(usual, str) else (value != usual):
            allowed = "another for a selector that reads the prompt's mean embedding alone"
            raise refuse(
                field, value, allowed, "Fit a selector to labelled text: `fit_selector`, or `--data` and `--by`."
            )
    router = routers[0]
    weight = router.router.detach().float() * router.router_scale
    bias = None if router.router_bias is None else router.router_bias.detach().float() * router.router_scale
    exact = config.routing in ("top_1_hard", "top_1_straight_through")
    keep = router.num_rows  # constant experts stand behind
    return Selector("linear", "mean", weight[:keep], None if bias is None else bias[:keep], exact=exact)


def _of_gate(router: Any, gate: str) -> Selector:
    """Of `domain_moe`: SteloCoder's gate on the maximum, or the nearest mean embedding."""
    weight, threshold = router.router.detach().float(), float(router.null_threshold)
    null = threshold if threshold > float("-inf") else None
    if gate == "prototype":
        return Selector("distance", "mean", weight, None, False, null, exact=True)
    return Selector("linear", "max", weight, None, True, null, exact=True)


@torch.no_grad()
def pooled_embeddings(
    model: PeftModel, tokenizer: Any, texts: Sequence[str], pool: str = "mean", max_length: int = 4096
) -> Tensor:
    """The input embeddings of each text, averaged or max-pooled over its tokens, `[T, d]` in fp32."""
    embeddings = embedding_layer(model)
    rows = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"][:max_length], device=embeddings.weight.device)
        vectors = embeddings(ids).float()
        rows.append(vectors.amax(0) if pool == "max" else vectors.mean(0))
    return torch.stack(rows).cpu()


def fit_selector(
    model: PeftModel,
    tokenizer: Any,
    texts_by_domain: Mapping[str, Sequence[str]],
    kind: str = "prototypes",
    adapter_name: str = "default",
    null_share: float | None = None,
    weight_decay: float = 1e-3,
) -> Selector:
    """A selector for adapters whose own gate decides for each token, from prompts of each domain.

    Args:
        model: with the adapter; only its embedding table and its experts' names are read.
        tokenizer: of the base model.
        texts_by_domain: expert's name -> prompts, for each expert.
        kind: "prototypes", the mean of each domain's mean embeddings; "logistic", multinomial logistic regression on
            mean embeddings, standardised, by LBFGS.
        null_share: sets the threshold below which a prompt goes to the base model so that this share of the given
            prompts would; None sets none.
        weight_decay: of the regression.

    Raises:
        ValueError: fewer than two domains, names that are not the experts', a domain without text, an unknown kind, or a
            share that is not from 0 to below 1.
    """
    names = expert_names(model, adapter_name)
    if kind not in KINDS:
        raise refuse("kind", kind, "one of " + ", ".join(map(repr, KINDS)), nearest(str(kind), KINDS))
    if null_share is not None and not 0 <= null_share < 1:
        raise refuse(
            "null_share", null_share, "from 0 to below 1", "0.05 sends a twentieth of such prompts to the base."
        )
    _check_domains(texts_by_domain, names)
    groups = [pooled_embeddings(model, tokenizer, texts_by_domain[name]) for name in names]
    x = torch.cat(groups)
    y = torch.cat([torch.full((len(group),), number) for number, group in enumerate(groups)])
    if kind == "prototypes":
        selector = Selector("distance", "mean", torch.stack([group.mean(0) for group in groups]), fitted=True)
    else:
        weight, bias = _logistic(x, y, len(names), weight_decay)
        selector = Selector("linear", "mean", weight, bias, log_softmax=True, fitted=True)
    if null_share is None:
        return selector
    return selector._replace(null_threshold=float(selector.scores(x).amax(-1).quantile(null_share)))


def _check_domains(texts: Mapping[str, Sequence[str]], names: list[str]) -> None:
    if len(names) < 2:
        raise refuse(
            "texts_by_domain", list(texts), "of an adapter with at least two experts", "One needs no selector."
        )
    for name in texts:
        if name not in names:
            raise refuse("texts_by_domain", name, "one of " + ", ".join(map(repr, names)), nearest(str(name), names))
    for name in names:
        if not texts.get(name):
            raise refuse(
                "texts_by_domain", f"empty for {name!r}", "some prompts for each expert", "A dozen is enough."
            )


def _logistic(x: Tensor, y: Tensor, classes: int, weight_decay: float) -> tuple[Tensor, Tensor]:
    """Weights `[E, d]` and bias `[E]`, for x as it is."""
    mean, spread = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    z = ((x - mean) / spread).double()
    weight = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        steps.zero_grad()
        value = nn.functional.cross_entropy(z @ weight.T + bias, y) + weight_decay * weight.square().sum()
        value.backward()
        return value

    steps.step(loss)  # type: ignore[arg-type]
    raw = weight.detach() / spread.double()
    return raw.float(), (bias.detach() - raw @ mean.double()).float()


def expert_names(model: PeftModel, adapter_name: str = "default") -> list[str]:
    """The names of the exported LoRAs: those of the domains, or "expert0", "expert1" ..."""
    layers = routed_layers(model, adapter_name).values()
    names = max((layer.expert_names(adapter_name) for layer in layers), key=len)
    return [f"expert{name}" if name.isdigit() else name for name in names]


def embedding_layer(model: PeftModel) -> Any:
    """The base model's input embeddings.

    Raises:
        ValueError: if it has none that are a plain table, with or without a factor.
    """
    layer = model.get_base_model().get_input_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        allowed = "a table of input embeddings for a selector"
        raise refuse("base_model", type(layer).__name__, allowed, "Export without one: `selector=None`.")
    return layer


def describe(model: PeftModel, selector: Selector, names: list[str], base_model: str | None) -> dict[str, Any]:
    """What `router.json` says.

    Raises:
        ValueError: if the embeddings are more than a table times a number.
    """
    layer = embedding_layer(model)
    weight = layer.weight.detach()
    scale = float(getattr(layer, "embed_scale", 1.0))
    count = min(len(weight), FINGERPRINT_ROWS)
    ids = torch.arange(count, device=weight.device) * len(weight) // count
    rows = weight[ids]
    with torch.no_grad():
        plain = torch.allclose(layer(ids).float(), (rows * scale).float(), rtol=1e-2, atol=1e-6)
    if not plain:
        allowed = "a table of input embeddings, times a number"
        raise refuse("base_model", type(layer).__name__, allowed, "Export without a selector.")
    key = next(name for name, value in model.get_base_model().named_parameters() if value is layer.weight)
    return {
        "format": FORMAT,
        "adapters": names,
        "base_model": base_model,
        "kind": selector.kind,
        "pool": selector.pool,
        "log_softmax": selector.log_softmax,
        "null_threshold": selector.null_threshold,
        "fitted": selector.fitted,
        "exact": selector.exact,
        "embedding": {
            "key": key,
            "shape": list(weight.shape),
            "scale": scale,
            "fingerprint": fingerprint(rows.float().cpu().numpy(), tuple(weight.shape)),
        },
    }


def write_selector(selector: Selector, about: dict[str, Any], folder: Path) -> None:
    """`router.safetensors` and `router.json` in `folder`."""
    tensors = {"weight": selector.weight.float().cpu().contiguous()}
    if selector.bias is not None:
        tensors["bias"] = selector.bias.float().cpu().contiguous()
    save_file(tensors, folder / "router.safetensors", metadata={"format": "pt"})
    (folder / "router.json").write_text(json.dumps(about, indent=1))
