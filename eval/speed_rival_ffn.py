"""The rival's mixture of FFN blocks, as its two released packages compute it, beside today's torch.

- `moe-peft` 2.0.2 has two ways to send tokens to experts, which it calls efficient and compatible.
- `mixlora` 0.2.3 has one, the efficient one again. It is made for inference, but can be trained through.

Each runs in a process of its own, that of `speed_rival.py`. In their favour: dropout, which they force to be above 0,
is set to 0 after construction, and the router loss is left out. `moe-peft` keeps factors and router in fp32 whatever
the model's dtype; `mixlora` is given that of the model.
"""

import torch
from speed_shared import DTYPES, EXPERTS, FFN_LINEARS, RANK, TOP_K, FfnCase, make_experts, make_ffn_linears, make_mlp
from torch import Tensor, nn


SETTINGS = {"r": RANK, "lora_alpha": RANK, "lora_dropout": 0.05, "target_modules": FFN_LINEARS}
MIXTURE = {"routing_strategy": "mixlora", "num_experts": EXPERTS, "top_k": TOP_K, "act_fn": "silu"}


class RivalBlock(nn.Module):
    """What both packages have: per linear the experts' factors, and a router.

    Attributes:
        factors: by linear, each expert's weights of A `[r, d_in]` and B `[d_out, r]`.
        router: `[E, d]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.factors: dict[str, list[tuple[nn.Parameter, nn.Parameter]]] = {}
        self.router: nn.Parameter

    @torch.no_grad()
    def fill(self, weights: dict[str, Tensor]) -> None:
        """The weights that all contenders have."""
        self.router.copy_(weights["router"])
        for name, experts in self.factors.items():
            for number, (A, B) in enumerate(experts):
                A.copy_(weights[f"{name}.A"][number])
                B.copy_(weights[f"{name}.B"][number].T)

    def trained(self) -> list[nn.Parameter]:
        """They stand in plain dicts, where `parameters()` does not look."""
        return [self.router, *(p for experts in self.factors.values() for pair in experts for p in pair)]

    def gradients(self) -> dict[str, Tensor]:
        """Under the names, and in the shapes, of `make_experts`."""
        found = {"router": self.router.grad}
        for name, experts in self.factors.items():
            found[f"{name}.A"] = torch.stack([A.grad for A, _ in experts])
            found[f"{name}.B"] = torch.stack([B.grad.T for _, B in experts])
        return found


class MoePeftBlock(RivalBlock):
    """`moe-peft`'s block of Llama with its mixture in it."""

    def __init__(self, case: FfnCase, efficient: bool) -> None:
        super().__init__()
        from types import SimpleNamespace

        from moe_peft.adapters import adapter_factory, moe_layer_factory
        from moe_peft.common import FeedForward, LLMBatchConfig, LLMModelInput
        from moe_peft.models.modeling_llama import LlamaMLP

        config = adapter_factory("MIXLORA", "a", **SETTINGS, **MIXTURE, router_loss=False)
        base = make_ffn_linears(case)
        gate, up, down = (base[name] for name in FFN_LINEARS)
        mlp = LlamaMLP(gate, down, up, SimpleNamespace(device_=case.device, hidden_act_="silu"))
        self.inner = FeedForward(mlp)
        self.inner.moes_["a"] = moe_layer_factory(case.hidden, torch.device(case.device), config)
        for name, linear in mlp.state_dict().items():
            for number in range(EXPERTS):
                linear.init_lora_weight(config.expert_config(number))
            for lora in linear.loras_.values():
                lora.dropout_.p = 0.0
            self.factors[name] = [(lora.lora_a_.weight, lora.lora_b_.weight) for lora in linear.loras_.values()]
        self.router = self.inner.moes_["a"].gate_.weight
        self.batch = lambda rows: LLMModelInput(
            batch_configs_=[LLMBatchConfig("a", 0, rows)], output_router_logits_=False, efficient_operator_=efficient
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, self.batch(x.shape[0]))[0]


class MixloraBlock(RivalBlock):
    """`mixlora`'s mixture around the block of transformers."""

    def __init__(self, case: FfnCase) -> None:
        super().__init__()
        from mixlora.config import MixLoraConfig
        from mixlora.lora_linear import LoraLinear
        from mixlora.model import MixLoraSparseMoe

        about = {"base_model_name_or_path": "", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA"}
        config = MixLoraConfig.from_config({**about, **SETTINGS, **MIXTURE})
        config.dtype_, config.model_type_ = DTYPES[case.dtype], "llama"
        self.inner = MixLoraSparseMoe(make_mlp(case), config)
        for name, linear in make_ffn_linears(case).items():
            experts = [LoraLinear(linear, config, device=case.device) for _ in range(EXPERTS)]
            for number, lora in enumerate(experts):
                lora.dropout_.p = 0.0
                self.inner.experts_[f"experts.{number}.{name}"] = lora
            self.factors[name] = [(lora.lora_A.weight, lora.lora_B.weight) for lora in experts]
        self.router = nn.Parameter(torch.empty(EXPERTS, case.hidden, dtype=config.dtype_, device=case.device))
        self.inner.gate_ = self.router

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def make_block(case: FfnCase, method: str) -> RivalBlock:
    """`method`: "efficient" or "compatible" of moe-peft, "mixlora" for the other package."""
    block = MixloraBlock(case) if method == "mixlora" else MoePeftBlock(case, efficient=method == "efficient")
    block.fill(make_experts(case))
    return block
