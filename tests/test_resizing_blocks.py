"""Experts of FFN mixtures added, scored and cut out: all linears of a block change together."""

import copy

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from moe_peft import FfnMoeConfig, add_experts, expert_scores, freeze_experts, prune_experts
from moe_peft.merge import routed_layers
from moe_peft.pruning import easy_ep_naive


BLOCKS = ["model.layers.0.mlp", "model.layers.1.mlp"]


def adapted(base=None, **settings) -> PeftModel:
    torch.manual_seed(3)
    given = {"num_experts": 4, "r": 2, "lora_alpha": 16, "init_weights": False, "router_init_std": 0.5, **settings}
    return get_peft_model(base or make_tiny_llama(layers=2), FfnMoeConfig(task_type="CAUSAL_LM", **given)).eval()


def text(batches: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 100, (3, 12), generator=generator)} for _ in range(batches)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**text(1, seed=5)[0]).logits


def tensors(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{which}": tensor.detach().clone()
        for name, layer in routed_layers(model).items()
        for which, tensor in layer.experts("default").named_parameters()
    }


def on_block(model, x):
    """(the frozen block's output, each expert's change of it `[T, E, d]`, its weights `[T, E]`), from the definition."""
    mlp = model.base_model.model.model.layers[0].mlp
    parts = {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}

    def block(expert: int | None) -> torch.Tensor:
        def adapted(name: str, inputs: torch.Tensor) -> torch.Tensor:
            experts, base = parts[name].experts("default"), parts[name].get_base_layer()
            delta = 0 if expert is None else inputs @ experts.lora_A[expert].T @ experts.lora_B[expert]
            return base(inputs) + experts.scaling * delta

        return adapted("down_proj", torch.nn.functional.silu(adapted("gate_proj", x)) * adapted("up_proj", x))

    with torch.no_grad():
        frozen = block(None)
        router = parts["gate_proj"].experts("default").router
        kept, index = (x @ router.T).softmax(-1).topk(2)
        g = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, index, kept / kept.sum(-1, keepdim=True))
        return frozen, torch.stack([block(e) - frozen for e in range(4)], dim=1), g


def test_the_score_is_the_definition():
    model, seen = adapted(make_tiny_llama(layers=2, dtype=torch.float64)).double(), []
    handle = model.base_model.model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].flatten(0, 1))
    )
    before = logits(model)
    seen.clear()
    found = expert_scores(model, text())
    handle.remove()
    frozen, changes, g = on_block(model, torch.cat(seen))
    wanted = easy_ep_naive(g, changes, frozen)
    torch.testing.assert_close(found[BLOCKS[0]], wanted, rtol=1e-9, atol=1e-12)
    assert list(found) == BLOCKS
    usage = expert_scores(model, text(), by="usage")
    torch.testing.assert_close(usage[BLOCKS[0]], g.sum(0), rtol=1e-9, atol=1e-12)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("by", ["easy_ep", "usage"])
def test_padding_scores_nothing(by):
    model = adapted()
    batch = text(1)[0]
    padded = {
        "input_ids": torch.cat((torch.zeros(3, 4, dtype=torch.long), batch["input_ids"]), 1),
        "attention_mask": torch.cat((torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 12, dtype=torch.long)), 1),
    }
    whole, masked = (expert_scores(model, [b], by=by)[BLOCKS[0]] for b in (batch, padded))
    torch.testing.assert_close(masked, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"num_shared_experts": 1}, {"num_null_experts": 2}], ids=str)
def test_pruning_keeps_the_best_of_each_block_bit_for_bit(settings, tmp_path):
    model = adapted(**settings)
    before, scores = tensors(model), expert_scores(model, text())
    table = prune_experts(model, 2, scores=scores)
    assert [line.layer for line in table] == BLOCKS
    for line in table:
        assert line.kept == sorted(scores[line.layer].topk(2).indices.tolist())
        for name, new in tensors(model).items():
            if name.startswith(line.layer):
                rest = list(range(4, len(before[name])))
                assert torch.equal(new, before[name][[*line.kept, *rest]])
    assert model.peft_config["default"].num_experts == 2
    after = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_tiny_llama(layers=2), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), after)


