"""A bank of LoRAs: everything unfit is told at once by folder and field, scores can be trusted and resumed, memory is bounded."""

import itertools
import json
import math
import re
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from banks import linears, rewrite_config, write_lora
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from moe_peft import bank_scores
from moe_peft.backbone import load_tokenizer
from moe_peft.bank import fingerprint, scan_bank
from moe_peft.bank_scores import (
    Score,
    Shot,
    generated_accuracy,
    perplexity_and_accuracy,
    read_shots,
    score_bank,
)
from moe_peft.bank_selection import (
    choose,
    cosine_similarities,
    cosine_similarity,
    inverse_similarity,
    mean_ranks,
    rank,
)


WORDS = ("abc", "de", "fghi", "jk", "lmn", "op")


@pytest.fixture
def tokenizer():
    return load_tokenizer("pocket")


def backbone(dtype=torch.float32):
    model = make_tiny_llama(layers=2, dtype=dtype)
    model.config._name_or_path = "models/tiny"
    return model


def fill(folder, number, r=4, names=("q_proj", "down_proj"), **settings):
    layers = linears(backbone(), *names)
    for i in range(number):
        write_lora(folder / f"lora{i:03}", layers, r=r, seed=i, base="elsewhere/tiny", **settings)
    return folder


def shots_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def shots(tmp_path, tokenizer):
    rows = [{"prompt": f"rev:{w}>", "completion": w[::-1]} for w in WORDS]
    return read_shots(shots_file(tmp_path / "shots.jsonl", rows), tokenizer)


# ----- What is in it -----


def test_a_bank_lists_what_can_be_used(tmp_path):
    fill(tmp_path, 3)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    steps = []
    bank = scan_bank(tmp_path, backbone(), on_step=lambda *step: steps.append(step))
    assert [entry.name for entry in bank.entries] == ["lora000", "lora001", "lora002"]
    assert [entry.r for entry in bank.entries] == [4] * 3
    assert len({entry.fingerprint for entry in bank.entries}) == 3
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not bank.unusable


def spoiled(tmp_path):
    """A bank with one of each mistake; folder -> what has to be said of it."""
    bank = fill(tmp_path / "bank", 9)
    folder = {i: bank / f"lora00{i}" for i in range(9)}
    rewrite_config(folder[1], base_model_name_or_path="somebody/another")
    get_peft_model(backbone(), LoraConfig(target_modules=["q_proj"], use_dora=True)).save_pretrained(bank / "dora")
    rewrite_config(folder[2], bias="lora_only")
    (folder[3] / "adapter_model.safetensors").unlink()
    weights = load_file(folder[4] / "adapter_model.safetensors")
    wide = next(key for key in weights if "lora_B" in key)
    save_file({**weights, wide: torch.zeros(70, 4)}, folder[4] / "adapter_model.safetensors")
    other = {
        key.replace("layers.1", "layers.7"): w for key, w in load_file(folder[5] / "adapter_model.safetensors").items()
    }
    save_file(other, folder[5] / "adapter_model.safetensors")
    rewrite_config(folder[6], r=5)
    whole = (folder[7] / "adapter_model.safetensors").read_bytes()
    (folder[7] / "adapter_model.safetensors").write_bytes(whole[:-100])
    (folder[8] / "adapter_config.json").write_text("{")
    (bank / "empty").mkdir()
    return bank, {
        "lora001": "`base_model_name_or_path` is 'somebody/another', and this backbone is 'models/tiny'",
        "dora": "`use_dora`: DoRA",
        "lora002": "`bias` is 'lora_only'",
        "lora003": "it has no adapter_model.safetensors: no weights",
        "lora004": "the backbone's from",
        "lora005": "model.layers.7.mlp.down_proj: the backbone has no such layer",
        "lora006": "the config says rank 5, the weights have 4",
        "lora007": "is damaged",
        "lora008": "its adapter_config.json cannot be read|Expecting property name",
        "empty": "it has no adapter_config.json, so it is no adapter",
    }


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    bank, wanted = spoiled(tmp_path)
    with pytest.raises(ValueError, match="10 of 11 folders in the bank .* cannot be used") as caught:
        scan_bank(bank, backbone())
    for name, part in wanted.items():
        lines = [line for line in str(caught.value).splitlines() if line.startswith(f"- {name}: ")]
        assert any(re.search(part, line) for line in lines), (name, lines)
    assert "Mend or remove them, or go on without: `skip_unusable`." in str(caught.value)


