"""The config of `SHARD_POOL`: ranks assembled from pools that layers share (MoS), or sampled in part (MoSA)."""

import copy
from dataclasses import dataclass, field

from peft.utils import PeftType

from moe_peft.config_checks import check_booleans, check_layers, is_count, is_number
from moe_peft.errors import nearest, refuse
from moe_peft.plugin_config import PluginConfig


SPLIT_FACTORS = ("B", "A", "both")
"""Which factor of the LoRA the splits of MoSA divide."""


@dataclass
class ShardPoolConfig(PluginConfig):
    """A LoRA of rank `r` on each layer, without a router, in one of three forms:

    - as it stands, each layer has its own and it is a plain LoRA;
    - with `equivalent_rank` below `r`, layers take their ranks from pools that all layers of one kind share (MoS,
      https://huggingface.co/papers/2410.00938): `q_proj` of all layers has one pair of pools, `k_proj` another;
    - with `num_splits` above 1, a training pass uses a random one of as many disjoint parts of the entries (MoSA,
      https://huggingface.co/papers/2312.02923), and inference uses their mean.

    What is trained is one linear map per layer in every form, so merging is exact.

    Args:
        r (`int`, *optional*, defaults to 8):
            Rank that each layer gets. Costs compute; parameters follow `equivalent_rank`.
        equivalent_rank (`int`, *optional*):
            The trainable parameters are as many as those of a LoRA of this rank: at least 1, at most `r`. Defaults to
            `r`.
        shards_per_vector (`int`, *optional*, defaults to 1):
            Each row of A and each column of B is joined from so many shards of the pool. Must divide the width of every
            adapted layer. Higher gives more combinations.
        private_rank (`int`, *optional*):
            So many ranks of each layer come from shards that no other layer uses; at least 0, at most `equivalent_rank`.
            All of them (`equivalent_rank`) leaves nothing to share and needs `r == equivalent_rank`. Defaults to all if
            `equivalent_rank == r`, else to 1, or 0 if `equivalent_rank` is 1.
        num_splits (`int`, *optional*, defaults to 1):
            Parts (MoSA's experts) from which each training pass draws one per layer, evenly and from torch's generator;
            1 to 255, and it must divide the number of entries of a factor. Above 1 nothing may be shared.
        split_factors (`str`, *optional*, defaults to `"B"`):
            What is split: "B" (MoSA's setting: the projection down is dense and shared), "A" or "both". A split A starts
            from a dense random matrix, to which each part adds its own entries.
        index_seed (`int`, *optional*, defaults to 0):
            The choice of shards and parts is drawn from it once; it is then saved with the adapter.
        lora_alpha (`int` or `float`, *optional*, defaults to 16):
            The output is scaled by `lora_alpha / r`.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Scale by `lora_alpha / sqrt(r)` instead.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of A.
        target_modules (`list[str]` or `str`, *optional*):
            Names or regex of the linear layers to adapt, or "all-linear". Defaults to PEFT's LoRA targets of the model.
        exclude_modules, modules_to_save, layers_to_transform, layers_pattern, trainable_token_indices: as in
            `LoraConfig`.

    Raises:
        ValueError: a field that does not exist or holds what it may not.
    """

    r: int = field(default=8, metadata={"help": "Rank that each layer gets."})
    equivalent_rank: int | None = field(default=None, metadata={"help": "Rank of a LoRA with as many parameters."})
    shards_per_vector: int = field(default=1, metadata={"help": "Shards that one rank is joined from."})
    private_rank: int | None = field(default=None, metadata={"help": "Ranks of each layer that no other layer uses."})
    num_splits: int = field(default=1, metadata={"help": "Disjoint parts from which a training pass draws one."})
    split_factors: str = field(default="B", metadata={"help": "'B', 'A' or 'both'."})
    index_seed: int = field(default=0, metadata={"help": "Seed of the choice of shards and parts."})
    lora_alpha: int | float = field(default=16, metadata={"help": "Scale of the output, over r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "The linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer numbers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the layer list."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Start with B = 0. False gives a random function, for tests only."}
    )
    plugin: str = field(default="moe_peft", metadata={"help": "The package to import before loading this adapter."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["SHARD_POOL"]
        check_booleans(self)
        _check_numbers(self)
        check_layers(self)
        _check_ranks(self)
        _check_splits(self)

    @property
    def shares(self) -> bool:
        """Whether layers share pools; otherwise each has weights of its own."""
        return self.private_rank != self.r

    def with_budget_of(self, rank: int) -> "ShardPoolConfig":
        """A copy with that `equivalent_rank`, and all that goes with it in proportion; the scale is kept."""
        fitted = copy.deepcopy(self)
        fitted.equivalent_rank, fitted.r = rank, max(rank, round(self.r * rank / self.equivalent_rank))
        ratio = fitted.r / self.r
        fitted.lora_alpha = self.lora_alpha * (ratio**0.5 if self.use_rslora else ratio)
        fitted.private_rank = min(self.private_rank, rank - 1) if self.shares else rank
        return fitted


def _check_numbers(config: ShardPoolConfig) -> None:
    if not is_count(config.r, 1):
        remedy = "Layers have one rank: pools that they share cannot give each another one."
        raise refuse("r", config.r, "a whole number of at least 1", remedy)
    for name in ("shards_per_vector", "num_splits"):
        if not is_count(getattr(config, name), 1):
            raise refuse(name, getattr(config, name), "a whole number of at least 1", "1 splits nothing.")
    if not is_count(config.index_seed):
        raise refuse("index_seed", config.index_seed, "a whole number of at least 0", "0 will do.")
    if not is_number(config.lora_alpha) or config.lora_alpha <= 0:
        raise refuse("lora_alpha", config.lora_alpha, "a positive number", "16 is a common choice.")
    if not is_number(config.lora_dropout) or not 0.0 <= config.lora_dropout < 1.0:
        raise refuse("lora_dropout", config.lora_dropout, "at least 0 and below 1", "Give a share such as 0.05.")


def _check_ranks(config: ShardPoolConfig) -> None:
    """Fill in the two ranks that were left out, and refuse those that contradict each other."""
    r, e = config.r, config.equivalent_rank
    e = config.equivalent_rank = r if e is None else e
    if not is_count(e, 1) or e > r:
        remedy = "The pools hold the parameters of `equivalent_rank` ranks, and a layer takes `r` of them with its own choice."
        raise refuse("equivalent_rank", e, f"a whole number from 1 to `r` = {r}", remedy)
    p = config.private_rank
    if p is None:
        p = config.private_rank = r if e == r else min(1, e - 1)
    if not is_count(p) or p > e:
        remedy = "Private ranks are part of the budget."
        raise refuse("private_rank", p, f"a whole number from 0 to `equivalent_rank` = {e}", remedy)
    if p == e and r != e:
        remedy = f"With all {e} ranks private a layer has nothing to take {r} from: lower `private_rank`, or set `r` to {e}."
        raise refuse("private_rank", p, f"below `equivalent_rank` = {e} when `r` is {r}", remedy)
    if config.shards_per_vector > 1 and not config.shares:
        remedy = (
            "Each layer has its own shards only, and joining them is the same LoRA: set `equivalent_rank` below `r`."
        )
        raise refuse("shards_per_vector", config.shards_per_vector, "1 when nothing is shared", remedy)


def _check_splits(config: ShardPoolConfig) -> None:
    splits, factors = config.num_splits, config.split_factors
    if factors not in SPLIT_FACTORS:
        allowed = "one of " + ", ".join(map(repr, SPLIT_FACTORS))
        raise refuse("split_factors", factors, allowed, nearest(str(factors), SPLIT_FACTORS))
    if splits > 255:
        raise refuse(
            "num_splits", splits, "at most 255", "MoSA uses 4: a part is trained by one pass in `num_splits`."
        )
    if splits > 1 and config.shares:
        remedy = "Splits and pools are two methods: leave `equivalent_rank` and `private_rank` out to split."
        raise refuse("num_splits", splits, "1 when layers share pools", remedy)
    if splits == 1 and factors != "B":
        raise refuse("split_factors", factors, "left out when `num_splits` is 1", "Set `num_splits`, 4 in MoSA.")
