"""One dataclass per adapter type over a shared base: every knob a user can turn, checked in `__post_init__`.

The names are PEFT's for LoRA (`r`, `lora_alpha`, `target_modules`) and transformers' for experts (`num_experts`,
`top_k`, `router_aux_loss_coef`). Every value that a check can refuse is refused here (in `config_checks` and `router_checks`), before any
model is touched.
"""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from moe_peft.allocation import Allocation
from moe_peft.balance_checks import (
    AUX_LOSS_COEF,
    BALANCE_DELTA,
    BIAS_UPDATE_SPEED,
    check_balance,
    check_block,
    check_unused,
)
from moe_peft.config_checks import check_booleans, check_init, check_layers, check_numbers
from moe_peft.plugin_config import PluginConfig
from moe_peft.router_checks import (
    check_distinct,
    check_groups,
    check_linear,
    check_router,
    check_routing,
    check_schedules,
    check_top_k,
)


@dataclass
class MoeConfig(PluginConfig):
    """What every adapter type of this package shares; not an adapter type itself.

    Args:
        r (`int`, `str` or `list[int]`, *optional*, defaults to 8):
            Rank of one expert: one number, numbers for consecutive groups of layers ("4:4:8:8"), or a list with one per
            layer. Parameters grow linearly with it.
        num_experts (`int`, `str` or `list[int]`, *optional*, defaults to 8):
            Experts per adapted layer, written like `r` ("2:4:6:8" is MoLA's allocation).
        num_shared_experts (`int`, *optional*, defaults to 0):
            Further experts of the same rank that every token visits with weight 1 (DeepSeekMoE). They take up what all
            tokens have in common and learn as fast as plain LoRA; the routed ones are left with the differences.
        top_k (`int`, *optional*):
            Experts that each token visits. Defaults to 2 under `routing="softmax_top_k"`; the other rules fix it.
        lora_alpha (`int` or `float`, *optional*, defaults to 16):
            The experts' output is scaled by `lora_alpha / r`, with the `r` of the layer.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Scale by `lora_alpha / sqrt(r)` instead (https://huggingface.co/papers/2312.03732).
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the experts' input, one mask for all of them; the router sees the input without it.
        routing (`str`, *optional*, defaults to `"softmax_top_k"`):
            How a token chooses. "softmax_top_k": softmax, keep `top_k`, rescale to sum 1. "softmax": every expert,
            weighted. "top_1": the most probable expert, weighted by its probability. "top_1_hard": the same expert with
            weight 1, whose router learns from the balance loss alone. "top_1_straight_through": the same output, and the
            router learns from the task. "top_p": the most probable experts that together reach the probability `top_p`,
            not rescaled. "sigmoid_top_k": each expert scored by itself, keep `top_k`, rescale to sum 1. "top_k" and
            "all": as `scoring_func` and `norm_topk_prob` say. "sparsegen": as many as the logits ask for, with exact
            zeros. "random": in training one expert by lot, in use the mean of all, which can be merged exactly. "given":
            the experts of the sample's task type, without a router.
        scoring_func (`str`, *optional*):
            "softmax", "sigmoid" or "cosine" (a softmax of `router_scale` times the cosine of token and router row), where
            `routing` leaves it open: "top_k" and "all" all three, the softmax rules also "cosine". Defaults to what
            the rule says, or to "softmax".
        norm_topk_prob (`bool`, *optional*):
            For "top_k" and "all": rescale the weights to sum 1. Defaults to `True`.
        routed_scaling_factor (`float`, *optional*, defaults to 1.0):
            Multiplies the weights of the routed experts at last (DeepSeek).
        top_p (`float`, *optional*):
            For "top_p" alone: above 0, at most 1, which keeps all. Defaults to 0.8 there. Lower uses fewer experts. The
            start is near uniform, where a token visits about `top_p * num_experts` of them. Give `router_entropy_coef`
            or `top_k` with it, or the number of experts only grows.
        sparsegen_lambda (`float`, *optional*):
            For "sparsegen" alone: below 1, defaults to 0.0. Higher uses fewer experts.
        num_null_experts (`int`, *optional*, defaults to 0):
            Choices beside the experts that mean "the frozen layer alone" (AdaMoE), where `top_k` are kept. Tokens that
            need no change keep the model's own output. With balanced use a token visits
            `top_k * num_experts / (num_experts + num_null_experts)` experts, so raise `top_k` along with it.
        freeze_router (`bool`, *optional*, defaults to `False`):
            Leave the router as it was drawn (SMoE-Dropout): it costs nothing to learn and its choices never move.
        router_bias (`bool`, *optional*, defaults to `False`):
            Give the router a bias, one number per expert, as LLaVA-MoLE does.
        router_act (`str`, *optional*):
            "tanh", "gelu" or "sigmoid" on the logits, before the scale and the softmax.
        router_jitter_noise (`float`, *optional*, defaults to 0.0):
            In training the router sees its input times random numbers from 1 - noise to 1 + noise; the experts do not.
            At least 0 and below 1.
        router_granularity (`str`, *optional*, defaults to `"token"`):
            "sequence": the mean of the prompt's logits decides for the whole sequence, and what is generated keeps the
            decision. Training needs to know the prompt: labels of -100 on it, or `prompt_mask` in the batch. Scoring
            given answers does too: without either, the whole row is taken for the prompt.
        expert_groups (`list[list[int]]`, *optional*):
            Entry t lists the experts that samples (or tokens) of task type t may visit. Needs `task_types` in the batch.
        schedule_steps (`int`, *optional*, defaults to 0):
            Over how many optimizer steps `top_k_start` and `router_temperature_start` reach their ends. Inference is
            always at the end.
        top_k_start (`int`, *optional*):
            Slots at the first step, on their way to `top_k`: all experts for dense-to-sparse (EvoMoE), few for
            SMoE-Dropout, whose `top_k` is `num_experts`.
        router_temperature_start (`float`, *optional*):
            What the logits are divided by at the first step, on its way to `1 / router_scale`.
        balance (`str`, *optional*):
            "switch": the load evened out per layer over a window of micro-batches and all ranks. "switch_local": in each
            micro-batch by itself. "sequence": in each sequence. "bias": without a loss, by a bias on the choice that is
            moved after each optimizer step. "cv2": the experts' summed weights evened out, also where all are used. "mi":
            each task type (each sequence, without types) to experts of its own. "localized": LoRAMoE's constraint, which
            needs `task_types` in the batch. "none". Defaults to "switch" where a rule selects and the router learns, and
            to "none" elsewhere.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.001):
            Weight of the balance loss. Under the "switch" kinds and "sequence" the loss is 1 when experts are used evenly.
            Higher evens them out more.
        balance_weights (`list[float]`, *optional*):
            Under the "switch" kinds, what the load of each expert counts, null experts included: an expert with a
            higher weight gets fewer tokens (MoE++'s eta; give the ranks of unequal experts).
        bias_update_speed (`float`, *optional*, defaults to 0.01):
            Step of the selection bias under "bias". DeepSeek-V3 takes 0.001 over many more steps than fine-tuning has.
        target_active (`float`, *optional*):
            Under "bias" with null experts: the mean number of experts that a token is to visit.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Weight of the z-loss, which keeps the logits small (ST-MoE); 0.001 is common. Not for sigmoid scores.
        router_entropy_coef (`float`, *optional*, defaults to 0.0):
            Weight of the tokens' mean entropy: makes each token decisive. 0.0001 goes with "top_p".
        balance_delta (`float`, *optional*, defaults to 0.1):
            How strongly "localized" separates the two halves of the experts; 0 treats all alike.
        router_init_std (`float`, *optional*):
            Standard deviation of the router's start. Small: the start is near uniform. Defaults to `None`, which draws
            as `nn.Linear` does (Kaiming uniform with a = sqrt(5), as MoLA and LoRAMoE), divided by `router_scale`.
        router_scale (`float`, *optional*, defaults to 1.0):
            Multiplies the router's logits. Under Adam it acts as a learning rate of the router's own: at 0.1 the choice
            of experts moves ten times slower than the experts learn, which keeps it from wandering before they differ.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers to adapt, or "all-linear". Defaults to PEFT's LoRA targets of the model.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in `LoraConfig`.
        trainable_token_indices: as in `LoraConfig`; TRL sets it when a chat template adds tokens.
        init_weights (`bool` or `str`, *optional*, defaults to `True`):
            B starts at 0 and a fresh adapter changes nothing. "pissa": likewise, and A starts as the principal right
            singular vectors of the frozen weight, dealt out to the experts; the frozen weight itself is left as it is,
            which PiSSA changes. `False` gives a random function, for tests.
    """

    r: Allocation = field(default=8, metadata={"help": "Rank of one expert."})
    num_experts: Allocation = field(default=8, metadata={"help": "Experts per adapted layer."})
    num_shared_experts: int = field(default=0, metadata={"help": "Further experts that every token visits."})
    top_k: int | None = field(default=None, metadata={"help": "Experts that each token visits."})
    lora_alpha: int | float = field(default=16, metadata={"help": "Scale of the experts' output, over r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the experts' input."})
    routing: str = field(default="softmax_top_k", metadata={"help": "How a token chooses its experts."})
    scoring_func: str | None = field(default=None, metadata={"help": "How 'top_k' and 'all' score the experts."})
    norm_topk_prob: bool | None = field(default=None, metadata={"help": "Rescale the weights to sum 1."})
    routed_scaling_factor: float = field(default=1.0, metadata={"help": "Multiplies the routed weights at last."})
    top_p: float | None = field(default=None, metadata={"help": "Probability that the experts reach under 'top_p'."})
    sparsegen_lambda: float | None = field(default=None, metadata={"help": "Sparsity under 'sparsegen'."})
    num_null_experts: int = field(default=0, metadata={"help": "Choices that mean the frozen layer alone."})
    freeze_router: bool = field(default=False, metadata={"help": "Leave the router as it was drawn."})
    router_bias: bool = field(default=False, metadata={"help": "Give the router a bias."})
    router_act: str | None = field(default=None, metadata={"help": "Activation on the router's logits."})
    router_jitter_noise: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    router_granularity: str = field(default="token", metadata={"help": "What is routed: 'token' or 'sequence'."})
    expert_groups: list[list[int]] | None = field(default=None, metadata={"help": "Experts of each task type."})
    schedule_steps: int = field(default=0, metadata={"help": "Optimizer steps of the schedules below."})
    top_k_start: int | None = field(default=None, metadata={"help": "Experts per token at the first step."})
    router_temperature_start: float | None = field(default=None, metadata={"help": "Temperature at the first step."})
    balance: str | None = field(default=None, metadata={"help": "What keeps the experts in use."})
    router_aux_loss_coef: float = field(default=AUX_LOSS_COEF, metadata={"help": "Weight of the balance loss."})
    balance_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each expert's load."})
    bias_update_speed: float = field(default=BIAS_UPDATE_SPEED, metadata={"help": "Step of the selection bias."})
    target_active: float | None = field(default=None, metadata={"help": "Experts per token to aim at by the bias."})
    router_z_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the z-loss on the logits."})
    router_entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the tokens' entropy."})
    balance_delta: float = field(
        default=BALANCE_DELTA, metadata={"help": "Separation of the halves under 'localized'."}
    )
    router_init_std: float | None = field(default=None, metadata={"help": "Spread of the router's start."})
    router_scale: float = field(default=1.0, metadata={"help": "Multiplies the router's logits."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "The linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train."}
    )
    init_weights: bool | str = field(
        default=True, metadata={"help": "Start with B = 0; 'pissa': and A from the base weight. False is for tests."}
    )
    plugin: str = field(default="moe_peft", metadata={"help": "The package to import before loading this adapter."})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        # PEFT sets `inference_mode` in what it saves; then nothing has to be drawn well.
        config.weights_follow = config.inference_mode
        config.loaded_from = str(pretrained_model_name_or_path)  # for errors; not a field, so not saved
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        check_booleans(self)
        check_numbers(self)
        check_init(self)
        check_layers(self)
        check_routing(self)
        check_router(self)
        check_top_k(self)
        check_groups(self)
        check_schedules(self)
        check_balance(self)
        check_unused(self)

    def experts_of_layer(self, choices: int) -> int:
        """How many of a router's `choices` are experts with low-rank weights; the others are null or constant."""
        return choices - self.num_null_experts


