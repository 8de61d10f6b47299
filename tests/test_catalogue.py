"""The catalogue: every entry is whole, harmless at the start, counts as its paper does; and what is misspelt is refused."""

import dataclasses
import json
import re

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import GPTBigCodeConfig, LlamaConfig

import moe_peft
from moe_peft import catalogue, plain_yaml
from moe_peft.budget import count_config, meta_backbone
from moe_peft.catalogue import adapter_config, entry_folder, from_catalogue, methods, recipe


LLAMA_2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
AS_PUBLISHED = {"mola": (105_635_840, 5_693_440), "loramoe": (38_486_016, 3_686_400)}  # all, of them in routers
AS_PUBLISHED |= dict.fromkeys(("mixlora", "mixlora-dynamic", "mixlora-switch"), (203_423_744, 1_048_576))
AS_PUBLISHED |= {"llava-mole": (173_146_208, 393_312), "mos": (4_997_120, 0), "mosa": (19_988_480, 0)}
AS_PUBLISHED |= {"smora": (232_783_872, 72_876_032), "moram": (19_988_480, 0)}


def on_llama_2_7b(
    width: int, inputs: int, experts: int, r: int, choices: int | None = None, constants: int = 0
) -> tuple[int, int]:
    """(all, routers) by arithmetic: per layer `E r (d_in + d_out)`, a router row of d_in for each choice on each linear, and
    `d_out` for each constant expert. Here `width` is the sum of d_in + d_out over the adapted linears of a layer and
    `inputs` that of d_in, so that the sum of d_out is their difference."""
    routers = 32 * (experts if choices is None else choices) * inputs
    return routers + 32 * (experts * r * width + constants * (width - inputs)), routers


D_MODEL, D_FFN = 4096, 11008
FFN = (3 * (D_MODEL + D_FFN), 2 * D_MODEL + D_FFN)  # gate, up, down: sums of d_in + d_out and of d_in
EVERY = (4 * 2 * D_MODEL + FFN[0], 4 * D_MODEL + FFN[1])  # and q, k, v, o
BY_ARITHMETIC = {
    "adamoe": on_llama_2_7b(*EVERY, 4, 8, choices=4 + 8),
    "moe-plus-plus": on_llama_2_7b(*FFN, 8, 8, choices=8 + 2 + 1, constants=2),
    "dynamic-moe": on_llama_2_7b(*FFN, 8, 8),
    "ld-mole": on_llama_2_7b(*EVERY, 8, 8),
    "evomoe": on_llama_2_7b(*FFN, 8, 8),
    "smoe-dropout": on_llama_2_7b(*FFN, 16, 4, choices=0),  # the router is frozen
    "thor": on_llama_2_7b(*FFN, 2, 8, choices=0),
    "mod-squad": on_llama_2_7b(*FFN, 16, 4),
    "task-moe": on_llama_2_7b(*EVERY, 4 + 1, 8, choices=0),
    # one router for the block, on the input of gate and up
    "deepseek-moe": (32 * (64 * D_MODEL + (64 + 2) * 2 * FFN[0]), 32 * 64 * D_MODEL),
    # q and v: one A, three B and a router row for each of the three
    "hydralora": (32 * 2 * (8 * (1 + 3) * D_MODEL + 3 * D_MODEL), 32 * 2 * 3 * D_MODEL),
    # one router for the model, on the embeddings; q, k, v, o and down
    "global-lora-moe": (32 * 5 * 4 * (4 * 2 * D_MODEL + D_MODEL + D_FFN) + 5 * D_MODEL, 5 * D_MODEL),
}
# q, k, v, o and down, which stand in for StarCoder's three; a row of the model's one gate for each of five languages
STELOCODER = (32 * 5 * 4 * (4 * 2 * D_MODEL + D_MODEL + D_FFN) + 5 * D_MODEL, 5 * D_MODEL)
BY_ARITHMETIC |= {
    "meteora": on_llama_2_7b(*EVERY, 28, 8),
    "stelocoder": STELOCODER,
    "arrow-init": on_llama_2_7b(*EVERY, 4, 4),
}
AS_PUBLISHED |= BY_ARITHMETIC
SHRINKS = {"mixlora-dynamic", "mixlora-switch"}  # published with weights that sum to less than 1


