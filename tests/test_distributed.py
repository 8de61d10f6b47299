"""Two processes on gloo: gradients are the mean of the local ones under DDP and FSDP, loads agree, logs are global.

The processes run once for the whole file; each test looks at one part of what they report. In every part each rank has
a batch of its own, and the reference is the same model on that batch without any wrapper.
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
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from moe_peft import FfnMoeConfig, LinearMoeConfig, MoeCallback, RankMoeConfig, grow
from moe_peft.attach import set_aux_scale
from moe_peft.watch import average_loads, find_routers, read_windows, update_selection_bias


DDP = [(mode, unused) for unused in (False, True) for mode in ("none", "reentrant", "non-reentrant")]
DDP.remove(("reentrant", True))  # torch: a parameter is "marked ready twice", with any model


OWN = {"routing": "self_activated", "top_k": 4, "temperature": 0.3}
RANKS = {
    "router": {"top_k": 4, "balance": "switch", "router_aux_loss_coef": 0.1},
    "bias": {"top_k": 4, "balance": "bias"},
    "own": OWN,
    "grown": OWN,
}


SCOPES = [("block", "reentrant"), ("block", "non-reentrant"), ("model", "none"), ("model", "non-reentrant")]
"""A router of the whole model is used by every layer, and torch marks its weight "ready twice" under "reentrant"."""


def make_model(mode="none", dtype=torch.float64, ffn=False):
    torch.manual_seed(2)
    settings = {"num_experts": 4, "router_aux_loss_coef": 0.1, "init_weights": False}
    config = LinearMoeConfig(target_modules=["q_proj", "up_proj"], **settings)
    if ffn in RANKS:
        config = RankMoeConfig(target_modules=["q_proj", "up_proj"], r=8, init_weights=False, **RANKS[ffn])
    elif ffn:
        config = FfnMoeConfig(target_modules="all-linear", **settings)
    model = get_peft_model(make_tiny_llama(layers=2, dtype=dtype), config)
    if ffn == "grown":
        grow(model, r=4)
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def batch_of(rank):
    torch.manual_seed(100 + rank)
    tokens = torch.randint(1, 100, (2, 8))
    mask = torch.ones_like(tokens)
    mask[0, : 1 + 2 * rank] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def bare(name):
    for part in ("module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(part, "")
    return name


def gradients(model):
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[bare(name)] = gradient.clone()
    return found


def mean_of_local(mode="none", dtype=torch.float64, ffn=False):
    model = make_model(mode, dtype, ffn)
    model(**batch_of(dist.get_rank())).loss.backward()
    found = gradients(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return found


def difference(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(((a[key] - b[key]).abs().max() / b[key].abs().max()).item() for key in b)


def under_ddp(mode, unused, ffn=False):
    model = DistributedDataParallel(make_model(mode, ffn=ffn), find_unused_parameters=unused)
    model(**batch_of(dist.get_rank())).loss.backward()
    tokens = [int(router.state.tokens or 0) for router in find_routers(model).values()]
    return difference(gradients(model), mean_of_local(mode, ffn=ffn)), tokens, list(find_routers(model))


def two_passes_under_ddp(kind):
    """DDP writes to buffers before each pass; what backward needs of the first one must not be among them."""
    model, local = DistributedDataParallel(make_model(ffn=kind)), make_model(ffn=kind)
    for m in (model, local):
        sum(m(**batch_of(2 * i + dist.get_rank())).loss for i in range(2)).backward()
    expected = gradients(local)
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return difference(gradients(model), expected)


def loads_and_windows():
    rank, model = dist.get_rank(), make_model()
    model(**batch_of(rank)).loss.backward()
    routers = find_routers(model)
    own = {name: router.state.load.tolist() for name, router in routers.items()}
    mine = read_windows_locally(routers)
    calls, true = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), true(*args, **kwargs))[1]
    average_loads(routers)
    after_loads = len(calls)
    windows = read_windows(routers)
    dist.all_reduce = true
    averaged = {name: router.state.load.tolist() for name, router in routers.items()}
    next(iter(routers.values())).state.load = None if rank == 0 else torch.tensor([4.0, 0.0, 0.0, 0.0])
    average_loads(routers)  # one rank saw nothing of this layer
    return own, averaged, after_loads, len(calls), mine, windows, next(iter(routers.values())).state.load.tolist()


def read_windows_locally(routers):
    return {name: (r.state.counts.tolist(), float(r.state.tokens)) for name, r in routers.items()}


def under_fsdp2(mode, ffn=False):
    model = make_model(mode, ffn=ffn)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(**batch_of(dist.get_rank())).loss.backward()
    tokens = [int(router.state.tokens or 0) for router in find_routers(model).values()]
    return difference(gradients(model), mean_of_local(mode, ffn=ffn)), tokens, list(find_routers(model))


def under_fsdp1(original_parameters, ffn=False):
    model = make_model(dtype=torch.float32, ffn=ffn)
    policy = fsdp_auto_wrap_policy(model)
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=original_parameters, device_id=torch.device("cpu")
    )
    before = {name: p.detach().clone() for name, p in make_model(dtype=torch.float32, ffn=ffn).named_parameters()}
    model(**batch_of(dist.get_rank())).loss.backward()
    # Flat parameters do not give their gradients away, so take a step of SGD and look at what it changed.
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    expected = mean_of_local(dtype=torch.float32, ffn=ffn)
    with FullyShardedDataParallel.summon_full_params(model):
        found = {bare(name): before[bare(name)] - p for name, p in model.named_parameters() if bare(name) in expected}
    routers = find_routers(model)
    tokens = [int(router.state.tokens or 0) for router in routers.values()]
    average_loads(routers)
    return difference(found, expected), tokens, list(routers)


class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = gradients(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.loads = {name: router.state.load.tolist() for name, router in find_routers(model).items()}


def under_the_trainer(folder):
    """Per rank and step one micro-batch of two rows; the sampler gives row 0 and 1 to rank 0, and so on."""
    model = make_model(dtype=torch.float32)
    rows = [{key: value[i] for key, value in batch_of(rank).items()} for rank in range(2) for i in range(2)] * 4
    arguments = TrainingArguments(
        output_dir=folder, max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none", use_cpu=True,
        save_strategy="no", disable_tqdm=True, max_grad_norm=0.0, learning_rate=1e-3, ddp_find_unused_parameters=False,
        average_tokens_across_devices=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    keep, callback = Keep(), MoeCallback()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback, keep])
    trainer.train()
    return difference(keep.gradients, mean_of_local(dtype=torch.float32)), keep.loads, callback.history


def biased(mode="none", scope="linear"):
    torch.manual_seed(2)
    config = LinearMoeConfig(
        num_experts=4, target_modules=["q_proj", "up_proj"], balance="bias", init_weights=False, router_scope=scope
    )
    model = get_peft_model(make_tiny_llama(layers=2, dtype=torch.float64), config)
    if mode != "none":
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
    return model.train()


def selection_biases():
    """After one step of both ranks, and after one of a process alone that saw both batches."""
    model, alone = DistributedDataParallel(biased("non-reentrant")), biased()
    model(**batch_of(dist.get_rank())).loss.backward()
    for rank in range(2):
        alone(**batch_of(rank)).loss.backward()
    update_selection_bias(model)
    model(**batch_of(dist.get_rank()))  # DDP sends buffers around at the next pass
    for router in find_routers(alone).values():
        router.move_bias(router.state.step_counts.float())  # as they are sent
    return [[router.selection_bias.tolist() for router in find_routers(m).values()] for m in (model, alone)]


def shared_router(scope, mode):
    """Under DDP, the gradients of a router that several layers follow."""
    model = DistributedDataParallel(biased(mode, scope))
    model(**batch_of(dist.get_rank())).loss.backward()
    own = biased("none", scope)
    own(**batch_of(dist.get_rank())).loss.backward()
    expected = gradients(own)
    for gradient in expected.values():
        dist.all_reduce(gradient)
        gradient /= 2
    return difference(gradients(model), expected)


def work(rank, port, folder):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=150))
    parts = {("ddp", mode, unused): functools.partial(under_ddp, mode, unused) for mode, unused in DDP}
    parts["loads"] = loads_and_windows
    parts |= {("fsdp2", mode): functools.partial(under_fsdp2, mode) for mode in ("none", "reentrant", "non-reentrant")}
    parts |= {("fsdp1", original): functools.partial(under_fsdp1, original) for original in (True, False)}
    parts["ffn", "ddp"] = functools.partial(under_ddp, "none", False, ffn=True)
    parts["ffn", "fsdp2"] = functools.partial(under_fsdp2, "non-reentrant", ffn=True)
    parts |= {
        ("ffn", "fsdp1", original): functools.partial(under_fsdp1, original, ffn=True) for original in (True, False)
    }
    for kind in RANKS:
        parts[kind, "ddp"] = functools.partial(under_ddp, "none", False, ffn=kind)
        parts[kind, "fsdp2"] = functools.partial(under_fsdp2, "reentrant", ffn=kind)
        parts[kind, "fsdp1"] = functools.partial(under_fsdp1, True, ffn=kind)
        parts[kind, "two passes"] = functools.partial(two_passes_under_ddp, kind)
        if kind != "grown":  # flat parameters must be trained or frozen as a whole
            parts[kind, "fsdp1 flat"] = functools.partial(under_fsdp1, False, ffn=kind)
    parts["biases"] = selection_biases
    parts |= {("scope", *how): functools.partial(shared_router, *how) for how in SCOPES}
    parts["trainer"] = functools.partial(under_the_trainer, folder)
    results = {}
    for name, part in parts.items():
        set_aux_scale(1.0)
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


def of(reports, name):
    for report in reports:
        assert not isinstance(report[name], str), report[name]
    return [report[name] for report in reports]


LAYERS = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")]
REAL = [15, 13]


@pytest.mark.parametrize(("mode", "unused"), DDP)
def test_ddp_averages_the_gradients(reports, mode, unused):
    for rank, (difference, tokens, names) in enumerate(of(reports, ("ddp", mode, unused))):
        assert difference <= 1e-12
        assert tokens == [REAL[rank]] * 4
        assert names == LAYERS


@pytest.mark.parametrize("mode", ["none", "reentrant", "non-reentrant"])
def test_fsdp2_averages_the_gradients(reports, mode):
    for rank, (difference, tokens, names) in enumerate(of(reports, ("fsdp2", mode))):
        assert difference <= 1e-12
        assert tokens == [REAL[rank]] * 4
        assert names == LAYERS


@pytest.mark.parametrize("original_parameters", [True, False])
def test_fsdp1_averages_the_gradients(reports, original_parameters):
    for rank, (difference, tokens, names) in enumerate(of(reports, ("fsdp1", original_parameters))):
        assert difference <= 1e-4  # fp32, and the subtraction of the step takes digits
        assert tokens == [REAL[rank]] * 4
        assert names == LAYERS


@pytest.mark.parametrize("how", [("ddp",), ("fsdp2",), ("fsdp1", True), ("fsdp1", False)])
def test_ffn_mixtures_average_their_gradients_as_well(reports, how):
    """FSDP1 puts an adapter's weights away between calls of its modules: there the block takes the general path."""
    for rank, (difference, tokens, names) in enumerate(of(reports, ("ffn", *how))):
        assert difference <= (1e-4 if "fsdp1" in how else 1e-12)
        assert tokens == [REAL[rank]] * 2
        assert names == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]