@dataclass
class LinearMoeConfig(MoeConfig):
    """A router and LoRA experts on each adapted linear layer (MoLA, LoRAMoE). The fields are those of [`MoeConfig`], and:

    Args:
        share_A (`bool`, *optional*, defaults to `False`):
            One A for all experts of a layer, and a B for each (HydraLoRA).
        num_constant_experts (`int`, *optional*, defaults to 0):
            Further choices that add a learned vector, the same for every token that visits them (MoE++).
        router_scope (`str`, *optional*, defaults to `"linear"`):
            "linear": every layer routes by itself. "group": layers that read the same input (q, k, v; gate, up) share a
            router. "block": all adapted layers of an attention or FFN share the decision of the first. "model": one
            router on the input embeddings decides for the whole model.
        num_distinct_experts (`int` or `list[int]`, *optional*):
            How many experts of a layer have weights of their own, where `group_experts` has merged some: the router still
            tells `num_experts` apart, and several of its choices stand for one. One number, or a list with one per
            layer. Defaults to `None`: each choice is an expert of its own.
    """

    share_A: bool = field(default=False, metadata={"help": "One A for all experts of a layer."})
    num_constant_experts: int = field(default=0, metadata={"help": "Choices that add a learned vector."})
    router_scope: str = field(default="linear", metadata={"help": "Which layers share a router."})
    num_distinct_experts: int | list[int] | None = field(
        default=None, metadata={"help": "Experts with weights of their own, where some were merged."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_linear(self)
        self.peft_type = PeftType["LINEAR_MOE"]

    def experts_of_layer(self, choices: int) -> int:
        return choices - self.num_null_experts - self.num_constant_experts


@dataclass
class FfnMoeConfig(MoeConfig):
    """A router and LoRA experts on each whole FFN block (MixLoRA, LLaVA-MoLE): an expert is the frozen block with its own
    low-rank change on every targeted linear layer in it, so that the activation function stands inside the expert.

    The fields are those of [`MoeConfig`], and:

    Args:
        num_shared_experts (`int`, *optional*, defaults to 0):
            Further low-rank changes of rank `r` on each targeted linear layer of the block that every token gets,
            underneath all experts: an expert changes the block that they have changed. An export folds them into each
            expert.
        balance (`str`, *optional*):
            As in [`MoeConfig`]; "localized" goes with `routing="softmax"` alone, and "top_1_hard" needs "switch".
        router_scale (`float`, *optional*, defaults to 1.0):
            As in [`MoeConfig`]. A temperature T is `router_scale = 1 / T`: it divides the logits. (MixLoRA's code divides
            the probabilities, which then no longer sum to 1.)
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers to adapt, or "all-linear". Those that belong to an FFN block are mixed;
            every other one, such as those of the attention, carries one plain LoRA with the layer's `r` and
            `lora_alpha`. Defaults to the FFN blocks alone.
        num_distinct_experts (`int` or `list[int]`, *optional*):
            As in [`LinearMoeConfig`]: `group_experts` writes it.
    """

    num_distinct_experts: int | list[int] | None = field(
        default=None, metadata={"help": "Experts with weights of their own, where some were merged."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self)
        check_distinct(self)
        self.peft_type = PeftType["FFN_MOE"]
