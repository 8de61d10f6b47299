"""Two processes on gloo: pools that many layers use, and random splits, under DDP, FSDP1 and FSDP2.

A pool has to be a unit of its own there; where it is not, the pass is refused in words instead of going wrong.
"""

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
from test_distributed import DDP, bare, batch_of, difference, gradients
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from moe_peft import ShardPoolConfig
from moe_peft.tuners.shard_pool import ShardPool


FORMS = {"pools": {"r": 4, "equivalent_rank": 2, "shards_per_vector": 2}, "splits": {"r": 4, "num_splits": 4}}
REFUSED = ("pools", "ddp", "reentrant", False)
MODES = ("none", "reentrant", "non-reentrant")


def make_model(form, mode="none", dtype=torch.float64):
    torch.manual_seed(2)
    config = ShardPoolConfig(
        target_modules=["q_proj", "up_proj"], init_weights=False, task_type="CAUSAL_LM", **FORMS[form]
    )
    model = get_peft_model(make_tiny_llama(layers=3, dtype=dtype), config)
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def step(model):
    torch.manual_seed(50 + dist.get_rank())  # of the splits
    model(**batch_of(dist.get_rank())).loss.backward()


def mean_of_local(form, dtype=torch.float64):
    model = make_model(form, dtype=dtype)
    step(model)
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return found


def under_ddp(form, mode, unused):
    model = DistributedDataParallel(make_model(form, mode), find_unused_parameters=unused)
    step(model)
    return difference(gradients(model), mean_of_local(form))


def under_fsdp2(form, mode, own_units=True):
    model = make_model(form, mode)
    for pool in model.modules():
        if own_units and isinstance(pool, ShardPool):
            fully_shard(pool)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    step(model)
    return difference(gradients(model), mean_of_local(form))


def under_fsdp1(form, original, policy=None, mode="none"):
    model = make_model(form, mode, dtype=torch.float32)
    policy = policy or fsdp_auto_wrap_policy(model)
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device("cpu")
    )
    before = {name: p.detach().clone() for name, p in make_model(form, dtype=torch.float32).named_parameters()}
    step(model)
    # Flat parameters do not give their gradients away, so take a step of SGD and look at what it changed.
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    expected = mean_of_local(form, torch.float32)
    with FullyShardedDataParallel.summon_full_params(model):
        found = {bare(name): before[bare(name)] - p for name, p in model.named_parameters() if bare(name) in expected}
    return difference(found, expected)


def parts_of():
    parts = {}
    for form in FORMS:
        parts |= {(form, "ddp", *how): functools.partial(under_ddp, form, *how) for how in DDP}
        parts |= {(form, "fsdp2", mode): functools.partial(under_fsdp2, form, mode) for mode in MODES}
        parts |= {(form, "fsdp1", flag): functools.partial(under_fsdp1, form, flag) for flag in (True, False)}
    parts |= {
        ("pools", "fsdp1", mode): functools.partial(under_fsdp1, "pools", True, None, mode) for mode in MODES[1:]
    }
    del parts[REFUSED]
    parts["refused"] = functools.partial(under_ddp, *REFUSED[::2], False)
    parts["pools", "fsdp2", "with its layer"] = functools.partial(under_fsdp2, "pools", "none", own_units=False)
    by_layer = ModuleWrapPolicy({LlamaDecoderLayer})
    parts["pools", "fsdp1", "with its layer"] = functools.partial(under_fsdp1, "pools", True, by_layer)
    return parts


def work(rank, port, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    results = {}
    for name, part in parts_of().items():
        try:
            results[name] = part()
        except Exception:
            results[name] = traceback.format_exc()
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


@pytest.mark.parametrize(
    "part", [name for name in parts_of() if "with its layer" not in name and name != "refused"], ids=str
)
def test_gradients_are_the_mean_of_the_local_ones(reports, part):
    for report in reports:
        assert not isinstance(report[part], str), report[part]
        assert report[part] <= (1e-4 if part[1] == "fsdp1" else 1e-12)  # fp32, and the step's subtraction takes digits


@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
def test_a_pool_that_is_sharded_with_its_first_layer_is_refused(reports, how):
    for report in reports:
        message = report["pools", how, "with its layer"]
        assert isinstance(message, str), "it trained"
        assert "FSDP shards this pool together with its first layer" in message, message


def test_re_entrant_checkpointing_under_ddp_is_refused_for_pools(reports):
    """DDP would average the first contribution to a pool's gradient and say nothing."""
    for report in reports:
        assert isinstance(report["refused"], str), "it trained"
        assert "cannot be trained with re-entrant gradient checkpointing" in report["refused"]
