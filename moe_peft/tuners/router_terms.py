"""From a config to what keeps its routers' experts in use: the balance losses as one gradient."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moe_peft.attach import BalanceGradient, MicroBatch, RouterState, localized_step, loss_step, switch_step
from moe_peft.balance import switch_gradient
from moe_peft.balance_terms import cv2_loss, information_loss, label_gradient, sequence_loss, token_entropy
from moe_peft.config import MoeConfig
from moe_peft.routing import RoutingRule
from moe_peft.row_types import no_rows, no_task_types
from moe_peft.rules import null_pooled, switch_gradient_sigmoid, z_gradient


class Terms(NamedTuple):
    """What keeps the experts of a router in use; the attributes are those of `Router`."""

    balances_load: bool
    balances_bias: bool
    needs_task_types: bool
    coef: float
    gradient: BalanceGradient | None
    bias_update_speed: float
    target_active: float | None


# --- the balance ---


def balance_terms(config: MoeConfig, num_null: int) -> Terms:
    """All losses on the router's logits that the config asks for, as one gradient with one weight."""
    coef = config.router_aux_loss_coef if config.balance not in ("none", "bias") else 0.0
    parts = [(coef, _gradient(config, num_null))]
    parts += [(config.router_z_loss_coef, _z_step), (config.router_entropy_coef, loss_step(_entropy))]
    if getattr(config, "supervised", False):
        parts.append((config.router_supervision_coef, _label_step))
    used = tuple((weight, step) for weight, step in parts if weight and step is not None)
    gradient: BalanceGradient | None = partial(_weighted_sum, terms=used)
    if len(used) < 2:
        coef, gradient = used[0] if used else (coef, parts[0][1])
    return Terms(
        balances_load=config.balance == "switch",
        balances_bias=config.balance == "bias",
        needs_task_types=config.balance == "localized" and config.router_aux_loss_coef > 0,
        coef=1.0 if len(used) > 1 else coef,
        gradient=gradient,
        bias_update_speed=config.bias_update_speed,
        target_active=config.target_active,
    )


def _gradient(config: MoeConfig, num_null: int) -> BalanceGradient | None:
    if config.balance == "localized":
        return localized_step(config.balance_delta)
    if config.balance in ("switch", "switch_local"):
        return _load_gradient(config, num_null)
    losses = {"sequence": _sequence, "cv2": _cv2, "mi": _information}
    return loss_step(losses[config.balance]) if config.balance in losses else None


def _load_gradient(config: MoeConfig, num_null: int) -> BalanceGradient:
    sigmoid = config.routing == "sigmoid_top_k" or config.scoring_func == "sigmoid"
    weights = None if config.balance_weights is None else tuple(config.balance_weights)
    if config.balance == "switch" and not sigmoid and not num_null and weights is None:
        return switch_step
    return partial(_load_step, window=config.balance == "switch", sigmoid=sigmoid, num_null=num_null, weights=weights)


def _load_step(
    state: RouterState,
    batch: MicroBatch,
    rule: RoutingRule,
    top_k: int,
    window: bool,
    sigmoid: bool,
    num_null: int,
    weights: tuple[float, ...] | None,
) -> Tensor:
    """The Switch gradient in its variants: over a window or this micro-batch alone, for sigmoid scores, with null experts
    that count alike (AdaMoE), with a weight for each expert (MoE++'s eta)."""
    counts = null_pooled(batch.counts, len(batch.counts) - num_null)
    load = state.updated_load(counts) if window else counts / counts.sum().clamp(min=1)
    if weights is not None:
        load = load * load.new_tensor(weights)
    if sigmoid:
        return switch_gradient_sigmoid(batch.routing.router_logits, batch.real, load)
    return switch_gradient(batch.routing.router_logits, batch.real, load, batch.probs)


def _cv2(logits: Tensor, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return cv2_loss(rule(logits, top_k), batch.real)


def _sequence(logits: Tensor, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return sequence_loss(rule(logits, top_k), _rows(batch, "sequence"), batch.real)


def _information(logits: Tensor, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    types, tokens = batch.task_types, logits.shape[0]
    if types is None:
        rows = _rows(batch, "mi")
        groups = torch.arange(rows, device=logits.device)
    else:
        rows, groups = int(types.max()) + 1, types.reshape(-1)
    groups = groups.unsqueeze(-1).expand(-1, tokens // groups.numel()).reshape(-1)
    return information_loss(logits, groups.to(logits.device), rows, batch.real)


def _rows(batch: MicroBatch, balance: str) -> int:
    if not batch.rows or batch.routing.router_logits.shape[0] % batch.rows:
        raise no_rows(balance)
    return batch.rows


def _entropy(logits: Tensor, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return token_entropy(logits, batch.real)


def _z_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    return z_gradient(batch.routing.router_logits, batch.real)


def _label_step(state: RouterState, batch: MicroBatch, rule: RoutingRule, top_k: int) -> Tensor:
    """The gradient of the labels' cross-entropy, a mean over the tokens and over the routers that learn from it."""
    types, logits = batch.task_types, batch.routing.router_logits
    if types is None:
        raise no_task_types("gate_training", "labels", "'loss'")
    labels = types.reshape(-1).to(logits.device)
    labels = labels.repeat_interleave(logits.shape[0] // labels.shape[0])
    return label_gradient(logits, labels, batch.real) / state.routers


def _weighted_sum(
    state: RouterState,
    batch: MicroBatch,
    rule: RoutingRule,
    top_k: int,
    terms: tuple[tuple[float, BalanceGradient], ...],
) -> Tensor:
    """Several losses as one."""
    return torch.stack([coef * step(state, batch, rule, top_k) for coef, step in terms]).sum(0)
