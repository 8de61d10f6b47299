"""Low-rank factors from shared shards (MoS, arXiv:2410.00938) or from masked splits (MoSA, arXiv:2312.02923).

Each fast path has its definition beside it; tests hold them together, gradients included. Torch only.
"""

import torch
from torch import Tensor


def assembled_naive(pool: Tensor, index: Tensor, r: int) -> Tensor:
    """The definition of `assembled`: rank j is the concatenation of the shards `index[j l] ... index[j l + l - 1]`."""
    per_vector = index.numel() // r
    rows = [torch.cat([pool[int(shard)] for shard in index[j * per_vector : (j + 1) * per_vector]]) for j in range(r)]
    return torch.stack(rows)


def assembled(pool: Tensor, index: Tensor, r: int) -> Tensor:
    """One factor of a layer, gathered from the pool.

    Args:
        pool: `[S, d / l]`, the shards; B's too lie in rows here (the paper's are columns).
        index: `[r l]` int, the layer's own choice, rank by rank.
        r: the rank.

    Returns:
        `[r, d]`, a copy.
    """
    return pool.index_select(0, index).view(r, -1)


def draw_index(
    layers: int,
    layer: int,
    r: int,
    equivalent_rank: int,
    per_vector: int,
    private_rank: int,
    generator: torch.Generator,
) -> Tensor:
    """Which shards a layer takes of a pool of `equivalent_rank * layers * per_vector`: `[r l]` int32, on the CPU.

    The first `(e - p) L l` shards are public: a layer draws `(r - p) l` of them without replacement. Behind them stand
    the private ones, `p l` for each layer in turn, and a layer takes its own (MoS's layout). With few layers a layer may
    want more public shards than there are; those are drawn in rounds, each of them without replacement.

    Args:
        layers: L, that share the pool.
        layer: which of them, from 0.
        generator: of the CPU; the next layer draws on.
    """
    public, wanted = (equivalent_rank - private_rank) * layers * per_vector, (r - private_rank) * per_vector
    drawn = [torch.randperm(public, generator=generator, device="cpu") for _ in range(-(-wanted // public))]
    start, own = public + layer * private_rank * per_vector, private_rank * per_vector
    private = torch.arange(start, start + own, device="cpu")
    return torch.cat([torch.cat(drawn)[:wanted], private]).to(torch.int32)


def draw_splits(rows: int, width: int, num_splits: int, generator: torch.Generator) -> Tensor:
    """To which part each entry belongs: `[rows, width]` uint8 on the CPU, every part equally large, at random."""
    order = torch.randperm(rows * width, generator=generator, device="cpu")
    return (order % num_splits).to(torch.uint8).view(rows, width)


def sampled(change: Tensor, splits: Tensor, chosen: Tensor) -> Tensor:
    """What one training pass uses: the entries of part `chosen [1]`, and zero elsewhere."""
    return change * (splits == chosen)


def expected(change: Tensor, num_splits: int) -> Tensor:
    """What inference uses: the mean of `sampled` over all parts."""
    return change / num_splits


def expected_naive(change: Tensor, splits: Tensor, num_splits: int) -> Tensor:
    """The definition of `expected`."""
    parts = [sampled(change, splits, torch.tensor([i], device=change.device)) for i in range(num_splits)]
    return torch.stack(parts).mean(0)


def low_rank_added_naive(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The definition of `low_rank_added`."""
    return y + scaling * (x.to(A.dtype) @ (B.T @ A).T).to(y.dtype)


def low_rank_added(x: Tensor, y: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """`y + scaling * B^T A drop(x)`, in the dtype of `y`.

    Args:
        x: `[*, d_in]`; cast to the dtype of A.
        y: `[*, d_out]`; not edited.
        A: `[r, d_in]`.
        B: `[r, d_out]`, transposed as compared with PEFT's LoRA.
        scaling: LoRA's alpha / r.
        dropout: share of the input to drop; 0 outside training.
    """
    tokens = x.reshape(-1, x.shape[-1]).to(A.dtype)
    if dropout:
        tokens = torch.nn.functional.dropout(tokens, dropout)
    hidden = (tokens @ A.T) * scaling
    flat = y.reshape(-1, y.shape[-1])
    if flat.dtype == hidden.dtype:
        return torch.addmm(flat, hidden, B).view(y.shape)
    return (flat + (hidden @ B).to(flat.dtype)).view(y.shape)
