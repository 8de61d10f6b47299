"""Two processes on gloo: MixDA's two stages average their gradients under DDP, FSDP1 and FSDP2, as a batch on each rank says."""

import functools
import os
import socket
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_tiny_llama
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from test_distributed import bare, batch_of, difference, gradients
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_peft import BottleneckMoeConfig


FORMS = {
    "domains": {"gate": "none"},
    "task": {"gate": "mlp", "gate_dropout": 0.0, "freeze_domains": True, "r": 2},
    "jointly": {"gate": "sigmoid", "r": 2},
}
"""The first stage, the second, and both in one by a gate for each token."""
MODES = ("none", "reentrant", "non-reentrant")
WAYS = [("ddp", mode, unused) for mode, unused in (("none", False), ("none", True), ("reentrant", False))]
WAYS += [("ddp", "non-reentrant", False), *(("fsdp2", mode) for mode in MODES), ("fsdp1",)]


def make_model(form, mode="none", dtype=torch.float64):
    torch.manual_seed(2)
    config = BottleneckMoeConfig(
        domains=["law", "code"], gate_size=8, init_weights=False, task_type="CAUSAL_LM", **FORMS[form]
    )
    model = get_peft_model(make_tiny_llama(layers=3, dtype=dtype), config)
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def step(model):
    """A pass on this rank's batch, whose first real tokens are the prompt that a gate of sequences reads."""
    batch = batch_of(dist.get_rank())
    prompt = batch["attention_mask"].cumsum(1) <= 2
    batch["labels"] = batch["labels"].masked_fill(prompt, -100)
    model(**batch).loss.backward()
    return gradients(model)


def mean_of_local(form, dtype=torch.float64):
    found = step(make_model(form, dtype=dtype))
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return found


def under(form, way, mode="none", unused=False):
    if way == "ddp":
        model = DistributedDataParallel(make_model(form, mode), find_unused_parameters=unused)
        return difference(step(model), mean_of_local(form))
    if way == "fsdp2":
        model = make_model(form, mode)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        return difference(step(fully_shard(model)), mean_of_local(form))
    model = make_model(form, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = fsdp_auto_wrap_policy(model)
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    step(wrapped)
    # Flat parameters hide their gradients, a step of SGD does not; a large one, so that the difference keeps its digits.
    torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1024.0).step()
    expected = mean_of_local(form, torch.float32)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        found = {bare(n): (before[bare(n)] - p) / 1024 for n, p in wrapped.named_parameters() if bare(n) in expected}
    return difference(found, expected)


def work(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    results = {}
    for form in FORMS:
        for way in WAYS:
            try:
                results[(form, *way)] = functools.partial(under, form, *way)()
            except Exception:
                results[(form, *way)] = traceback.format_exc()
            dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ranks"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(work, (port, folder), nprocs=2, start_method="spawn")
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_gradients_are_the_mean_of_the_ranks(reports, form, way):
    for report in reports:
        found = report[(form, *way)]
        assert not isinstance(found, str), found
        assert found <= (1e-4 if way[0] == "fsdp1" else 1e-12)
