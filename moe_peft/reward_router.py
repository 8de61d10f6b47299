"""The outer layer of DMoERM: which category a prompt belongs to, learned from labelled prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from moe_peft.errors import nearest, refuse
from moe_peft.reward_fusion import RewardFusionModel


def prompt_ids(tokenizer: Any, prompt: Any) -> list[int]:
    """A text as it is, messages by the chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, add_generation_prompt=True)[
        "input_ids"
    ]


def padded(tokenizer: Any, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Prompts as one right-padded batch of `input_ids` and `attention_mask`."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([one + [tokenizer.pad_token_id] * (longest - len(one)) for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids]),
    }


def fit_router(
    model: RewardFusionModel,
    tokenizer: Any,
    prompts: Sequence[Any],
    categories: Sequence[str],
    decay: float = 1e-3,
    batch_size: int = 16,
) -> float:
    """Fit the model's router, a linear layer on the frozen backbone's state at the end of the prompt, by logistic regression.

    Args:
        prompts: texts or lists of messages.
        categories: of each prompt.
        decay: weight of the squared weights, which keeps the optimum finite.

    Returns:
        the share of these prompts that it now sends where they belong.

    Raises:
        ValueError: no categories in the model, an unknown one, or one without a prompt.
    """
    if model.router is None:
        raise refuse("categories", None, "there, to choose from", "Build the model with `categories`.")
    names = list(model.config.heads)
    for category in categories:
        if category not in names:
            raise refuse("category", category, "a category of the model", nearest(str(category), names))
    for name in names:
        if name not in categories:
            raise refuse(
                "category", name, "the label of at least one prompt", "Add rows of it: it would never be chosen."
            )
    batches = [padded(tokenizer, prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    states = torch.cat([model.prompt_states(**batch) for batch in batches]).to(model.device, model.dtype)
    wanted = torch.tensor([names.index(category) for category in categories], device=model.device)
    router = model.router
    torch.nn.init.zeros_(router.weight)
    torch.nn.init.zeros_(router.bias)
    optimizer = torch.optim.LBFGS(router.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        found = F.cross_entropy(router(states), wanted) + decay * router.weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    optimizer.zero_grad()
    return float((router(states).argmax(-1) == wanted).float().mean())