def test_cutting_out_experts_that_no_token_visits_changes_nothing():
    model = adapted(router_bias=True)
    with torch.no_grad():
        for name, layer in routed_layers(model).items():
            if name.endswith("gate_proj"):
                layer.experts("default").router_bias[[0, 3]] = -1e4
    before = logits(model)
    assert [line.kept for line in prune_experts(model, 2, text())] == [[1, 2], [1, 2]]
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_down_to_one_expert_a_block_is_a_plain_lora():
    model = adapted(top_k=1, routing="top_1")
    prune_experts(model, 1, text())
    after = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_from", ["zero", 1, "most_used"])
def test_adding_keeps_the_old_experts_and_starts_the_new_ones_on_every_linear(init_from, tmp_path):
    model = adapted()
    before = tensors(model)
    calibration = text() if init_from == "most_used" else None
    scores = expert_scores(model, text(), by="usage")
    assert add_experts(model, 2, init_from=init_from, calibration=calibration) == dict.fromkeys(BLOCKS, 6)
    for name, new in tensors(model).items():
        assert torch.equal(new[:4], before[name])
        if init_from == "zero":
            assert name.endswith("lora_A") or not new[4:].any()
        else:
            source = 1 if init_from == 1 else int(scores[name.rsplit(".", 2)[0]].argmax())
            assert torch.equal(new[4], before[name][source])
    after = logits(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_tiny_llama(layers=2), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), after)


def test_with_a_low_bias_the_output_is_kept():
    model = adapted(router_bias=True)
    before = logits(model)
    add_experts(model, router_bias_start=-1e4)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-7)


def test_only_some_layers_grow_and_the_config_says_so():
    model = adapted()
    assert list(add_experts(model, layers=[1]).values()) == [4, 5]
    assert model.peft_config["default"].num_experts == [4, 5]


def test_frozen_experts_stay_while_the_new_ones_learn():
    model = adapted().train()
    add_experts(model, init_from=0, freeze_old=True)
    before = tensors(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    for batch in text():
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: new for name, new in tensors(model).items() if not torch.equal(new, before[name])}
    assert all(torch.equal(new[:4], before[name][:4]) for name, new in moved.items())
    assert {name.rpartition(".")[2] for name in moved} == {"lora_A", "lora_B", "router"}
    assert any("down_proj" in name for name in moved)
    freeze_experts(model, [])
    model(**text()[0], labels=text()[0]["input_ids"]).loss.backward()
    assert all(p.grad[:4].any() for p in parameters if p.grad is not None and p.dim() == 3)


def test_the_fast_path_and_the_general_one_agree_after_pruning():
    model = adapted()
    prune_experts(model, 3, text())
    fast = logits(model)
    for module in copy.copy(list(model.modules())):
        if getattr(module, "block", None) is not None and module.block.fast is not None:
            module.block.fast.enabled = False
    torch.testing.assert_close(logits(model), fast, rtol=1e-4, atol=1e-5)


def test_a_pruned_block_learns():
    model = adapted().train()
    prune_experts(model, 2, text())
    batch = text()[0]
    model(**batch, labels=batch["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 14
    assert all(grad is not None and grad.any() for grad in grads)


def test_what_cannot_be_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match=r"`keep` is 1, but must be at least 2, the adapter's `top_k`"):
        prune_experts(model, 1, text())
    config = OPTConfig(
        vocab_size=100, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    opt = adapted(OPTForCausalLM(config))
    with pytest.raises(ValueError, match=r"`by` is 'easy_ep', but must be another where the linears .*by='usage'"):
        expert_scores(opt, text())
    scores = expert_scores(opt, text(), by="usage")
    assert list(scores) == ["model.decoder.layers.0.fc1"]
    assert [line.kept for line in prune_experts(opt, {0: 2}, scores=scores)] == [
        sorted(next(iter(scores.values())).topk(2).indices.tolist())
    ]
