"""MixDA's first stage: a domain is learnt from its text while general text keeps its outputs (arXiv:2306.05406).

    L = weight * L_K + L_S

L_K is the model's own loss on the domain's text (causal or masked). L_S looks at a batch of general text, at each adapted
layer with input z, frozen output F(z) = W z and the adapter's output D(z), over the real tokens:

    "output"  mean |D(z)|^2 / mean |F(z)|^2            the outputs with and without the adapter (the released code)
    "ffn"     mean |D(z) - F(z)|^2 / mean |F(z)|^2     the adapter's output and the FFN's (the paper)

The code compares the outputs behind the LayerNorm, whose size is fixed. Where no norm follows, a size must come from
elsewhere: both are divided by that of the FFN's output. z comes from a pass without gradient, so that a layer answers for
what it adds itself and not for what it does to the inputs of later ones; that makes the loss cost one forward pass.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.errors import nearest, refuse
from moe_peft.routing import routing_dtype
from moe_peft.tuners.bottleneck_moe import BottleneckMoeLinear


DISTANCES = ("output", "ffn")
"""The values of `distance`: that of the released code and that of the paper."""


class OldKnowledgeLoss:
    """`compute_loss_func` for transformers' and TRL's unmodified trainers.

    >>> loss = OldKnowledgeLoss(model, general_rows, collate)  # doctest: +SKIP
    >>> Trainer(model, args, train_dataset=domain_rows, compute_loss_func=loss)  # doctest: +SKIP

    In evaluation it is the model's own loss. General rows are drawn with torch's generator, which a trainer puts back when
    a run is resumed.

    Args:
        model: a `PeftModel` with a `BottleneckMoeConfig` of `gate="none"`, on a model with a head for language modelling.
        rows: general text, tokenised: `{"input_ids": [...]}`.
        collate: from a list of rows to a padded batch; its labels are not used.
        batch_size: rows of general text per forward pass of the trainer.
        weight: of the domain's loss, above 0; the lower, the more the old knowledge counts. 0.5 in the paper.
        distance: "output" or "ffn", see above.

    Raises:
        ValueError: for what cannot be used, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[dict[str, Any]],
        collate: Callable[[list[dict[str, Any]]], Any],
        batch_size: int = 8,
        weight: float = 0.5,
        distance: str = "output",
    ) -> None:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not weight > 0:
            raise refuse(
                "weight", weight, "a number above 0", "MixDA uses 0.5; lower keeps more of the old knowledge."
            )
        if distance not in DISTANCES:
            allowed = "one of " + ", ".join(map(repr, DISTANCES))
            raise refuse("distance", distance, allowed, nearest(str(distance), DISTANCES))
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise refuse("batch_size", batch_size, "a whole number of at least 1", "As many as the trainer's will do.")
        if not len(rows):
            raise refuse(
                "rows", len(rows), "at least one row of general text", "Without any there is nothing to keep."
            )
        for name in getattr(model, "active_adapters", []):
            gate = getattr(getattr(model, "peft_config", {}).get(name), "gate", None)
            if gate != "none":
                remedy = (
                    "In the first stage each domain is alone; the gate is learnt in the second one, without this loss."
                )
                raise refuse("gate", gate, "'none' for the old-knowledge loss", remedy)
        self.model, self.rows, self.collate = model, rows, collate
        self.batch_size, self.weight, self.distance = batch_size, weight, distance

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        size = base.config.get_text_config().vocab_size
        domain = base.loss_function(outputs["logits"], labels, vocab_size=size, num_items_in_batch=num_items_in_batch)
        if not (self.model.training and torch.is_grad_enabled()):
            return domain
        share = 1.0
        if num_items_in_batch is not None:  # so that the micro-batches of one step count 1 together, as for the labels
            counted = labels[:, 1:] if base.can_generate() else labels
            share = (counted != -100).sum() / torch.as_tensor(num_items_in_batch, device=labels.device).clamp(min=1)
        return self.weight * domain + share * self.old_knowledge().to(domain.device)

    def old_knowledge(self) -> Tensor:
        """L_S on a fresh batch of general text, the mean over the adapted layers."""
        chosen = torch.randint(len(self.rows), (self.batch_size,)).tolist()
        batch = self.collate([{"input_ids": self.rows[i]["input_ids"]} for i in chosen])
        device = next(self.model.parameters()).device
        batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        mask = batch.get("attention_mask")
        inputs = self._inputs(batch)
        losses = [self._at(layer, z if mask is None else z[mask.bool()]) for layer, z in inputs.items()]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _inputs(self, batch: dict[str, Tensor]) -> dict[BottleneckMoeLinear, Tensor]:
        """What each adapted layer gets from the batch, `[B, S, d_in]`."""
        found: dict[BottleneckMoeLinear, Tensor] = {}

        def remember(layer: Any, args: tuple[Any, ...]) -> None:
            found[layer] = args[0]

        layers = [m for m in self.model.modules() if isinstance(m, BottleneckMoeLinear) and _has_domains(m)]
        handles = [layer.register_forward_pre_hook(remember) for layer in layers]
        try:
            self.model(**batch)
        finally:
            for handle in handles:
                handle.remove()
        if not found:
            raise ValueError("No active adapter has domains' experts, so there is no old knowledge to keep from them.")
        return found

    def _at(self, layer: BottleneckMoeLinear, z: Tensor) -> Tensor:
        z = z.reshape(-1, z.shape[-1])
        added = torch.zeros((), device=z.device)
        for name in layer.active_adapters:
            if layer.has_domains(name):
                experts = layer.experts(name)
                if hasattr(experts.down, "device_mesh") or not experts.down.numel():
                    raise RuntimeError(
                        "The old-knowledge loss asks the experts outside the model's forward pass, and FSDP or ZeRO-3 has "
                        "put their weights away there. They are small: train this stage with DDP or on one device."
                    )
                output = experts.domains_output(z)
                added = added + output.to(routing_dtype(output.dtype))
        with torch.no_grad():
            frozen = layer.base_layer(z).to(added.dtype)
        target = frozen if self.distance == "ffn" else 0.0
        return (added - target).square().mean() / frozen.square().mean().clamp(min=1e-12)


def _has_domains(layer: BottleneckMoeLinear) -> bool:
    return not layer.disable_adapters and any(layer.has_domains(name) for name in layer.active_adapters)


def text_blocks(texts: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Text as rows of `length` tokens, one document after another, each with the tokenizer's special tokens around it.

    Args:
        texts: documents.
        length: tokens per row; the last row is what is left.

    Raises:
        ValueError: if there is no text.
    """
    joined: list[int] = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        joined += ids if ids and ids[-1] == ends or ends is None else [*ids, ends]
    if not joined:
        raise refuse(
            "texts", len(texts), "at least one document with a token", "A domain without data cannot be learnt."
        )
    return [{"input_ids": joined[at : at + length]} for at in range(0, len(joined), length)]
