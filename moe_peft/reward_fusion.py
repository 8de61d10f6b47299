"""A reward model of capability experts: several LoRAs of one frozen backbone, read together (DMoERM, arXiv:2403.01197).

Every capability (harmlessness, fluency ...) has a LoRA and a score head of its own, trained on pairs that were judged for
that capability. Then all of them are frozen, the hidden states that their score heads would see are put side by side, and a
small head turns them into one reward:

    reward(x) = Linear(PReLU(Linear([h_1(x); ...; h_m(x)]))),    h_i: the last token's final hidden state under LoRA i

The outer layer is optional: categories of prompts, each with experts and a head of its own, one of them per prompt.
No mixture of weights: m passes with m adapters.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from moe_peft.backbone import keep_trainable, quantisation
from moe_peft.catalogue import CONFIG_FILE
from moe_peft.errors import nearest, refuse
from moe_peft.saving import begin, put_in_place


EXPERTS_FOLDER = "experts"
ONLY = "all"
"""The name of the one head where there are no categories."""

_NAME = re.compile(r"[A-Za-z0-9_-]+")


class RewardFusionConfig(PreTrainedConfig):
    """What a fusion model is made of.

    Args:
        capabilities: names of the adapters, in the order of their states.
        hidden_size: of the backbone.
        fusion_size: width of the head's hidden layer; by default `hidden_size`.
        categories: name -> its capabilities; None for one head over all.
        base_model_name_or_path: where the backbone came from.
    """

    model_type = "reward_fusion"

    def __init__(
        self,
        capabilities: Sequence[str] = (),
        hidden_size: int = 0,
        fusion_size: int | None = None,
        categories: Mapping[str, Sequence[str]] | None = None,
        base_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.capabilities = list(capabilities)
        self.hidden_size = hidden_size
        self.fusion_size = fusion_size or hidden_size
        self.categories = None if categories is None else {name: list(of) for name, of in categories.items()}
        self.base_model_name_or_path = base_model_name_or_path
        super().__init__(**{"num_labels": 1, **kwargs})
        check_names("capabilities", self.capabilities)
        if self.categories is not None:
            check_categories(self.categories, self.capabilities)

    @property
    def heads(self) -> dict[str, list[str]]:
        """head -> the capabilities that it reads."""
        return {ONLY: self.capabilities} if self.categories is None else self.categories


def check_names(field: str, names: Sequence[str]) -> None:
    """Names become folders and keys of a state dict.

    Raises:
        ValueError: one that cannot, or one that is there twice.
    """
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in "lora_" or name == "default":
            allowed = "names of letters, digits, '-' and '_', not 'default' and no part of 'lora_'"
            raise refuse(field, name, allowed, "Rename it: it becomes a folder and an adapter's name.")
    double = sorted({name for name in names if list(names).count(name) > 1})
    if double:
        raise refuse(field, double[0], "named once each", "Give every one a name of its own.")


def check_categories(categories: Mapping[str, Sequence[str]], capabilities: Sequence[str]) -> None:
    """
    Raises:
        ValueError: fewer than two categories, one without experts, or one with an expert that there is not.
    """
    check_names("categories", list(categories))
    if len(categories) < 2:
        raise refuse("categories", list(categories), "at least two, or None", "One needs no choice: leave them out.")
    for name, of in categories.items():
        if not of:
            raise refuse(f"categories.{name}", [], "at least one capability", "Name its experts.")
        for capability in of:
            if capability not in capabilities:
                known = ", ".join(map(repr, capabilities))
                raise refuse(f"categories.{name}", capability, f"among {known}", nearest(capability, capabilities))


class RewardFusionModel(PreTrainedModel):
    """Scores like a sequence classification model with one label, and trains so under TRL's `RewardTrainer`: only the head.

    The frozen experts are no submodule: what is moved, trained and saved as a state dict are the heads. Inputs go to the
    experts' device and states come back from there, so that a 4-bit backbone stays where it was loaded.
    """

    config_class = RewardFusionConfig
    supports_gradient_checkpointing = True  # nothing to do: the experts run without gradients

    def __init__(self, config: RewardFusionConfig, experts: PeftModel) -> None:
        """
        Args:
            experts: a sequence classification model with an adapter for each capability, of that name.

        Raises:
            ValueError: a capability without an adapter.
        """
        super().__init__(config)
        missing = [name for name in config.capabilities if name not in experts.peft_config]
        if missing:
            have = ", ".join(map(repr, experts.peft_config))
            raise refuse("capabilities", missing[0], f"among the adapters {have}", "Load its LoRA, or leave it out.")
        self._outside = (experts,)
        self._chosen: str | None = None if config.categories else ONLY
        width, states = config.fusion_size, config.hidden_size
        self.fusion = nn.ModuleDict(
            {
                head: nn.Sequential(nn.Linear(len(of) * states, width), nn.PReLU(), nn.Linear(width, 1))
                for head, of in config.heads.items()
            }
        )
        self.router = nn.Linear(states, len(config.categories)) if config.categories else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):  # torch's own start, on which the head's learning rate was tried
            module.reset_parameters()
        elif isinstance(module, nn.PReLU):
            module.reset_parameters()

    @property
    def experts(self) -> PeftModel:
        """The frozen backbone with its adapters."""
        return self._outside[0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        categories: Sequence[str] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_ids: `[batch, tokens]`, padded on either side.
            attention_mask: the same shape; by default every token counts.
            categories: of each row; with a model of categories, unless `category` fixes it.
            use_cache: nothing is cached.

        Returns:
            `logits` `[batch, 1]`.

        Raises:
            ValueError: no category, an unknown one, or an argument that has no meaning here.
        """
        if kwargs:
            raise refuse(next(iter(kwargs)), "given", "left out", "A fusion model takes input_ids and attention_mask.")
        chosen = self._heads_of(categories, len(input_ids))
        logits = torch.empty(len(input_ids), 1, device=self.device, dtype=self.dtype)
        for head in sorted(set(chosen)):
            rows = torch.tensor([i for i, name in enumerate(chosen) if name == head], device=self.device)
            there = rows.to(input_ids.device)
            mask = None if attention_mask is None else attention_mask[there]
            states = self.states(input_ids[there], mask, self.config.heads[head])
            with torch.autocast(self.device.type, enabled=False):  # the head is small: rewards keep their digits
                reward = self.fusion[head](states.to(self.device, self.dtype))
            logits = logits.index_copy(0, rows, reward)
        return SequenceClassifierOutput(logits=logits)

    def _heads_of(self, categories: Sequence[str] | None, batch: int) -> list[str]:
        if categories is None and self._chosen is None:
            known = ", ".join(map(repr, self.config.heads))
            remedy = "Say it for each row, ask `route`, or score inside `with model.category(...)`."
            raise refuse("categories", None, f"one of {known} for each row", remedy)
        chosen = [self._chosen or ONLY] * batch if categories is None else list(categories)
        for name in chosen:
            if name not in self.config.heads:
                raise refuse("categories", name, "a category of the model", nearest(name, self.config.heads))
        if len(chosen) != batch:
            raise refuse("categories", f"{len(chosen)} names", f"one for each of the {batch} rows", "Repeat them.")
        return chosen

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor | None, capabilities: Sequence[str]) -> Tensor:
        """What the experts' score heads see, side by side: `[batch, len(capabilities) * hidden]`.

        One pass for each expert. One pass of PEFT's mixed batches, with each row once for every expert, gives the same and
        was slower (a fifth to a half more CPU time with five experts).
        """
        was_active, found = self.experts.active_adapter, []
        try:
            for name in capabilities:
                self.experts.set_adapter(name, inference_mode=True)
                found.append(self._last(input_ids, attention_mask))
        finally:
            self.experts.set_adapter(was_active, inference_mode=True)
        return torch.cat(found, dim=-1)

    def _last(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The last token's final hidden state under the active adapter, `[batch, hidden]`."""
        classifier = self.experts.get_base_model()
        classifier.eval()
        device = next(classifier.parameters()).device
        ids = input_ids.to(device)
        mask = None if attention_mask is None else attention_mask.to(device)
        body = getattr(classifier, classifier.base_model_prefix)
        states = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return states[torch.arange(len(ids), device=device), last_tokens(ids, mask, classifier.config.pad_token_id)]

    @torch.no_grad()
    def prompt_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[batch, hidden]`: the backbone's own state at the end of a prompt, which the choice of a category is made from."""
        with self.experts.disable_adapter():
            return self._last(input_ids, attention_mask)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """The category of each prompt (the prompts alone, without answers).

        Raises:
            ValueError: if the model has no categories.
        """
        if self.router is None:
            raise refuse("categories", None, "there, to choose from", "Build the model with `categories`.")
        logits = self.router(self.prompt_states(input_ids, attention_mask).to(self.device, self.dtype))
        names = list(self.config.heads)
        return [names[i] for i in logits.argmax(-1).tolist()]

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Every row is of this category; for training its head, whose batches do not say it."""
        if name not in self.config.heads:
            raise refuse("category", name, "a category of the model", nearest(name, self.config.heads))
        before, self._chosen = self._chosen, name
        try:
            yield
        finally:
            self._chosen = before

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Config, heads, and each expert as a PEFT adapter in `experts/NAME`; whole or not at all."""
        if not is_main_process:
            return
        folder = Path(save_directory)
        beside = begin(folder)
        super().save_pretrained(str(beside), **kwargs)
        self.experts.save_pretrained(str(beside / EXPERTS_FOLDER), selected_adapters=self.config.capabilities)
        put_in_place(beside, folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        backbone: nn.Module | None = None,
        load_in: str = "none",
        **kwargs: Any,
    ) -> "RewardFusionModel":
        """
        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote.
            backbone: a sequence classification model with one label; by default the one that the config names, in fp32.
            load_in: "4bit" or "8bit" for an own backbone, if the experts were trained so; see `load_classifier`.
            kwargs: for transformers' `from_pretrained` of the heads.

        Raises:
            ValueError: an expert that is not there.
        """
        folder = Path(pretrained_model_name_or_path)
        config = RewardFusionConfig.from_pretrained(str(folder))
        for name in config.capabilities:
            if not (folder / EXPERTS_FOLDER / name / CONFIG_FILE).is_file():
                raise ValueError(
                    f"The expert '{name}' is missing: `{folder}` has no {EXPERTS_FOLDER}/{name}/{CONFIG_FILE}, though its "
                    "config.json names it in `capabilities`. Save the model again, or fetch the folder anew."
                )
        if backbone is None:
            backbone = load_classifier(config.base_model_name_or_path, config.pad_token_id, load_in)
        first, *others = config.capabilities
        experts = PeftModel.from_pretrained(backbone, str(folder / EXPERTS_FOLDER / first), adapter_name=first)
        for name in others:
            experts.load_adapter(str(folder / EXPERTS_FOLDER / name), adapter_name=name)
        model = super().from_pretrained(str(folder), *args, experts=experts, **kwargs)
        for (
            parameter
        ) in model.parameters():  # transformers leaves them in the file's memory map, at odd addresses, where
            parameter.data = parameter.data.clone()  # a product may round differently: copied, they give the same bits
        return model


def fuse(
    experts: PeftModel,
    capabilities: Sequence[str] | None = None,
    fusion_size: int | None = None,
    categories: Mapping[str, Sequence[str]] | None = None,
) -> RewardFusionModel:
    """A fusion model with a fresh head over trained experts, which are frozen.

    Args:
        experts: a sequence classification model with an adapter for each capability.
        capabilities: which; by default all adapters, in their order.
        fusion_size: width of the head's hidden layer; by default the backbone's hidden size.
        categories: name -> its capabilities.

    Raises:
        ValueError: names that cannot be used, or have no adapter.
    """
    names = list(experts.peft_config) if capabilities is None else list(capabilities)
    base = experts.get_base_model().config
    config = RewardFusionConfig(
        names,
        base.get_text_config().hidden_size,
        fusion_size,
        categories,
        base_model_name_or_path=getattr(base, "_name_or_path", None) or None,
        pad_token_id=base.get_text_config().pad_token_id,
    )
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    return RewardFusionModel(config, experts)


def last_tokens(input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """Where each row ends, `[batch]`: as transformers' sequence classification finds it, so that an expert's state is the one
    that its score head was trained on. Without a padding token it is the mask's last position."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)
    if pad_token_id is not None:
        return (places * (input_ids != pad_token_id)).argmax(-1)
    if attention_mask is not None:
        return (places * attention_mask).argmax(-1)
    return places[-1].expand(len(input_ids))


def load_classifier(
    name: str,
    pad_token_id: int | None,
    load_in: str = "none",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A backbone as a sequence classification model with one label, in evaluation mode.

    Args:
        name: a folder or an id on the Hub.
        pad_token_id: by which the model finds where a row ends.
        load_in: "none", "4bit" (NF4 with double quantisation) or "8bit"; the score head is not quantised.
        device: all of it goes there.
        dtype: of the weights, and what 4-bit weights compute in.

    Raises:
        ValueError: unknown `load_in`.
    """
    options: dict[str, Any] = {"num_labels": 1, "dtype": dtype}
    if device is not None:
        options["device_map"] = {"": device}
    if load_in != "none":
        options["quantization_config"] = quantisation(load_in, dtype)
    model = AutoModelForSequenceClassification.from_pretrained(name, **options)
    model.config.get_text_config().pad_token_id = pad_token_id
    return keep_trainable(model).eval()


def save_expert(experts: PeftModel, name: str, folder: Path) -> None:
    """One adapter with its score head, whole or not at all.

    Args:
        experts: carries the adapter.
        name: of the adapter.
        folder: gets its config and weights.
    """
    beside = begin(folder)
    experts.save_pretrained(str(beside), selected_adapters=[name])
    put_in_place(beside / name if (beside / name).is_dir() else beside, folder)
    shutil.rmtree(beside, ignore_errors=True)