def test_what_does_not_fit_is_listed_and_skipped_if_asked(tmp_path):
    bank, wanted = spoiled(tmp_path)
    found = scan_bank(bank, backbone(), skip_unusable=True)
    assert [entry.name for entry in found.entries] == ["lora000"]
    assert found.unusable.keys() == wanted.keys()
    assert "lora001" not in scan_bank(bank, backbone(), skip_unusable=True, check_base=False).unusable
    (bank / "lora000" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="11 of 11 folders .*(.|\n)*Nothing is left to choose from"):
        scan_bank(bank, backbone(), skip_unusable=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "but must be a folder. Put the folders of your LoRAs into one"),
        (lambda path: path.mkdir(), "but must be a folder of LoRA folders. This one holds no folder."),
        (lambda path: write_lora(path, {"a": (2, 2)}), "It is a LoRA itself: name the folder around it."),
    ],
)
def test_a_bank_has_to_be_a_folder_of_folders(make, message, tmp_path):
    make(tmp_path / "bank")
    with pytest.raises(ValueError, match=re.escape(message)):
        scan_bank(tmp_path / "bank")


def test_a_pickled_lora_is_not_opened(tmp_path):
    folder = fill(tmp_path / "bank", 1) / "lora000"
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="only an adapter_model.bin: load it and save it again with PEFT"):
        scan_bank(tmp_path / "bank")


# ----- Scores -----


def adapted_by_hand(folder, dtype=torch.float32):
    return PeftModel.from_pretrained(backbone(dtype), folder).to(dtype).eval()


def test_perplexity_is_what_the_loss_of_each_row_says(tmp_path, tokenizer, shots):
    folder = fill(tmp_path / "bank", 1, scale=3.0) / "lora000"
    model = adapted_by_hand(folder, torch.float64)
    total, tokens = 0.0, 0
    for shot in shots:
        labels = torch.tensor([shot.labels])
        answers = int((labels != -100).sum())
        total += float(model(torch.tensor([shot.ids]), labels=labels).loss) * answers
        tokens += answers
    for batch_size in (1, 4):
        found, _ = perplexity_and_accuracy(model, shots, tokenizer, batch_size)
        assert found == pytest.approx(math.exp(total / tokens), rel=1e-5)


class Parrot(torch.nn.Module):
    """Writes one fixed text after every prompt: right for the rows whose answer that is."""

    def __init__(self, shots, right):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.answers = {}
        for shot, known in zip(shots, right, strict=True):
            start = next(i for i, label in enumerate(shot.labels) if label != -100)
            answer = shot.ids[start:] if known else [*shot.ids[start:-2], 9, shot.ids[-1]]
            self.answers[tuple(shot.ids[:start])] = answer

    def forward(self, input_ids, attention_mask, use_cache=False):
        logits = torch.zeros(*input_ids.shape, 100)
        for row, ids in enumerate(input_ids.tolist()):
            for prompt, answer in self.answers.items():
                if tuple(ids[: len(prompt)]) == prompt:
                    for i, token in enumerate(answer):
                        if len(prompt) - 1 + i < len(ids):
                            logits[row, len(prompt) - 1 + i, token] = 9.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("right", [(1, 1, 1, 1, 1, 1), (1, 0, 0, 1, 0, 0), (0,) * 6], ids=str)
def test_an_answer_is_right_if_all_of_it_is(right, shots, tokenizer):
    found, accuracy = perplexity_and_accuracy(Parrot(shots, right), shots, tokenizer, 4)
    assert accuracy == pytest.approx(sum(right) / 6)
    assert found >= 1


def test_accuracy_is_that_of_greedy_generation(tokenizer):
    from moe_peft.pocket import knowledge_probe
    from moe_peft.trial import load_pocket

    model, _ = load_pocket(quantize=False)
    rows = [
        *knowledge_probe()[:12],
        {"prompt": "rev:abc>", "completion": "abc"},
        {"prompt": "1+1>", "completion": "22"},
    ]
    encoded = [bank_scores.encode(dict(row), tokenizer) for row in rows]
    shots = [Shot(*pair, dict(row)) for pair, row in zip(encoded, rows, strict=True)]
    fast = perplexity_and_accuracy(model.eval(), shots, tokenizer, 5)[1]
    assert fast == generated_accuracy(model, shots, tokenizer, batch_size=5)
    assert 0 < fast < 1