@pytest.mark.parametrize("kind", RANKS)
def test_ranks_average_their_gradients_as_well(reports, kind):
    for how in ("ddp", "fsdp2", "fsdp1", "fsdp1 flat"):
        if (kind, how) not in reports[0]:
            continue
        for difference, _, names in of(reports, (kind, how)):
            assert difference <= (1e-4 if "fsdp1" in how else 1e-12)
            assert names == LAYERS


@pytest.mark.parametrize("kind", RANKS)
def test_ranks_take_two_passes_before_one_backward(reports, kind):
    assert max(of(reports, (kind, "two passes"))) <= 1e-12


def test_loads_are_the_mean_over_ranks_in_one_exchange(reports):
    both = of(reports, "loads")
    for own, averaged, exchanges, *_ in both:
        assert exchanges == 1
        assert list(own) == LAYERS
        for name in LAYERS:
            mean = [(a + b) / 2 for a, b in zip(both[0][0][name], both[1][0][name], strict=True)]
            assert averaged[name] == pytest.approx(mean)
    assert both[0][0] != both[1][0]  # they had differed
    assert [report[-1] for report in both] == [[2.0, 0.0, 0.0, 0.0]] * 2  # the mean with a rank that saw nothing


def test_the_log_is_about_all_ranks(reports):
    both = of(reports, "loads")
    assert both[0][5] == both[1][5]
    assert all(report[3] == 2 for report in both)  # one exchange more
    for name, window in both[0][5].items():
        counts = [a + b for a, b in zip(both[0][4][name][0], both[1][4][name][0], strict=True)]
        assert window.tokens == sum(REAL)
        assert window.load == pytest.approx([count / sum(counts) for count in counts])


def test_the_trainer_does_all_of_it(reports):
    both = of(reports, "trainer")
    for difference, loads, history in both:
        assert difference <= 1e-5
        assert loads == both[0][1]
        assert history == both[0][2]
        assert len(history) == 3


def test_selection_biases_are_those_of_one_process_with_both_batches(reports):
    both = of(reports, "biases")
    assert both[0] == both[1]
    ranks, alone = both[0]
    assert ranks == alone
    assert any(any(bias) for bias in ranks)


@pytest.mark.parametrize(("scope", "mode"), SCOPES)
def test_a_shared_router_has_the_mean_gradient(reports, scope, mode):
    for found in of(reports, ("scope", scope, mode)):
        assert found <= 1e-12
