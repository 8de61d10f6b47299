"""The static merge: exact where the routed function is linear, least squares where it is not, plain LoRA on disk."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel, get_peft_model

from moe_peft import LinearMoeConfig, RankMoeConfig, grow
from moe_peft.agreement import measure_agreement
from moe_peft.merge import (
    METHODS,
    fit_static,
    hidden_and_features,
    instead_of_routing,
    routed_layers,
    save_static,
)


def routed_model(**settings):
    defaults = {"num_experts": 4, "r": 2, "lora_alpha": 64, "target_modules": "all-linear", "init_weights": False}
    torch.manual_seed(3)
    return get_peft_model(make_tiny_llama(layers=2), LinearMoeConfig(**{**defaults, **settings})).eval()


def text(batches: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 100, (8, 20), generator=generator)} for _ in range(batches)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{"num_experts": 1}, {"num_experts": 1, "num_shared_experts": 2}])
def test_an_adapter_that_is_linear_is_merged_without_loss(settings, method):
    model = routed_model(**settings)
    factors = fit_static(model, text(4), method=method)
    with torch.no_grad(), instead_of_routing(model, factors):
        merged = model(**text()[5]).logits
    torch.testing.assert_close(merged, model(**text()[5]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"routing": "softmax"}, {"num_shared_experts": 2}, {"router_scale": 0.1}])
def test_the_fit_is_the_least_squares_solution_on_its_own_text(settings):
    """Held against `torch.linalg.lstsq` of the routed output on z = [A x; R x], layer by layer."""
    model = routed_model(**settings)
    batches = text(12)
    name, layer = list(routed_layers(model).items())[-1]
    experts, inputs = layer.linear_moe_experts["default"], []
    handle = experts.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat(inputs)
    hidden, z = hidden_and_features(experts, x)
    gates = experts.gates(x, layer.context)
    gated = hidden * gates.repeat_interleave(experts.r, dim=1)
    routed = gated @ experts.stacked()[1]
    z = z.double()
    wanted = z @ torch.linalg.lstsq(z, routed.double()).solution
    factors = fit_static(model, batches)[name]
    torch.testing.assert_close(
        (x @ factors.A.T @ factors.B.T).double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.std())
    )


def test_hidden_gates_and_logits_are_the_layers_own():
    model = routed_model(num_shared_experts=1, router_scale=0.5)
    layer = next(iter(routed_layers(model).values()))
    experts = layer.linear_moe_experts["default"]
    x = torch.randn(7, layer.in_features)
    (hidden, _), gates = hidden_and_features(experts, x), experts.gates(x, layer.context)
    by_definition = experts.scaling * (hidden * gates.repeat_interleave(experts.r, 1)) @ experts.lora_B.flatten(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(layer(x) - layer.base_layer(x), by_definition, rtol=1e-4, atol=1e-5)


RANKS = {
    "router": {"router_scale": 0.5},
    "bias": {"bias_in_gates": True, "rank_partition": 2},
    "one rank": {"r": 1},
    "themselves": {"routing": "self_activated", "temperature": 0.3, "threshold": 0.2},
}


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("settings", RANKS.values(), ids=RANKS)
def test_ranks_are_merged_as_experts_are(settings, grown):
    torch.manual_seed(3)
    settings = {"r": 8, "lora_alpha": 32, "target_modules": "all-linear", "init_weights": False, **settings}
    config = RankMoeConfig(**settings, top_k=1 if settings["r"] == 1 else 4)
    model = get_peft_model(make_tiny_llama(layers=2), config).eval()
    if grown and config.routing == "self_activated":
        grow(model, r=3)
    for layer in routed_layers(model).values():
        experts = layer.experts("default")
        if experts.selection_bias is not None:
            experts.selection_bias.normal_(std=0.1)
        x = torch.randn(50, layer.in_features)
        hidden, gates = hidden_and_features(experts, x)[0], experts.gates(x, layer.context)
        with torch.no_grad():
            added = layer(x) - layer.base_layer(x)
            torch.testing.assert_close(hidden * gates @ experts.stacked()[1], added, rtol=1e-4, atol=1e-4)
    agreements = {m: measure_agreement(model, fit_static(model, text(4), method=m), text()[4:]) for m in METHODS}
    if settings["r"] == 1:
        assert agreements["lstsq"].kl_merged < 1e-6
    assert agreements["lstsq"].kl_merged < agreements["lstsq"].kl_base
    assert agreements["lstsq"].kl_merged <= 1.2 * agreements["mean"].kl_merged + 1e-6


def test_least_squares_is_no_worse_than_mean_weights_and_more_rank_no_worse_than_less():
    model, batches = routed_model(), text()
    errors = {}
    for method, rank in (("lstsq", None), ("lstsq", 3), ("mean", None)):
        agreement = measure_agreement(model, fit_static(model, batches, rank, method), batches)
        errors[method, rank] = torch.tensor(list(agreement.layer_error.values()))
    first = slice(0, 3)  # q, k, v of the first layer, whose inputs the merge does not change
    assert (errors["lstsq", None][first] <= errors["mean", None][first] + 1e-6).all()
    assert (errors["lstsq", None][first] <= errors["lstsq", 3][first] + 1e-6).all()


def test_agreement_knows_perfect_and_no_agreement():
    model, batches = routed_model(num_experts=1), text(3)
    perfect = measure_agreement(model, fit_static(model, batches), batches)
    assert perfect.kl_merged == pytest.approx(0.0, abs=1e-6)
    assert perfect.top1_merged > 0.99
    assert perfect.kl_base > 10 * abs(perfect.kl_merged)
    assert perfect.loss_merged == pytest.approx(perfect.loss_routed, abs=1e-4)
    assert perfect.tokens == 3 * 8 * 19
    assert max(perfect.layer_error.values()) < 1e-3


def test_padding_counts_neither_in_the_fit_nor_in_the_measure():
    model = routed_model()
    plain = text(4)
    padded = []
    for batch in plain:
        ids = torch.cat((batch["input_ids"], torch.zeros(8, 5, dtype=torch.long)), dim=1)
        padded.append({"input_ids": ids, "attention_mask": (ids != 0).long()})
    with_padding, without = fit_static(model, padded), fit_static(model, plain)
    for name in without:
        x = torch.randn(5, without[name].A.shape[1])
        apply = [x @ f.A.T @ f.B.T for f in (with_padding[name], without[name])]
        torch.testing.assert_close(*apply, rtol=1e-2, atol=1e-3)
    one, other = (measure_agreement(model, without, batches) for batches in (padded, plain))
    assert one.tokens == other.tokens
    assert one.kl_merged == pytest.approx(other.kl_merged, rel=1e-3)


def test_what_is_saved_is_a_plain_lora_that_loads_without_this_package(tmp_path):
    model, batches = routed_model(), text(4)
    factors = fit_static(model, batches, rank=5)
    save_static(factors, tmp_path / "plain", "somewhere")
    with torch.no_grad(), instead_of_routing(model, factors):
        here = model(**batches[0]).logits
    make_tiny_llama(layers=2).save_pretrained(tmp_path / "base")
    torch.save(batches[0], tmp_path / "batch.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = PeftModel.from_pretrained(model, sys.argv[1] + '/plain').eval()\n"
        "assert 'moe_peft' not in sys.modules\n"
        "torch.save(model(**torch.load(sys.argv[1] + '/batch.pt')).logits.detach(), sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), here, rtol=1e-4, atol=1e-5)


def test_layers_of_unequal_rank_get_one_and_stay_the_same_maps(tmp_path):
    model = routed_model(num_experts="2:4")
    factors = fit_static(model, text(3))
    save_static(factors, tmp_path / "plain", None)
    loaded = PeftModel.from_pretrained(make_tiny_llama(layers=2), tmp_path / "plain").eval()
    with torch.no_grad(), instead_of_routing(model, factors):
        torch.testing.assert_close(loaded(**text(1)[0]).logits, model(**text(1)[0]).logits, rtol=1e-4, atol=1e-5)


def test_saving_again_replaces_its_own_files_and_leaves_others_alone(tmp_path):
    model, folder = routed_model(), tmp_path / "plain"
    save_static(fit_static(model, text(2), rank=2), folder, None)
    (folder / "thesis.txt").write_text("years of work")
    save_static(fit_static(model, text(2), rank=3), folder, None)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "moe_peft_export.json", "thesis.txt"]
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3


def test_what_a_plain_lora_cannot_carry_is_refused():
    with pytest.raises(ValueError, match=r"`modules_to_save` is .* but must be None for a static merge"):
        fit_static(routed_model(modules_to_save=["lm_head"]), text(1))
    model = routed_model()
    model.add_adapter("other", LinearMoeConfig(num_experts=2, r=1, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="Adapter 'other' is not active"):
        fit_static(model, text(1), adapter_name="other")


def test_bad_input_is_refused_in_words():
    model = routed_model()
    with pytest.raises(ValueError, match=r"`method` is 'lsq', but must be one of .*Did you mean 'lstsq'"):
        fit_static(model, text(1), method="lsq")
    with pytest.raises(ValueError, match="`rank` is 0, but must be"):
        fit_static(model, text(1), rank=0)
    with pytest.raises(ValueError, match="calibration text holds no token"):
        fit_static(model, [])
    with pytest.raises(ValueError, match="No layer of this model holds a routed adapter named 'law'"):
        fit_static(model, text(1), adapter_name="law")
    with pytest.raises(ValueError, match="held-out text holds no token"):
        measure_agreement(model, fit_static(model, text(1)), [])
