"""MixDA's old-knowledge loss: its definition, its gradients, and under transformers' unmodified trainer."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from test_bottleneck_moe import layers_of, roberta
from torch import nn
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from moe_peft import BottleneckMoeConfig
from moe_peft.bottleneck import bottleneck_experts_naive
from moe_peft.old_knowledge import OldKnowledgeLoss, text_blocks
from moe_peft.pocket.tokenizer import make_tokenizer


EXACT = {"rtol": 1e-9, "atol": 1e-11}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ROWS = [{"input_ids": list(range(1, 6))}, {"input_ids": list(range(9, 17))}, {"input_ids": [3, 4, 3, 4, 3, 4]}]


def padded(rows):
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {"input_ids": batch, "attention_mask": mask, "labels": batch}


def domain_model(base, domains=("law",), **settings):
    torch.manual_seed(2)
    settings = {"gate": "none", "domains": list(domains), "bottleneck_size": 4, "init_weights": False, **settings}
    return get_peft_model(base, BottleneckMoeConfig(**settings))


@pytest.mark.parametrize("distance", ["output", "ffn"])
@pytest.mark.parametrize("domains", [("law",), ("law", "code")])
def test_it_is_the_distance_of_what_each_layer_puts_out(distance, domains):
    model = domain_model(make_tiny_llama(dtype=torch.float64), domains).double().train()
    loss = OldKnowledgeLoss(model, ROWS, padded, batch_size=3, distance=distance)
    torch.manual_seed(5)
    found = loss.old_knowledge()
    torch.manual_seed(5)
    batch = padded([ROWS[i] for i in torch.randint(3, (3,)).tolist()])
    seen = {}
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda m, args, out: seen.update({m: (args[0], out)}))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    parts, real = [], batch["attention_mask"].bool()
    for layer, (z, out) in seen.items():
        z, out = z[real].detach(), out[real]
        e = layer.experts("default")
        added = bottleneck_experts_naive(z, e.down, e.down_bias, e.up, e.up_bias, torch.ones(len(z), len(domains)))
        frozen = layer.base_layer(z)
        torch.testing.assert_close(out, frozen + added)  # with the adapter, and without
        difference = added - frozen if distance == "ffn" else added
        parts.append(difference.square().mean() / frozen.square().mean())
    expected = torch.stack(parts).mean()
    torch.testing.assert_close(found, expected, **EXACT)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_domains_own_loss_is_that_of_the_model(kind, tokens):
    base = make_tiny_llama() if kind == "decoder" else roberta()
    model = domain_model(base)
    labels = tokens.masked_fill(tokens < 40, -100)
    loss = OldKnowledgeLoss(model, ROWS, padded, weight=0.25)
    model.eval()
    output = model(input_ids=tokens, labels=labels)
    torch.testing.assert_close(loss(output, labels), output.loss)  # in evaluation nothing is added
    model.train()
    if kind == "encoder":
        model.get_base_model().eval()  # without dropout, both calls say the same
        model.training = True
    torch.manual_seed(5)
    whole = loss(output, labels)
    torch.manual_seed(5)
    torch.testing.assert_close(whole, 0.25 * output.loss + loss.old_knowledge())


def test_micro_batches_add_up_to_one_step(tokens):
    model = domain_model(make_tiny_llama()).train()
    labels = tokens.clone()
    labels[0, 5:] = -100
    count = (labels[:, 1:] != -100).sum()
    loss = OldKnowledgeLoss(model, ROWS[:1], padded, batch_size=1)
    whole = loss(model(input_ids=tokens), labels, count)
    parts = sum(loss(model(input_ids=tokens[i : i + 1]), labels[i : i + 1], count) for i in range(3))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_checkpointing(tokens, use_reentrant):
    found = []
    for checkpointing in (False, True):
        model = domain_model(make_tiny_llama()).train()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loss = OldKnowledgeLoss(model, ROWS, padded)
        torch.manual_seed(5)
        loss(model(input_ids=tokens), tokens).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        assert gradient.any()
        torch.testing.assert_close(found[1][name], gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_trainer_stays_as_it_is(kind, tmp_path):
    model = domain_model(make_tiny_llama() if kind == "decoder" else roberta(), init_weights=True)
    collate = (lambda rows: padded(rows)) if kind == "decoder" else MaskHalf()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    loss = OldKnowledgeLoss(model, ROWS, padded, batch_size=2)
    trainer = Trainer(model, arguments, train_dataset=ROWS, data_collator=collate, compute_loss_func=loss)
    trainer.train()
    assert all(p.any() for name, p in model.named_parameters() if p.requires_grad)
    assert not any("router" in name for name, p in model.named_parameters())


class MaskHalf:
    """As `DataCollatorForLanguageModeling`: labels on some positions alone."""

    def __call__(self, rows):
        batch = padded(rows)
        masked = torch.arange(batch["labels"].shape[1]) % 2 == 0
        return {**batch, "labels": batch["labels"].masked_fill(~masked, -100)}


def test_text_becomes_rows_of_one_length():
    tokenizer = make_tokenizer()
    rows = text_blocks(["abcd", "efg"], tokenizer, 4)
    joined = [i for row in rows for i in row["input_ids"]]
    assert tokenizer.decode(joined).replace(" ", "") == f"abcd{tokenizer.eos_token}efg{tokenizer.eos_token}"
    assert [len(row["input_ids"]) for row in rows] == [4, 4, 1]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows)
    assert batch["input_ids"].shape == (3, 4)
    with pytest.raises(ValueError, match="`texts` is 0, but must be at least one document"):
        text_blocks([], tokenizer, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "`weight` is 0, but must be a number above 0"),
        ({"weight": True}, "`weight` is True, but must be a number above 0"),
        ({"distance": "outputs"}, "`distance` is 'outputs', but must be one of .* Did you mean 'output'"),
        ({"batch_size": 0}, "`batch_size` is 0, but must be a whole number of at least 1"),
        ({"rows": []}, "`rows` is 0, but must be at least one row of general text"),
    ],
)
def test_what_it_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        OldKnowledgeLoss(domain_model(make_tiny_llama(layers=2)), **{"rows": ROWS, "collate": padded, **settings})


def test_it_goes_with_the_first_stage_alone(tokens):
    gated = domain_model(make_tiny_llama(layers=2), gate="sigmoid")
    with pytest.raises(ValueError, match="`gate` is 'sigmoid', but must be 'none' for the old-knowledge loss"):
        OldKnowledgeLoss(gated, ROWS, padded)
    lora = get_peft_model(make_tiny_llama(layers=2), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`gate` is None, but must be 'none'"):
        OldKnowledgeLoss(lora, ROWS, padded)
    model = domain_model(make_tiny_llama(layers=2))
    loss = OldKnowledgeLoss(model, ROWS, padded)
    with model.disable_adapter(), pytest.raises(ValueError, match="No active adapter has domains' experts"):
        loss.old_knowledge()
