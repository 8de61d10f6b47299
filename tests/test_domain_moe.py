"""Named experts: what they compute against the definition and against stock PEFT, their names on disk, what is frozen."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import moe_peft
from moe_peft import DomainMoeConfig, from_loras
from moe_peft.agreement import measure_agreement
from moe_peft.domain_config import GATES
from moe_peft.merge import fit_static
from moe_peft.routing import dense_weights
from moe_peft.tuners.domain_experts import domains_naive
from moe_peft.tuners.domain_moe import DomainMoeLinear


EXACT = {"rtol": 1e-9, "atol": 1e-11}
LORAS = {
    "law": {"r": 2, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "medicine": {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "code": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"layers.2.mlp.up_proj": 11},
        "layers_to_transform": [1, 2],
    },
}
DOMAINS = list(LORAS)


def logits(model, tokens, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **kwargs).logits


def make_lora(folder, name: str = "law", dtype=torch.float64, base=None, **settings) -> str:
    torch.manual_seed(len(name))
    settings = {**LORAS.get(name, {}), **settings}
    model = get_peft_model(
        base or make_tiny_llama(dtype=dtype), LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    )
    model.save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def bank(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bank")
    return {name: make_lora(folder, name) for name in LORAS}


def layers_of(model) -> list[DomainMoeLinear]:
    return [module for module in model.modules() if isinstance(module, DomainMoeLinear)]


def adapted(domains=DOMAINS, dtype=torch.float64, **settings):
    settings = {"r": 3, "target_modules": ["q_proj", "up_proj", "down_proj"], "init_weights": False, **settings}
    torch.manual_seed(7)
    config = DomainMoeConfig(domains=list(domains), task_type="CAUSAL_LM", **settings)
    return get_peft_model(make_tiny_llama(dtype=dtype), config).eval()


# --- made of LoRAs ---


@pytest.mark.parametrize("name", DOMAINS)
def test_a_forced_domain_is_what_peft_computes_with_its_lora_alone(bank, tokens, name):
    stock = PeftModel.from_pretrained(make_tiny_llama(dtype=torch.float64), bank[name]).eval()
    model = from_loras(bank, make_tiny_llama(dtype=torch.float64), gate="given").eval()
    types = torch.full((len(tokens),), DOMAINS.index(name))
    torch.testing.assert_close(logits(model, tokens, task_types=types), logits(stock, tokens), **EXACT)


def test_each_row_of_a_batch_gets_its_own_domain(bank, tokens):
    model = from_loras(bank, make_tiny_llama(dtype=torch.float64), gate="given").eval()
    together = logits(model, tokens, task_types=torch.tensor([2, 0, 1]))
    for row, name in enumerate(["code", "law", "medicine"]):
        stock = PeftModel.from_pretrained(make_tiny_llama(dtype=torch.float64), bank[name]).eval()
        torch.testing.assert_close(together[row : row + 1], logits(stock, tokens[row : row + 1]), **EXACT)


def test_ranks_and_layers_are_those_of_the_loras(bank):
    model = from_loras(bank, make_tiny_llama())
    config = model.peft_config["default"]
    assert (config.domains, config.domain_ranks) == (DOMAINS, [2, 5, 4])
    assert config.target_modules == {"q_proj", "v_proj", "up_proj", "down_proj"}
    ranks = {name: m.experts("default").ranks for name, m in model.named_modules() if isinstance(m, DomainMoeLinear)}
    prefix = "base_model.model.model.layers."
    assert ranks[f"{prefix}0.self_attn.q_proj"] == [2, 5, 0]
    assert ranks[f"{prefix}1.self_attn.q_proj"] == [2, 5, 4]
    assert ranks[f"{prefix}2.self_attn.q_proj"] == [2, 5, 3]
    assert ranks[f"{prefix}3.mlp.down_proj"] == [0, 5, 0]
    assert config.rank_pattern["down_proj"] == [0, 5, 0]  # one entry for all layers that agree


def test_layers_that_only_some_of_a_kind_have_are_named_whole(tmp_path):
    path = make_lora(tmp_path, "one", dtype=torch.float32, target_modules=["q_proj"], layers_to_transform=[1])
    model = from_loras({"one": path}, make_tiny_llama())
    assert model.peft_config["default"].target_modules == {"model.layers.1.self_attn.q_proj"}
    assert len(layers_of(model)) == 1


def test_the_base_is_the_one_that_the_loras_name(tmp_path, tokens):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    paths = {name: make_lora(tmp_path, name, base=copy.deepcopy(base)) for name in ("law", "code")}
    model = from_loras(paths, gate="given").eval()
    stock = PeftModel.from_pretrained(base, paths["code"]).eval()
    ours = logits(model, tokens, task_types=torch.ones(len(tokens), dtype=torch.long))
    torch.testing.assert_close(ours, logits(stock, tokens), rtol=1e-4, atol=1e-5)


def test_everything_that_does_not_fit_is_told_at_once(bank, tmp_path):
    other = make_tiny_llama(layers=5)
    paths = [
        ("law", bank["law"]),
        ("Law", make_lora(tmp_path, "dora", target_modules=["q_proj"], use_dora=True)),
        ("biased", make_lora(tmp_path, "biased", target_modules=["q_proj"], bias="lora_only")),
        ("deep", make_lora(tmp_path, "deep", base=other, target_modules=["q_proj"])),
        ("gone", str(tmp_path / "nowhere")),
    ]
    with pytest.raises(ValueError, match="nothing was changed") as error:
        from_loras(paths, make_tiny_llama(), gate="tokens")
    told = str(error.value)
    for line in (
        "two domains have one name: 'law' and 'Law'",
        f"Law ({paths[1][1]}): `use_dora`",
        f"biased ({paths[2][1]}): `bias` is 'lora_only'",
        f"deep ({paths[3][1]}): model.layers.4.self_attn.q_proj: the model has no such layer: it was trained on",
        f"gone ({paths[4][1]})",
        "`gate` is 'tokens', but must be one of",
    ):
        assert line in told


def test_a_lora_for_another_backbone_is_refused(tmp_path):
    path = make_lora(tmp_path, "law")
    config = json.loads((tmp_path / "law" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/other-7b"
    (tmp_path / "law" / "adapter_config.json").write_text(json.dumps(config))
    base = make_tiny_llama(dtype=torch.float64)
    base.config._name_or_path = "someone/this-7b"
    with pytest.raises(
        ValueError, match=r"law \(.*\): it was trained on someone/other-7b, and this is someone/this-7b"
    ):
        from_loras({"law": path}, base)
    from_loras({"law": path}, base, check_base=False)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda bank: from_loras({}, make_tiny_llama()), "`loras` is {}, but must be from names to folders"),
        (
            lambda bank: from_loras(bank, make_tiny_llama(), r=4),
            "`r` is 4, but must be left out: it is what the LoRAs",
        ),
        (
            lambda bank: from_loras(bank, from_loras(bank, make_tiny_llama())),
            "`base_model` is 'PeftModel.*', but must be the model itself",
        ),
        (
            lambda bank: from_loras(bank, 3),
            "`base_model` is 3, but must be a model, or its folder or Hub id. Leave it out",
        ),
        (
            lambda bank: from_loras(list(bank.values()), make_tiny_llama()),
            "`loras` is .*, but must be from names to folders, at least one. Write {",
        ),
        (lambda bank: from_loras({"a\nb": bank["law"]}, make_tiny_llama()), r"'a\\nb' may not be a name: it contains"),
        (lambda bank: from_loras(bank), "`base_model` was left out, and the LoRAs do not name one model"),
        (lambda bank: from_loras(bank, make_tiny_llama(), top_q=2), "`top_q` is not a field of DomainMoeConfig"),
    ],
)
def test_from_loras_refuses(bank, call, match):
    with pytest.raises(ValueError, match=match):
        call(bank)


def test_each_folder_is_told_what_is_wrong_with_it_however_many_layers_it_has(bank, tmp_path):
    folders = {
        "rescaled": make_lora(tmp_path, "rescaled", target_modules="all-linear", use_dora=True),
        "wide": make_lora(tmp_path, "wide", target_modules="all-linear", base=_wide_llama()),
        "gpt": make_lora(tmp_path, "gpt", target_modules=["c_attn"], fan_in_fan_out=True, base=_tiny_gpt2()),
        "failed": make_lora(tmp_path, "failed", target_modules=["q_proj"]),
        "lwa": str(Path(bank["law"]).with_name("lwa")),
        "number": 3,
    }
    for name in ("damaged", "half", "empty"):
        folders[name] = str(tmp_path / name)
        shutil.copytree(bank["law"], tmp_path / name)
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    (tmp_path / "empty" / "adapter_config.json").unlink()
    weights = load_file(f"{folders['failed']}/adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, f"{folders['failed']}/adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing was changed") as error:
        from_loras(folders, make_tiny_llama())
    told = str(error.value)
    assert len(told.splitlines()) < 25
    for name, line in {
        "rescaled": "`use_dora`: DoRA",
        "wide": "model.layers.0.mlp.down_proj: from 96 to 32, the model's layer from 96 to 64",
        "gpt": "transformer.h.0.attn.c_attn: the model has none of its 2 layers: it was trained on another backbone",
        "failed": "model.layers.0.self_attn.q_proj: its weights are not all finite numbers",
        "lwa": "there is no such folder. Did you mean 'law'?",
        "number": "`lora` is 3, but must be the folder or the Hub id of a plain LoRA",
        "damaged": "its adapter_config.json is damaged (Expecting property name",
        "half": "the folder has no adapter_model.safetensors",
        "empty": "the folder has no adapter_config.json",
    }.items():
        assert f"\n- {name} ({folders[name]}): {line}" in told


def _wide_llama():
    config = make_tiny_llama().config
    config.hidden_size, config.head_dim = 32, 8
    return type(make_tiny_llama())(config)


def _tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=100, n_positions=64)).double()


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_layers_that_store_their_weight_the_other_way_round(tmp_path, fan_in_fan_out):
    torch.manual_seed(0)
    base, tokens = _tiny_gpt2(), torch.randint(1, 100, (2, 7))
    settings = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": fan_in_fan_out, "base": copy.deepcopy(base)}
    folder = make_lora(tmp_path, "law", **settings)
    stock = logits(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval(), tokens)
    ours = from_loras({"law": folder, "code": folder}, base, gate="given").eval()
    torch.testing.assert_close(logits(ours, tokens, task_types=torch.tensor([1, 0])), stock, **EXACT)


# --- fast and slow ---


@pytest.mark.parametrize("tokens_in_all", [1, 6, 80])
@pytest.mark.parametrize("train_domains", [None, [], ["code"]])
def test_the_layer_is_the_definition_gradients_included(tokens_in_all, train_domains):
    model = adapted(domain_ranks=[2, 5, 1], train_domains=train_domains).train()
    layer = layers_of(model)[0]
    experts = layer.experts("default")
    x = torch.randn(1, tokens_in_all, layer.in_features, dtype=torch.float64, requires_grad=True)
    trained = {name: p for name, p in experts.named_parameters() if p.requires_grad}
    assert trained
    fast = layer(x)
    weight = torch.randn_like(fast)
    given = torch.autograd.grad(fast, [x, *trained.values()], weight)
    gates = dense_weights(experts.rule(x.reshape(-1, x.shape[-1]) @ experts.router.T, 2))
    slow = domains_naive(x[0], experts.factors(), dict(zip(DOMAINS, gates.T, strict=True)))
    slow = layer.base_layer(x) + slow.unsqueeze(0)
    torch.testing.assert_close(fast, slow, **EXACT)
    wanted = torch.autograd.grad(slow, [x, *trained.values()], weight)
    for name, one, two in zip(["x", *trained], given, wanted, strict=True):
        torch.testing.assert_close(one, two, **EXACT, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), slow, **EXACT)


def test_a_domain_without_an_expert_on_a_layer_leaves_it_alone(tokens):
    model = adapted(gate="given", rank_pattern={"q_proj": [3, 0, 2], "mlp.up_proj": [0, 1, 1]})
    x = torch.randn(2, 4, 64, dtype=torch.float64)
    for layer, domain in zip(layers_of(model), (1, 0), strict=False):
        model.base_model.model.context = layer.context
        with moe_peft.task_types(model, [domain, domain]):
            layer.context.rows = 2
            assert torch.equal(layer(x), layer.base_layer(x))


# --- names on disk ---


@pytest.mark.parametrize("gate", GATES)
def test_the_file_names_the_experts_and_gives_the_same_logits_again(tmp_path, tokens, gate):
    model = adapted(dtype=torch.float32, gate=gate, domain_ranks=[1, 2, 3])
    if gate in ("sequence", "prototype"):
        moe_peft.prototypes.gate_of_model(model).null_threshold.fill_(-2.5)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {key.rpartition("lora_A_")[2] for key in keys if "lora_A_" in key} == set(DOMAINS)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["domains"] == DOMAINS
    types = {"task_types": torch.tensor([0, 1, 2])} if gate == "given" else {}
    before = logits(model, tokens, **types)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert (
        loaded.peft_config["default"].to_dict() | {"inference_mode": False} == model.peft_config["default"].to_dict()
    )
    torch.testing.assert_close(logits(loaded, tokens, **types), before, rtol=0, atol=1e-6)
    model.peft_config["default"].inference_mode = False
    other = make_tiny_llama()
    other.load_adapter(str(tmp_path), adapter_name="mine")  # transformers' own door
    torch.testing.assert_close(logits(other, tokens, **types), before, rtol=0, atol=1e-6)


def test_a_missing_expert_is_refused_by_name_and_folder(tmp_path):
    model = adapted(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.endswith("_law")}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"saved weights in '{tmp_path}' have no expert for 'law'.*`domains`"):
        PeftModel.from_pretrained(make_tiny_llama(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config.update(domains=["medicine"], num_experts=1, top_k=1, domain_ranks=None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="an unexpected expert for 'code'"):
        PeftModel.from_pretrained(make_tiny_llama(), tmp_path)


def test_layers_tell_their_experts_by_name(bank):
    model = from_loras(bank, make_tiny_llama(dtype=torch.float64))
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    assert layer.expert_names("default") == DOMAINS
    factors = layer.expert_factors("default")
    assert {name: (A.shape, B.shape) for name, (A, B) in factors.items()} == {
        "law": ((2, 64), (2, 96)),
        "code": ((3, 64), (3, 96)),
    }
    A, B = factors["law"]
    stock = PeftModel.from_pretrained(make_tiny_llama(dtype=torch.float64), bank["law"])
    delta = stock.get_submodule("base_model.model.model.layers.1.mlp.up_proj").get_delta_weight("default")
    torch.testing.assert_close(B.T @ A, delta, **EXACT)


# --- frozen ---


def trained_names(model) -> set[str]:
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


WAYS = {
    "made": lambda model: None,
    "disable_adapter": lambda model: model.disable_adapter().__enter__(),
    "disabled and back": lambda model: exec("with model.disable_adapter(): pass", {"model": model}),
    "set_adapter": lambda model: model.set_adapter("default"),
    "another and back": lambda model: (
        model.add_adapter("two", DomainMoeConfig(domains=["a", "b"], target_modules=["q_proj"])),
        model.set_adapter("two"),
        model.set_adapter("default"),
        model.delete_adapter("two"),
    ),
    "layers disabled and enabled": lambda model: (
        model.base_model.disable_adapter_layers(),
        model.base_model.enable_adapter_layers(),
    ),
    "set_requires_grad": lambda model: model.set_requires_grad("default", True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("train_domains", [[], ["code"]])
def test_frozen_experts_stay_frozen(bank, way, train_domains):
    model = from_loras(bank, make_tiny_llama(dtype=torch.float64), train_domains=train_domains)
    way(model)
    assert trained_names(model) <= {"router"} | {f"lora_{f}_{d}" for d in train_domains for f in "AB"}


def test_a_step_with_weight_decay_moves_the_trained_experts_alone(bank, tokens):
    model = from_loras(bank, make_tiny_llama(dtype=torch.float64), train_domains=["code"]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {name.rpartition(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"router", "lora_A_code", "lora_B_code"}


def test_a_saved_adapter_may_go_on_with_other_domains_trained(tmp_path, tokens):
    model = adapted(dtype=torch.float32, train_domains=["law"])
    model.save_pretrained(tmp_path)
    config = DomainMoeConfig.from_pretrained(tmp_path)
    config.train_domains, config.inference_mode = ["code"], False
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path, config=config, is_trainable=True)
    assert trained_names(loaded) == {"router", "lora_A_code", "lora_B_code"}
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-6)


# --- what the config refuses ---

NAMES = {"domains": ["law", "code"]}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "`domains` is None, but must be a list with the name of each expert"),
        ({"domains": ["law", "law"]}, "two domains have one name: 'law' and 'law'"),
        ({"domains": ["law", "LAW"]}, "two domains have one name: 'law' and 'LAW'"),
        ({"domains": ["a.b", "c"]}, r"'a.b' may not be a name: it contains '.'"),
        ({"domains": ["null", "c"]}, "'null', the name of no expert"),
        ({"domains": ["", "c"]}, "'' is no name"),
        ({**NAMES, "gate": "tokens"}, "`gate` is 'tokens', but must be one of .* Did you mean 'token'"),
        ({**NAMES, "num_experts": 3}, "`num_experts` is 3, but must be left out, or 2, as many as `domains`"),
        ({**NAMES, "num_shared_experts": 1}, "`num_shared_experts` is 1, but must be 0 for domains"),
        ({**NAMES, "init_weights": "pissa"}, "`init_weights` is 'pissa', but must be True or False for domains"),
        ({**NAMES, "r": "2:4"}, "`r` is '2:4', but must be a whole number of at least 1 for domains"),
        ({**NAMES, "domain_ranks": [2]}, "`domain_ranks` is .* must be a list of 2 whole numbers of at least 1"),
        ({**NAMES, "rank_pattern": {"q_proj": [0, 0]}}, "`rank_pattern` is .* one per domain and not all 0"),
        ({**NAMES, "rank_pattern": ["q_proj"]}, "`rank_pattern` is .* must be a dict"),
        ({**NAMES, "train_domains": ["lwa"]}, "`train_domains` is .* Did you mean 'law'"),
        ({**NAMES, "train_domains": "law"}, "`train_domains` is 'law', but must be a list of names"),
        ({**NAMES, "gate_training": "label"}, "`gate_training` is 'label', but must be one of"),
        ({**NAMES, "gate": "arrow", "gate_training": "labels"}, "must be 'loss' with `gate` = 'arrow'"),
        ({"domains": ["law"], "gate_training": "labels"}, "trained on one domain only has nothing to tell apart"),
        ({**NAMES, "router_supervision_coef": 0}, "`router_supervision_coef` is 0, but must be a positive number"),
        ({**NAMES, "gate": "sequence", "routing": "top_1"}, "`routing` is 'top_1', but must be left out with `gate`"),
        ({**NAMES, "routing": "given"}, "Use `gate='given'`"),
        ({**NAMES, "gate": "sequence", "num_null_experts": 1}, "`num_null_experts` is 1, but must be left out"),
        ({**NAMES, "gate": "prototype", "router_scale": 2.0}, "`router_scale` is 2.0, but must be 1.0 with `gate`"),
        ({**NAMES, "gate": "sequence", "balance": "mi"}, "`balance` is 'mi', but must be 'none' with `gate`"),
        ({**NAMES, "router_jitter_noise": 0.1}, "`router_jitter_noise` is 0.1, but must be 0.0 with `gate`"),
        ({**NAMES, "top_k": 1}, "`top_k` is 1, but must be at least 2"),
    ],
)
def test_the_config_refuses(settings, match):
    with pytest.raises(ValueError, match=match):
        DomainMoeConfig(**settings)


def test_one_expert_of_the_gates_choice_weighs_1_where_labels_train_the_gate():
    config = DomainMoeConfig(**NAMES, top_k=1, gate_training="both")
    assert (config.routing, config.top_k) == ("top_1_hard", 1)
    assert (
        DomainMoeConfig(**{k: v for k, v in config.to_dict().items() if k != "peft_type"}).to_dict()
        == config.to_dict()
    )


def test_what_is_kept_for_a_generation_does_not_outlive_it(tokens):
    model = adapted()
    context = layers_of(model)[0].context
    model.generate(input_ids=tokens, max_new_tokens=3)
    assert context.kept is None
    with torch.no_grad():
        before = logits(model, tokens[:1, :5])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(2)  # which no version counter sees
        assert not torch.allclose(logits(model, tokens[:1, :5]), before)


def test_tokens_of_one_generation_share_the_stacked_experts(tokens):
    model = adapted()
    stacked = []
    experts = layers_of(model)[0].experts("default")
    experts._kept = lambda context, dtype: stacked.append(type(experts)._kept(experts, context, dtype)) or stacked[-1]
    model.generate(input_ids=tokens, max_new_tokens=4)
    assert len(stacked) == 4
    assert all(A is stacked[0][0] for A, _ in stacked)


def test_a_static_merge_of_domains_fits_their_weighted_sum():
    """Least squares has a lower error on its own text than the mean weight of each expert; unequal ranks stay as they are."""
    torch.manual_seed(0)
    ranks = {"domain_ranks": [2, 3], "rank_pattern": {"up_proj": [2, 0]}, "target_modules": ["q_proj", "up_proj"]}
    config = DomainMoeConfig(domains=["a", "b"], init_weights=False, router_init_std=1.0, **ranks)
    model = get_peft_model(make_tiny_llama(), config).eval()
    batches = [{"input_ids": torch.randint(1, 90, (8, 16))}]
    errors = {}
    for method in ("lstsq", "mean"):
        factors = fit_static(model, batches, method=method)
        assert {len(pair.A) for name, pair in factors.items() if name.endswith("q_proj")} == {5}
        assert {len(pair.A) for name, pair in factors.items() if name.endswith("up_proj")} == {2}
        errors[method] = measure_agreement(model, factors, batches).layer_error
    assert all(errors["lstsq"][name] < errors["mean"][name] for name in errors["mean"])
