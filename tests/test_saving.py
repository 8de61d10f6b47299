"""Saving is whole or not at all, and what does not fit or is damaged is refused at loading, in sentences."""

import json
import os

import peft.peft_model
import pytest
import torch
from conftest import make_tiny_llama
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_peft import LinearMoeConfig
from moe_peft.saving import UNFINISHED, check_weights, save_adapter


SETTINGS = {"num_experts": 2, "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_weights": False}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def make_adapted(seed: int = 2, **settings) -> PeftModel:
    base = make_tiny_llama()  # which sets the seed as well
    torch.manual_seed(seed)
    return get_peft_model(base, LinearMoeConfig(**{**SETTINGS, **settings})).eval()


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def load(folder) -> PeftModel:
    return PeftModel.from_pretrained(make_tiny_llama(), folder)


@pytest.fixture
def saved(tmp_path):
    """The folder of a whole adapter, and of its base model beside it."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    model = make_adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# --- saving in one step ---


def test_save_adapter_writes_what_peft_writes(tmp_path):
    model = make_adapted()
    torch.manual_seed(3)
    model.add_adapter("second", LinearMoeConfig(**SETTINGS))
    model.save_pretrained(tmp_path / "pefts")
    save_adapter(model, tmp_path / "ours")
    for path in (path for path in (tmp_path / "pefts").rglob("*") if path.is_file()):
        ours = tmp_path / "ours" / path.relative_to(tmp_path / "pefts")
        if path.name == "README.md":  # PEFT's text, and our sections in front of it
            assert path.read_text().split("---\n", 2)[2].strip() in ours.read_text()
        else:
            assert ours.read_bytes() == path.read_bytes()
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["README.md", CONFIG, WEIGHTS, "second"]


def test_save_adapter_leaves_other_files_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    save_adapter(make_adapted(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


class Killed(BaseException):
    """No `except Exception` catches it, as none catches SIGKILL."""


def half_a_file(tensors, path, **kwargs):
    save_file(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)
    raise Killed


def kill_at(monkeypatch, place: str) -> None:
    if place == "weights":
        monkeypatch.setattr(peft.peft_model, "safe_save_file", half_a_file)
    elif place == "config":

        def no_config(*args, **kwargs):
            raise Killed

        monkeypatch.setattr(LinearMoeConfig, "save_pretrained", no_config)
    else:
        replace, left = os.replace, int(place.removeprefix("move "))

        def replace_some(source, target):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_some)


@pytest.mark.parametrize("place", ["weights", "config", "move 0", "move 1", "move 2"])
@pytest.mark.parametrize("changes", [{}, {"lora_alpha": 64}], ids=["same config", "other config"])
def test_an_interrupted_save_never_leaves_half_an_adapter(tmp_path, tokens, monkeypatch, place, changes):
    old, new = make_adapted(seed=2), make_adapted(seed=3, **changes)
    save_adapter(old, tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, place)
        with pytest.raises(Killed):
            save_adapter(new, tmp_path)
    whole = [logits(model, tokens) for model in (old, new)]
    try:
        found = logits(load(tmp_path), tokens)
    except ValueError as error:  # between two moves of files of different adapters: none of the two
        assert place.startswith("move") and changes and f"Can't find '{CONFIG}'" in str(error)  # noqa: PT017, PT018
    else:
        assert any(torch.allclose(found, one, atol=1e-6) for one in whole)
        if not place.startswith("move"):
            assert torch.allclose(found, whole[0], atol=1e-6)
    save_adapter(new, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path), tokens), whole[1])
    assert not (tmp_path / UNFINISHED).exists()


def test_what_pefts_own_save_leaves_when_it_is_interrupted_is_refused(saved, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, "weights")
        with pytest.raises(Killed):
            make_adapted(seed=3).save_pretrained(saved)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors` is damaged"):
        load(saved)


# --- a damaged file ---


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.5, -1])
def test_a_weights_file_that_was_cut_short_is_refused_by_name(saved, kept):
    path = saved / WEIGHTS
    size = path.stat().st_size
    kept = int(kept * size) if isinstance(kept, float) else kept % size
    os.truncate(path, kept)
    sentence = (
        rf"`{path}` is damaged: it has {kept} bytes.*interrupted.*Save the adapter again, or fetch the file anew"
    )
    doors = (
        lambda: load(saved),
        lambda: AutoPeftModelForCausalLM.from_pretrained(saved),
        lambda: make_adapted().load_adapter(saved, "other"),
        lambda: LinearMoeConfig.from_pretrained(saved),
        lambda: LinearMoeConfig.from_pretrained(saved.parent, subfolder=saved.name),
    )
    for door in doors:
        with pytest.raises(ValueError, match=sentence):
            door()


@pytest.mark.parametrize("content", [b"\x08" + b"\0" * 7 + b"not json", b"\x02" + b"\0" * 7 + b"[]", b"{}" * 50])
def test_a_file_that_is_no_safetensors_file_is_refused_by_name(saved, content):
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors` is damaged"):
        load(saved)


def test_a_whole_file_and_a_folder_without_one_pass(saved, tmp_path):
    check_weights(saved)
    check_weights(tmp_path / "not there")
    (saved / WEIGHTS).unlink()
    assert LinearMoeConfig.from_pretrained(saved).num_experts == 2


# --- tensors that do not fit ---


def change(folder, edit) -> None:
    """Rewrite the weights file with `edit(tensors)` applied; keys are sorted."""
    tensors = load_file(folder / WEIGHTS)
    tensors = dict(sorted(tensors.items()))
    edit(tensors, list(tensors))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop_first(tensors, keys):
    del tensors[keys[0]]


def add_a_layer(tensors, keys):
    tensors[keys[1].replace(".0.", ".9.")] = tensors[keys[1]].clone()


def cut_third(tensors, keys):
    tensors[keys[2]] = tensors[keys[2]][:1].clone()


def all_three(tensors, keys):
    for edit in (drop_first, add_a_layer, cut_third):
        edit(tensors, keys)


FIRST_LAYER = r"base_model.model.model.layers.0.self_attn.q_proj.linear_moe_experts"
MISSING = rf"\n- missing: {FIRST_LAYER}.default.lora_A"
LEFT_OVER = rf"\n- not in the model: {FIRST_LAYER.replace('.0.', '.9.')}.lora_B"
MISSHAPEN = (
    rf"\n- of another shape: {FIRST_LAYER}.default.router: \[1, 64\], the config and the base model ask for \[2, 64\]"
)


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (drop_first, [MISSING]),
        (add_a_layer, [LEFT_OVER]),
        (cut_third, [MISSHAPEN]),
        (all_three, [MISSING, LEFT_OVER, MISSHAPEN]),
    ],
)
def test_tensors_that_do_not_fit_are_named_a_line_each_and_none_is_loaded(saved, tokens, edit, lines):
    change(saved, edit)
    sentence = "The saved weights do not fit adapter 'default', and none were loaded.*:"
    with pytest.raises(ValueError, match=sentence + "".join(lines) + "$"):
        load(saved)
    model = make_adapted()
    before = logits(model, tokens)
    with pytest.raises(ValueError, match="do not fit adapter 'other'"):
        model.load_adapter(saved, "other")
    assert torch.equal(logits(model, tokens), before)


def test_weights_of_another_config_are_refused(saved):
    path = saved / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": 4}))
    with pytest.raises(
        ValueError, match=r"lora_A: \[2, 2, 64\], the config and the base model ask for \[4, 2, 64\]\n"
    ):
        load(saved)


def test_weights_for_a_deeper_base_are_refused(saved):
    with pytest.raises(ValueError, match=r"not in the model: .*layers\.2\..*\n- not in the model: .*layers\.3\."):
        PeftModel.from_pretrained(make_tiny_llama(layers=2), saved)


def test_a_long_list_is_cut(saved):
    change(saved, lambda tensors, keys: [tensors.pop(key) for key in keys[1:]])
    model = make_adapted(target_modules=["q_proj", "k_proj", "v_proj"])
    with pytest.raises(ValueError, match=r"do not fit adapter 'default'(.|\n)*\n- and 15 more$") as error:
        set_peft_model_state_dict(model, load_file(saved / WEIGHTS))
    assert str(error.value).count("\n- missing: ") == 20


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_saved_beside_the_experts_is_loaded_with_them(tmp_path, tokens, low_cpu_mem_usage):
    model = make_adapted(modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "linear_moe" not in name:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens))


def test_a_state_dict_goes_from_one_adapter_to_another(tokens):
    model = make_adapted()
    before = logits(model, tokens)
    torch.manual_seed(3)
    model.add_adapter("copy", LinearMoeConfig(**SETTINGS))
    set_peft_model_state_dict(model, get_peft_model_state_dict(model), adapter_name="copy")
    model.set_adapter("copy")
    torch.testing.assert_close(logits(model.eval(), tokens), before)


# --- transformers' own loading, which asks no method of ours; what it does say ---


def test_transformers_reports_a_missing_tensor(saved):
    change(saved, drop_first)
    report = make_tiny_llama().load_adapter(str(saved))
    assert report.missing_keys == {"model.layers.0.self_attn.q_proj.linear_moe_experts.default.lora_A"}


@pytest.mark.parametrize("kept", [100, 0.5])
def test_transformers_refuses_a_damaged_file(saved, kept):
    path = saved / WEIGHTS
    os.truncate(path, int(kept * path.stat().st_size) if isinstance(kept, float) else kept)
    with pytest.raises(SafetensorError):
        make_tiny_llama().load_adapter(str(saved))


def test_transformers_refuses_a_tensor_of_another_shape(saved):
    change(saved, cut_third)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        make_tiny_llama().load_adapter(str(saved))