@pytest.mark.parametrize("name", methods())
def test_an_entry_is_whole(name):
    config = from_catalogue(name)
    written = json.loads((entry_folder(name) / "adapter_config.json").read_text())
    for key, value in written.items():
        held = getattr(config, key)
        assert held == (set(value) if isinstance(held, set) else value), key
    assert recipe(name)["learning_rate"] > 0
    assert (entry_folder(name) / "README.md").is_file()
    assert catalogue.idea(name)


@pytest.mark.parametrize("name", methods())
def test_a_recipe_has_fields_of_sft_config_and_says_where_each_is_from(name):
    SFTConfig = pytest.importorskip("trl").SFTConfig
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(recipe(name)) <= known
    lines = (entry_folder(name) / "recipe.yaml").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or not line.strip() or "  # " in line, f"no source: {line}"


def batch_needs(config, tokens):
    """What a config needs in every batch, and in training only: the task types, and which tokens are the prompt."""
    types = {"task_types": torch.tensor([0, 1, 0])}
    routed_by_type = getattr(config, "expert_groups", None) is not None
    asked = types if routed_by_type else {}
    by_types = getattr(config, "balance", "none") == "localized" or getattr(config, "supervised", False)
    taught = types if by_types and not routed_by_type else {}
    if getattr(config, "router_granularity", "token") == "sequence":
        taught = taught | {"prompt_mask": torch.ones_like(tokens, dtype=torch.bool)}
    return asked, taught


@pytest.mark.parametrize("name", methods())
def test_an_entry_changes_nothing_at_the_start_and_learns(name, tokens):
    model = make_tiny_llama()
    before = model(tokens).logits
    config = from_catalogue(name)
    model = get_peft_model(model, config).eval()
    asked, taught = batch_needs(config, tokens)
    assert torch.equal(model(tokens, **asked).logits, before) == (name not in SHRINKS)
    model.train()
    model(tokens, labels=tokens, **asked, **taught).loss.backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is not None for _, p in trained)
    # With an expert to a parameter, those that no token of a small batch visits have a gradient of zero.
    some = any if config.peft_type.value == "DOMAIN_MOE" else all
    assert some(p.grad.abs().sum() > 0 for n, p in trained if "lora_B" in n)


@pytest.mark.parametrize("name", sorted(AS_PUBLISHED))
def test_an_entry_has_as_many_parameters_as_published(name):
    count = count_config(meta_backbone(LLAMA_2_7B), from_catalogue(name))
    assert (count.trainable, count.router) == AS_PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(BY_ARITHMETIC))
def test_a_card_says_how_many(name):
    card = (entry_folder(name) / "README.md").read_text()
    trainable, router = BY_ARITHMETIC[name]
    assert f"{trainable:,} trainable, of them {router:,} in routers" in card


def test_meteora_has_a_gate_on_each_of_224_layers_and_trains_them_alone_over_frozen_loras():
    count = count_config(meta_backbone(LLAMA_2_7B), from_catalogue("meteora", train_domains=[]))
    assert (count.layers, count.trainable, count.router) == (224, 31_883_264, 31_883_264)


def test_stelocoders_experts_have_8_9_million_parameters_on_its_own_backbone():
    settings = {
        "n_embd": 6144,
        "n_layer": 40,
        "n_head": 48,
        "n_inner": 24576,
        "vocab_size": 49152,
        "multi_query": True,
    }
    backbone = meta_backbone(GPTBigCodeConfig(**settings))
    count = count_config(backbone, from_catalogue("stelocoder"))
    by_width = (6144 + 6400) + (6144 + 6144) + (24576 + 6144)  # attention in and out, and out of the FFN
    assert (count.trainable, count.router) == (5 * 40 * 4 * by_width + 5 * 6144, 5 * 6144)
    assert round(40 * 4 * by_width / 1e6, 1) == 8.9