def test_a_final_answer_or_a_scorer_decides_where_the_reasoning_is_free(tmp_path, tokenizer):
    from moe_peft.trial import load_pocket

    model, _ = load_pocket(quantize=False)
    rows = [
        {"prompt": "rev:abc>", "completion": "first c: cba", "final_answer": "ba"},
        {"prompt": "rev:fgh>", "completion": "first h: hgf", "final_answer": "gh"},
    ]
    shots = read_shots(shots_file(tmp_path / "free.jsonl", rows), tokenizer)
    assert generated_accuracy(model.eval(), shots, tokenizer) == 0.5  # it writes "cba" and "hgf" at once
    seen = []
    assert (
        generated_accuracy(model, shots, tokenizer, lambda text, row: seen.append((text, row["prompt"])) or 0.25)
        == 0.25
    )
    assert seen == [("cba", "rev:abc>"), ("hgf", "rev:fgh>")]
    with pytest.raises(ValueError, match="`scorer` is 2.0, but must be a function whose result is from 0 to 1"):
        generated_accuracy(model, shots, tokenizer, lambda text, row: 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "rev:abc>cba"}], "has no prompt apart from the answer"),
        ([{"prompt": "a"}], "are in no format known here"),
    ],
)
def test_shots_need_a_prompt_and_an_answer(rows, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        read_shots(shots_file(tmp_path / "s.jsonl", rows), tokenizer)


@pytest.mark.parametrize("quantize", [False, True])
def test_the_backbone_is_left_bit_for_bit(quantize, tmp_path, tokenizer, shots):
    if quantize:
        pytest.importorskip("bitsandbytes")
    from moe_peft.trial import load_pocket

    model, _ = load_pocket(quantize)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    layers = linears(load_pocket(False)[0], "q_proj", "up_proj")
    for i in range(2):
        write_lora(tmp_path / "bank" / f"l{i}", layers, seed=i)
    scores = score_bank(model, tokenizer, scan_bank(tmp_path / "bank", model).entries, shots)
    assert scores[0] != scores[1]._replace(name=scores[0].name)
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not getattr(model, "_hf_peft_config_loaded", False)


def test_a_score_is_that_of_the_lora_alone(tmp_path, tokenizer, shots):
    bank = fill(tmp_path / "bank", 3, scale=3.0)
    for found in score_bank(backbone(), tokenizer, scan_bank(bank).entries, shots):
        alone = perplexity_and_accuracy(adapted_by_hand(bank / found.name), shots, tokenizer)
        assert (found.perplexity, found.accuracy) == alone


def test_an_interrupted_run_goes_on_and_a_changed_folder_is_scored_again(tmp_path, tokenizer, shots, monkeypatch):
    bank, record = fill(tmp_path / "bank", 4, scale=3.0), tmp_path / "out" / "scores.jsonl"
    entries, scored = scan_bank(bank).entries, []

    def counted(model, *args):
        scored.append(1)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return perplexity_and_accuracy(model, *args)

    monkeypatch.setattr(bank_scores, "perplexity_and_accuracy", counted)
    model = backbone()
    with pytest.raises(KeyboardInterrupt):
        score_bank(model, tokenizer, entries, shots, record)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert len(record.read_text().splitlines()) == 2
    with record.open("a") as file:
        file.write('{"name": "lora002", "perpl')  # killed while it wrote
    whole = score_bank(model, tokenizer, entries, shots, record)
    assert len(scored) == 5
    assert (
        whole
        == score_bank(model, tokenizer, entries, shots, record)
        == score_bank(backbone(), tokenizer, entries, shots)
    )
    assert [json.loads(line)["name"] for line in record.read_text().splitlines()] == [e.name for e in entries]
    before = len(scored)
    weights = load_file(bank / "lora001" / "adapter_model.safetensors")
    save_file({key: 2 * w for key, w in weights.items()}, bank / "lora001" / "adapter_model.safetensors")
    again = score_bank(model, tokenizer, scan_bank(bank).entries, shots, record)
    assert len(scored) == before + 1
    assert again[1] != whole[1]
    assert again[0] == whole[0]
    score_bank(model, tokenizer, entries, shots[:3], record)  # other shots: nothing of it holds
    assert len(scored) == before + 5


def test_a_record_with_something_else_in_it_is_refused(tmp_path, tokenizer, shots):
    entries = scan_bank(fill(tmp_path / "bank", 1)).entries
    record = tmp_path / "scores.jsonl"
    record.write_text('{"name": "x"}\nhello\n')
    with pytest.raises(ValueError, match="Line 1 of .*scores.jsonl is no score"):
        score_bank(backbone(), tokenizer, entries, shots, record)
    assert record.read_text() == '{"name": "x"}\nhello\n'


def test_scoring_needs_shots_and_a_bare_backbone(tmp_path, tokenizer, shots):
    entries = scan_bank(fill(tmp_path / "bank", 1)).entries
    with pytest.raises(ValueError, match="`shots` is 0, but must be at least one labelled example"):
        score_bank(backbone(), tokenizer, entries, [])
    with pytest.raises(ValueError, match="The model carries an adapter. Give the backbone alone"):
        score_bank(adapted_by_hand(entries[0].folder), tokenizer, entries, shots)


def test_weights_that_do_not_fit_leave_the_backbone_bare(tmp_path, tokenizer, shots):
    write_lora(tmp_path / "bank" / "wide", {"model.layers.0.self_attn.q_proj": (64, 70)})
    model = backbone()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(RuntimeError, match="size mismatch"):
        score_bank(model, tokenizer, scan_bank(tmp_path / "bank").entries, shots)
    assert [name for name, _ in model.named_parameters()] == names


def test_broken_weights_come_last(tmp_path, tokenizer, shots):
    bank, record = fill(tmp_path / "bank", 2), tmp_path / "scores.jsonl"
    weights = load_file(bank / "lora000" / "adapter_model.safetensors")
    save_file(
        {key: torch.full_like(w, torch.nan) for key, w in weights.items()},
        bank / "lora000" / "adapter_model.safetensors",
    )
    for _ in range(2):
        scores = score_bank(backbone(), tokenizer, scan_bank(bank).entries, shots, record)
        assert scores[0].perplexity == math.inf
        assert list(rank(scores)) == ["lora001", "lora000"]


# ----- The choice -----


def test_equal_values_share_their_ranks():
    assert mean_ranks([3.0, 1.0, 3.0, 2.0, 3.0]) == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert mean_ranks([math.inf, 0.0]) == [2.0, 1.0]


def test_ranks_add_up_and_the_lower_perplexity_decides():
    scores = [Score("a", 2.0, 0.5), Score("b", 1.0, 0.1), Score("c", 3.0, 0.9), Score("d", 9.0, 0.0)]
    assert rank(scores) == {"b": (1, 3), "a": (2, 2), "c": (3, 1), "d": (4, 4)}
    assert list(rank(scores)) == ["b", "a", "c", "d"]


def test_the_similarity_of_all_is_that_of_each_pair(tmp_path):
    shapes = linears(backbone(), "q_proj", "down_proj")
    fewer = dict(list(shapes.items())[:2])
    made = [
        write_lora(tmp_path / "a", shapes, r=4, seed=0),
        write_lora(tmp_path / "b", shapes, r=2, seed=0),
        write_lora(tmp_path / "c", fewer, r=4, seed=0),
        write_lora(tmp_path / "d", shapes, r=4, seed=3),
    ]
    weights = load_file(made[0] / "adapter_model.safetensors")
    near = write_lora(tmp_path / "e", shapes, r=4)
    save_file(
        {key: w + 0.3 * torch.randn_like(w) * w.std() for key, w in weights.items()},
        near / "adapter_model.safetensors",
    )
    zero = write_lora(tmp_path / "f", shapes, r=4)
    save_file({key: 0 * w for key, w in weights.items()}, zero / "adapter_model.safetensors")
    made += [near, zero]
    found = cosine_similarities(made)
    for (i, first), (j, second) in itertools.product(enumerate(made), repeat=2):
        assert float(found[i, j]) == pytest.approx(cosine_similarity(first, second), abs=1e-12)
    flat = [
        torch.cat([w.flatten() for _, w in sorted(load_file(f / "adapter_model.safetensors").items())]) for f in made
    ]
    by_hand = torch.nn.functional.cosine_similarity(flat[0].double(), flat[3].double(), dim=0)
    assert float(found[0, 3]) == pytest.approx(float(by_hand), abs=1e-12)
    assert float(found[0, 4]) > 0.9
    assert float(found[5].abs().max()) == 0


def test_the_best_subset_is_the_best_of_all(tmp_path):
    """By the formula of the module's head, written out, with twins among the best that diversity has to part."""
    shapes = linears(backbone(), "q_proj")
    names = list("abcdefg")
    folders = {n: write_lora(tmp_path / n, shapes, seed=0 if n in "abc" else ord(n)) for n in names}
    scores = [Score(n, 1.0 + i, 0.9 - 0.1 * i) for i, n in enumerate(names)]
    found = choose(scores, folders, number=3, candidates=6)
    values = {}
    for subset in itertools.combinations("abcdef", 3):
        ranked = sum(1 - 2 * names.index(n) / 12 for n in subset) / 3
        pairs = [cosine_similarity(folders[x], folders[y]) for x, y in itertools.combinations(subset, 2)]
        values[subset] = ranked, 1 / max(sum(pairs) / 3, 0.05)
    most = max(diversity for _, diversity in values.values())
    best = max(values, key=lambda subset: values[subset][0] + values[subset][1] / most)
    assert tuple(found.chosen) == best
    assert found.rank_score == pytest.approx(values[best][0])
    assert found.diversity == pytest.approx(values[best][1] / most)
    assert sum(n in "abc" for n in best) == 1
    assert choose(scores, folders, 3, 6, use_diversity=False).chosen == ["a", "b", "c"]
    assert found.candidates == list("abcdef")
    assert choose(scores, folders, number=1).chosen == ["a"]


def test_cosines_that_are_noise_do_not_decide():
    cosines = torch.tensor([[1, -0.9, 0.01], [-0.9, 1, 0.2], [0.01, 0.2, 1]])
    assert (
        inverse_similarity(cosines, (0, 1)) == inverse_similarity(cosines, (0, 2)) == inverse_similarity(cosines, (0,))
    )
    assert inverse_similarity(cosines, (1, 2)) == pytest.approx(5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"number": 4}, "`select` is 4, but must be a whole number from 1 to 3, as many LoRAs as can be used"),
        ({"number": 0}, "`select` is 0, but must be a whole number from 1"),
        ({"number": 3, "candidates": 2}, "`candidates` is 2, but must be at least `select` = 3"),
    ],
)
def test_a_choice_that_is_none_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose([Score(n, 1.0, 1.0) for n in "abc"], {}, **settings)


