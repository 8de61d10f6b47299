"""MoSA's consistency term: its definition, its gradients, and under unmodified trainers."""

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import ConsistencyLoss, LinearMoeConfig, ShardPoolConfig, consistency_loss
from moe_peft.consistency import symmetric_kl
from moe_peft.pocket.tokenizer import make_tokenizer


EXACT = {"rtol": 1e-9, "atol": 1e-11}


def split_model(num_splits=4, **settings):
    torch.manual_seed(2)
    config = ShardPoolConfig(
        r=4, num_splits=num_splits, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **settings
    )
    return get_peft_model(make_tiny_llama(layers=2), config)


def test_the_divergence_is_the_mean_of_both_and_each_target_is_detached():
    torch.manual_seed(0)
    first, second = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    p, q = torch.distributions.Categorical(logits=first), torch.distributions.Categorical(logits=second)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(symmetric_kl(first, second).double(), (kl(p, q) + kl(q, p)) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(symmetric_kl(first, first), torch.zeros(5))
    gradients = torch.autograd.grad(symmetric_kl(first, second).sum(), (first, second))
    # d KL(target || softmax(z)) / dz = softmax(z) - target
    torch.testing.assert_close(gradients[0], (p.probs - q.probs) / 2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[1], (q.probs - p.probs) / 2, rtol=1e-5, atol=1e-6)


def test_without_weight_it_is_the_cross_entropy_of_transformers(tokens):
    model = make_tiny_llama()
    labels = tokens.masked_fill(tokens < 20, -100)
    output = model(input_ids=tokens, labels=labels)
    torch.testing.assert_close(consistency_loss(output.logits, output.logits, labels), output.loss)
    counted = consistency_loss(output.logits, output.logits + 1.0, labels, 0.0, num_items_in_batch=5)
    torch.testing.assert_close(counted, output.loss * (labels[:, 1:] != -100).sum() / 5)


def test_the_labels_alone_are_compared(tokens):
    first, second = torch.randn(3, 10, 100), torch.randn(3, 10, 100)
    labels = tokens.clone()
    labels[:, :5] = -100  # predicted by positions 0 to 3
    other = second.clone()
    other[:, :4], other[:, -1] = 7.0, 7.0
    assert torch.equal(consistency_loss(first, second, labels), consistency_loss(first, other, labels))


@pytest.mark.parametrize("weight", [-1, True, "1", float("nan")])
def test_a_bad_weight_is_refused(weight):
    with pytest.raises(ValueError, match="`weight` is .*, but must be a number of at least 0"):
        ConsistencyLoss(make_tiny_llama(layers=1), weight)


def model_of_experts_by_lot():
    """THOR, whose consistency term is of the same form."""
    torch.manual_seed(2)
    config = LinearMoeConfig(
        num_experts=2, routing="random", balance="none", r=4, target_modules=["up_proj"], init_weights=False
    )
    return get_peft_model(make_tiny_llama(layers=2), config)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("made", [lambda: split_model(init_weights=False), model_of_experts_by_lot])
def test_two_passes_draw_for_themselves_and_both_learn(tokens, made, checkpointing):
    """The trainer's calls by hand: the loss is that of two passes with the generator where it was."""
    model = made().train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of = ConsistencyLoss(model, weight=2.0)
    torch.manual_seed(7)
    loss = loss_of(model(input_ids=tokens), tokens)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    torch.manual_seed(7)
    first, second = model(input_ids=tokens).logits, model(input_ids=tokens).logits
    assert not torch.equal(first, second)
    expected = consistency_loss(first, second, tokens, 2.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert loss > consistency_loss(first, second, tokens, 0.0)
    for gradient, p in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(gradient, p.grad)


def test_evaluation_makes_one_pass(tokens):
    model = split_model(init_weights=False).eval()
    loss_of, calls = ConsistencyLoss(model), []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
        torch.testing.assert_close(loss_of(output, tokens), output.loss)
    assert len(calls) == 1


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_works_in_an_unmodified_sft_trainer(tmp_path, accumulation):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"text": "abcdefgh"[i % 8] * (3 + i % 4)} for i in range(8)]
    model = split_model(init_weights=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4 // accumulation, use_cpu=True,
        gradient_accumulation_steps=accumulation, learning_rate=1e-2, report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1, bf16=False, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    loss_of, seen = ConsistencyLoss(model), []
    compare = loss_of.__call__

    def spied(outputs, labels, num_items_in_batch=None):
        loss = compare(outputs, labels, num_items_in_batch)
        plain = consistency_loss(outputs["logits"], outputs["logits"], labels, 0.0, num_items_in_batch)
        seen.append((model.training, float(loss - plain)))
        return loss

    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer(),
        compute_loss_func=spied,
    )  # fmt: skip
    trainer.train()
    assert all(extra > 0 for training, extra in seen if training)
    assert all(extra == 0 for training, extra in seen if not training)
    assert sum(training for training, _ in seen) == 3 * accumulation
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert changed == [n for n, p in model.named_parameters() if p.requires_grad]