def test_overrides_are_checked_with_the_rest():
    assert from_catalogue("mola", r="4:8", num_experts=4).r == "4:8"
    assert moe_peft.from_catalogue("mola").num_experts == "2:4:6:8"
    with pytest.raises(ValueError, match=r"`top_k` is 3, but must be at most 2, as `num_experts` = '2:4:6:8'"):
        from_catalogue("mola", top_k=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_catalogue("loramo"), "'loramo' is not in the catalogue. Did you mean 'loramoe'?"),
        (lambda: recipe("xyz"), "'xyz' is not in the catalogue. Choose one of: 'adamoe', 'arrow-init', "),
        (lambda: from_catalogue("mola", num_expert=4), "`num_expert` is not a field of LinearMoeConfig. Did you mean"),
        (lambda: adapter_config("molara"), "'molara' is neither in the catalogue nor a folder. Did you mean 'molora'"),
        (lambda: adapter_config("./nowhere"), "'./nowhere' is neither in the catalogue nor a folder"),
        (lambda: adapter_config("no/body"), "'no/body' is no folder here, and the Hub gave no adapter_config.json"),
    ],
)
def test_what_is_misspelt_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def write(folder, **values):
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return str(folder)


def test_a_folder_is_an_adapter_too(tmp_path):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(tmp_path)
    for spec in (str(tmp_path), str(tmp_path / "adapter_config.json")):
        source = adapter_config(spec, r=2)
        assert (source.config.r, source.config.target_modules, source.recipe) == (2, {"q_proj"}, {})
        assert not source.weights
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\n")
    source = adapter_config(str(tmp_path))
    assert source.weights
    assert source.recipe == {"learning_rate": 1e-3}
    assert not source.config.inference_mode


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LINEAR_MOE", "num_experts": 4, "topk": 2}, "`topk` in .* Did you mean 'top_k'"),
        ({"peft_type": "LINER_MOE"}, "`peft_type` in .* is 'LINER_MOE', which PEFT does not know. Did you mean"),
        ({"r": 8}, "has no `peft_type`"),
    ],
)
def test_a_folder_with_a_mistake_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        adapter_config(write(tmp_path, **values))


def test_a_folder_without_a_config_and_one_with_broken_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json, so it is not an adapter"):
        adapter_config(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON: Expecting property name"):
        adapter_config(str(tmp_path))


def test_the_catalogue_is_found_inside_an_installed_package(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "_HERE", tmp_path / "moe_peft")
    with pytest.raises(FileNotFoundError, match=r"The catalogue `adapters/` is neither in .* nor beside it"):
        methods()
    entry = tmp_path / "moe_peft" / "adapters" / "tiny"
    entry.mkdir(parents=True)
    write(entry, peft_type="LINEAR_MOE", num_experts=2)
    assert methods() == ["tiny"]
    assert from_catalogue("tiny").num_experts == 2
    assert recipe("tiny") == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4:6:8", "2:4:6:8"),
        ("no", "no"),
        ("3e-4", 3e-4),
        ("8", 8),
        (".5", 0.5),
        ("true", True),
        ("null", None),
        ("", None),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("{use_reentrant: false}", {"use_reentrant": False}),
        ("'8'", "8"),
    ],
)
def test_yaml_means_what_it_looks_like(text, value):
    assert plain_yaml.load(text) == value
    assert type(plain_yaml.load(text)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "my.yaml is not valid YAML: while parsing"), ("- a", "my.yaml must hold settings, .* but holds a list")],
)
def test_settings_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        plain_yaml.load_settings(text, "my.yaml")


@pytest.mark.parametrize(
    ("overrides", "top_k", "balance"),
    [
        ({"routing": "softmax"}, None, "none"),
        ({"routing": "top_1"}, None, "switch"),
        ({"num_experts": 1}, 1, "switch"),
        ({"num_experts": 4}, 2, "switch"),
    ],
    ids=str,
)
def test_what_follows_from_an_override_is_decided_anew(overrides, top_k, balance):
    config = catalogue.from_catalogue("molora", **overrides)
    assert (config.top_k, config.balance) == (top_k, balance)


def test_an_override_that_contradicts_another_is_still_refused():
    with pytest.raises(ValueError, match="`top_k` is 2, but must be left out"):
        catalogue.from_catalogue("molora", routing="softmax", top_k=2)