def test_too_many_subsets_are_refused():
    with pytest.raises(
        ValueError, match="`candidates` is 40, but must be so few that they have at most 1,000,000 subsets"
    ):
        choose([Score(str(n), 1.0, 1.0) for n in range(40)], {}, 12, 40)


# ----- Memory -----


def peak_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def rss():
    import psutil

    return psutil.Process().memory_info().rss


def memory_is_bounded(folder, number):
    wide = {f"layers.{i}.q_proj": (2048, 2048) for i in range(4)}  # 256 KB each
    for i in range(number):
        write_lora(folder / f"l{i:04}", wide, seed=i, base="b")
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    before = rss()
    peak = peak_of(lambda: scan_bank(folder))
    assert fingerprint(folder / "l0000") != fingerprint(folder / "l0001")
    entries = scan_bank(folder).entries
    assert len(entries) == number
    cosine_similarities([entry.folder for entry in entries[:64]])
    grown = rss() - before
    print(f"{number} LoRAs, {size >> 20} MB on disk: Python peak {peak >> 10} KB, process grew by {grown >> 20} MB")
    assert peak < 2_000_000 + 2_000 * number + (1 << 20)
    assert grown < size / 2


def test_scanning_a_bank_takes_bounded_memory(tmp_path):
    memory_is_bounded(tmp_path, 300)


@pytest.mark.slow
def test_scanning_a_bank_of_a_thousand_takes_bounded_memory(tmp_path, tokenizer, shots):
    memory_is_bounded(tmp_path / "wide", 1000)
    bank = fill(tmp_path / "bank", 1000)
    model = backbone()
    entries = scan_bank(bank, model).entries
    score_bank(model, tokenizer, entries[:50], shots)
    before = rss()
    score_bank(model, tokenizer, entries, shots, tmp_path / "scores.jsonl")
    assert rss() - before < 64 << 20
