"""Of many open rows those most like a few shots, without near copies (Rocket's data selection, arXiv:2408.15915).

A row's vector is the mean of the backbone's input embeddings over its tokens. The mean of all vectors is taken off first:
such means point nearly the same way for any text, and a threshold on their raw cosine would part nothing. (The paper takes
a sentence encoder, whose cosines need no such step; no second model is needed here.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_peft.errors import refuse


@torch.no_grad()
def mean_embeddings(token_ids: Sequence[Sequence[int]], embedding: nn.Module) -> Tensor:
    """`[rows, hidden]` in fp32 on the CPU; a row without tokens is zero.

    Args:
        token_ids: of each row.
        embedding: ids -> vectors, as `model.get_input_embeddings()`.
    """
    device = next(embedding.parameters()).device
    rows = []
    for ids in token_ids:
        vectors = embedding(torch.tensor(list(ids), dtype=torch.long, device=device)).float()
        rows.append(vectors.mean(0).cpu() if len(ids) else torch.zeros(vectors.shape[-1]))
    return torch.stack(rows)


def centred(shots: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean of all their rows taken off, and of length 1."""
    mean = torch.cat((shots, others)).mean(0)
    return F.normalize(shots - mean, dim=-1), F.normalize(others - mean, dim=-1)


@torch.no_grad()
def most_similar(shots: Tensor, others: Tensor, limit: int = 1000, max_cosine: float = 0.9) -> list[int]:
    """Which of the other rows to take, the most similar first.

    A row is as similar to the shots as to the nearest of them. From the most similar down, a row is left out if its cosine
    with one that was taken before is above `max_cosine`.

    Args:
        shots: `[K, hidden]`, as `mean_embeddings` gives it.
        others: `[rows, hidden]`.
        limit: take at most this many. The paper: 1,000.
        max_cosine: the paper's tau, above 0 and at most 1.

    Returns:
        indices into `others`.

    Raises:
        ValueError: a limit or cosine out of range.
    """
    if limit < 1:
        raise refuse("limit", limit, "a whole number of at least 1", "The paper takes at most 1000.")
    if not 0 < max_cosine <= 1:
        raise refuse("max_cosine", max_cosine, "above 0 and at most 1", "The paper takes 0.9.")
    shots, others = centred(shots, others)
    order = (others @ shots.T).amax(1).argsort(descending=True, stable=True).tolist()
    taken: list[int] = []
    kept = others.new_empty(min(limit, len(others)), others.shape[1])
    for index in order:
        if len(taken) == limit:
            break
        if not taken or float((kept[: len(taken)] @ others[index]).max()) <= max_cosine:
            kept[len(taken)] = others[index]
            taken.append(index)
    return taken
