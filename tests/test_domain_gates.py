"""The gates of named experts: one per model on the prompt, labels, prototypes, singular vectors, and the null expert."""

import sys
import threading

import pytest
import torch
from conftest import make_tiny_llama
from datasets import Dataset
from peft import PeftModel, get_peft_model
from test_domain_moe import DOMAINS, EXACT, LORAS, adapted, layers_of, logits, make_lora
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import moe_peft
from moe_peft import DomainMoeConfig, from_loras, set_null_threshold, set_prototypes
from moe_peft.balance_terms import label_gradient, label_loss
from moe_peft.inspecting import _rows
from moe_peft.masks import real_from_mask
from moe_peft.pocket import POCKET_DIR
from moe_peft.prototypes import gate_of_model, prompt_pools, separating, top_right_singular_vector
from moe_peft.report import health_table, routing_report
from moe_peft.routing import dense_weights


LENGTHS = [10, 6, 4]


def gate_model(gate: str = "sequence", **settings):
    """With a gate that sends the rows of `tokens` to experts 1, 2 and 0."""
    model = adapted(gate=gate, **settings)
    torch.manual_seed(1)
    states = model.get_input_embeddings().weight[torch.randint(1, 100, (3, 10))].detach()
    rows = states.amax(1) - states.amax(1).mean(0) if gate == "sequence" else states.mean(1)
    with torch.no_grad():
        gate_of_model(model).router.copy_(rows[[2, 0, 1]] * (30 if gate == "sequence" else 1))
    return model


def left_padded(tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The last LENGTHS tokens of each row, with padding on the left."""
    mask = torch.stack([(torch.arange(10) >= 10 - length).long() for length in LENGTHS])
    return tokens * mask, mask


def chosen_by_definition(model, gate: str, rows: list[torch.Tensor]) -> list[int]:
    """The arg-max of the gate on each prompt's pooled embeddings, one prompt at a time."""
    embed, router = model.get_input_embeddings().weight, gate_of_model(model).router
    found = []
    for row in rows:
        states = embed[row]
        scores = router @ states.amax(0) if gate == "sequence" else -(router - states.mean(0)).square().sum(-1)
        found.append(int(scores.argmax()))
    return found


def same_experts_by_label(model):
    """The same experts with the gate "given"."""
    other = adapted(gate="given")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(own[name])
    return other


# --- one decision for each prompt ---


@pytest.mark.parametrize("gate", ["sequence", "prototype"])
def test_in_use_a_prompt_gets_the_one_expert_that_its_embeddings_choose(tokens, gate):
    model = gate_model(gate)
    ids, mask = left_padded(tokens)
    rows = [row[-length:] for row, length in zip(tokens, LENGTHS, strict=True)]
    chosen = chosen_by_definition(model, gate, rows)
    assert len(set(chosen)) > 1
    found = logits(model, ids, attention_mask=mask)
    given = same_experts_by_label(model)
    for row, (prompt, domain) in enumerate(zip(rows, chosen, strict=True)):
        alone = logits(given, prompt[None], task_types=torch.tensor([domain]))
        torch.testing.assert_close(logits(model, prompt[None]), alone, **EXACT)
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        found = logits(model, ids, attention_mask=mask, **positions)
        torch.testing.assert_close(found[row, -LENGTHS[row] :], alone[0], **EXACT)


@pytest.mark.parametrize("gate", ["sequence", "prototype"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_prompt_decides_for_all_that_is_generated_with_and_without_a_cache(tokens, gate, padded):
    model = gate_model(gate)
    ids, mask = left_padded(tokens) if padded else (tokens, torch.ones_like(tokens))
    kwargs = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, full = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=use_cache, **kwargs)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), **EXACT)
    rows = [row[m.bool()] for row, m in zip(tokens, mask, strict=True)]
    with moe_peft.task_types(given := same_experts_by_label(model), chosen_by_definition(model, gate, rows)):
        forced = given.generate(input_ids=ids, attention_mask=mask, **kwargs)
    assert torch.equal(cached.sequences, forced.sequences)


@pytest.mark.parametrize("gate", ["sequence", "prototype"])
@pytest.mark.parametrize("way", ["static", "beams", "named adapters"])
def test_the_prompt_decides_however_it_is_generated(tokens, gate, way):
    ways = {"static": {"cache_implementation": "static"}, "beams": {"num_beams": 3, "num_return_sequences": 2}}
    model = gate_model(gate)
    ids, mask = left_padded(tokens)
    rows = [row[m.bool()] for row, m in zip(tokens, mask, strict=True)]
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **ways.get(way, {})}
    named = {"adapter_names": ["default"] * 3, "use_cache": False} if way == "named adapters" else {}
    with moe_peft.task_types(given := same_experts_by_label(model), chosen_by_definition(model, gate, rows)):
        forced = given.generate(input_ids=ids, **kwargs)
    assert torch.equal(model.generate(input_ids=ids, **kwargs, **named), forced)


def test_a_draft_of_the_answer_is_no_part_of_the_prompt():
    model, draft = gate_model(), make_tiny_llama(dtype=torch.float64)
    prompts = torch.randint(1, 100, (60, 5), generator=torch.Generator().manual_seed(0))
    common = model.get_input_embeddings()(prompts).amax(1).mean(0).detach()
    with torch.no_grad():  # a gate that looks at what sets prompts apart, alone
        rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gate_of_model(model).router.copy_(rows - (rows @ common)[:, None] * common / common.square().sum())
    drafted = torch.cat((prompts, logits(draft, prompts)[:, -1:].argmax(-1)), 1)
    choices = (chosen_by_definition(model, "sequence", list(rows)) for rows in (prompts, drafted))
    differ = [n for n, (alone, after) in enumerate(zip(*choices, strict=True)) if alone != after]
    assert differ, "no draft would turn the gate"
    for prompt in prompts[differ[:4]]:
        ids = prompt[None]
        kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        alone = model.generate(input_ids=ids, **kwargs)
        assert torch.equal(model.generate(input_ids=ids, **kwargs, assistant_model=draft), alone)


def test_a_prompt_in_pieces_is_refused(tokens):
    model = gate_model()
    with pytest.raises(ValueError, match="the prompt comes in pieces. Leave `prefill_chunk_size` out"):
        model.generate(input_ids=tokens, max_new_tokens=3, do_sample=False, pad_token_id=0, prefill_chunk_size=3)


def test_places_that_a_static_cache_has_left_are_not_read_as_padding():
    mask = torch.ones(1, 1, 3, 8, dtype=torch.bool).tril(diagonal=2)
    mask[..., 1] = False  # padding among what the cache holds
    states = torch.zeros(1, 3, 4)
    assert real_from_mask(mask, states, 2).tolist() == [[True, True, True]]
    assert real_from_mask(mask[..., :5], states).tolist() == [[True, True, True]]
    assert real_from_mask(mask[:, :, :1], states[:, :1], 2).tolist() == [[True]]
    prefill = torch.ones(1, 1, 4, 9, dtype=torch.bool).tril()
    prefill[..., :2] = False
    assert real_from_mask(prefill, torch.zeros(1, 4, 4), 0).tolist() == [[False, False, True, True]]


def test_threads_do_not_see_each_others_prompts(tokens):
    model = gate_model()
    kwargs = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(input_ids=prompt[None], **kwargs) for prompt in tokens]
    wrong, barrier, interval = [], threading.Barrier(3), sys.getswitchinterval()

    def serve(number):
        barrier.wait()
        for _ in range(10):
            try:
                if not torch.equal(model.generate(input_ids=tokens[number][None], **kwargs), alone[number]):
                    wrong.append(number)
            except ValueError as error:
                wrong.append(str(error))

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(3)]
    sys.setswitchinterval(1e-5)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert wrong == []
    context = layers_of(model)[0].context
    assert context.kept is None
    assert context.prompt_length is None


def test_in_training_every_expert_is_weighed_by_the_softmax_of_the_prompt(tokens):
    model = gate_model().train()
    seen = {}
    experts = gate_of_model(model)
    experts.register_forward_hook(
        lambda module, args, out: seen.setdefault("routing", out) if args[1] is None else None
    )
    labels = tokens.clone()
    labels[:, :4] = -100
    model(input_ids=tokens, labels=labels).loss.backward()
    pools = model.get_input_embeddings().weight[tokens[:, :4]].amax(1)
    wanted = (pools @ experts.router.T).softmax(-1).repeat_interleave(10, 0)
    weights = dense_weights(seen["routing"])
    torch.testing.assert_close(weights[:, :3], wanted, **EXACT)
    assert not weights[:, 3].any()
    assert experts.router.grad.any()


def loss_of(model, tokens, labels) -> torch.Tensor:
    """In fp64, which transformers' own is not."""
    scores = model(input_ids=tokens, labels=labels).logits[:, :-1]
    return torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_the_gates_gradient_is_that_of_every_layer_together(tokens, use_reentrant):
    labels = tokens.clone()
    labels[:, :4] = -100
    gradients = []
    for checkpointing in (None, use_reentrant):
        model = gate_model().train()
        model.enable_input_require_grads()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        loss_of(model, tokens, labels).backward()
        gradients.append(gate_of_model(model).router.grad)
    torch.testing.assert_close(*gradients, **EXACT)
    # Against finite differences of the loss, of a large step: norms are in fp32, and a logit moves by 0.02 all the same.
    model, step = gate_model().train(), 0.5
    router = gate_of_model(model).router
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            router[1, 3] += sign * step
            losses.append(loss_of(model, tokens, labels))
            router[1, 3] -= sign * step
    torch.testing.assert_close(gradients[0][1, 3], (losses[0] - losses[1]) / (2 * step), rtol=5e-3, atol=0)


def test_packed_rows_and_training_without_a_prompt_are_refused(tokens):
    model = gate_model().train()
    labels = tokens.clone()
    labels[:, :3] = -100
    positions = torch.cat((torch.arange(5), torch.arange(5))).expand(3, -1)
    with pytest.raises(ValueError, match="one row holds several samples, each with a prompt of its own.*Turn packing"):
        model(input_ids=tokens, labels=labels, position_ids=positions)
    with pytest.raises(ValueError, match="the model is not told which tokens are the prompt"):
        model(input_ids=tokens)
    with pytest.raises(ValueError, match="a row has no prompt before its first label"):
        model(input_ids=tokens, labels=tokens)


def test_rows_that_name_their_adapter_keep_their_own_prompts(tokens):
    model = gate_model()
    alone = logits(model, tokens)
    model.add_adapter("other", DomainMoeConfig(domains=["x", "y"], target_modules=["q_proj"], init_weights=False))
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], **EXACT)


def test_two_adapters_with_gates_of_the_model_do_not_meet(tokens):
    model = gate_model()
    alone = logits(model, tokens)
    config = {"domains": ["x", "y"], "gate": "prototype", "target_modules": ["up_proj"], "init_weights": False}
    model.add_adapter("other", DomainMoeConfig(**config))
    torch.testing.assert_close(logits(model, tokens), alone, **EXACT)
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model, tokens), alone, **EXACT)


def test_a_gate_of_the_model_needs_embeddings():
    base = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="`gate` is 'sequence', but must be another where the model has no"):
        get_peft_model(base, DomainMoeConfig(domains=["a", "b"], gate="sequence", target_modules=["0"]))


# --- labels ---


def test_the_labels_loss_is_cross_entropy_and_its_gradient_is_autograds():
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels, real = torch.tensor([0, 1, 2, 3, 1, 0]), torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    loss = label_loss(scores, labels, real)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores[real], labels[real]), **EXACT)
    torch.testing.assert_close(
        label_gradient(scores.detach(), labels, real), torch.autograd.grad(loss, scores)[0], **EXACT
    )
    even = torch.zeros(5, 4)
    torch.testing.assert_close(label_loss(even, torch.arange(5) % 4), torch.tensor(4.0).log())
    certain = torch.nn.functional.one_hot(torch.arange(3)) * 200.0
    assert label_loss(certain, torch.arange(3)) == 0


def cross_entropy_of_all_gates(model, batch, types, prompts: bool) -> torch.Tensor:
    """The mean over modules and real tokens, from the logits that the gates computed."""
    found = []
    handles = []
    for layer in layers_of(model):

        def see(module, args, layer=layer):
            router = layer.experts("default").router
            if router is not None and not prompts:
                found.append(args[0] @ router.T)

        handles.append(layer.register_forward_pre_hook(see))
    model(**batch)
    for handle in handles:
        handle.remove()
    if prompts:
        pools = model.get_input_embeddings().weight[batch["input_ids"][:, :4]].amax(1)
        found.append((pools @ gate_of_model(model).router.T).unsqueeze(1).expand(-1, 10, -1))
    real = batch["attention_mask"].bool()
    labels = types.unsqueeze(1).expand_as(real)[real]
    return torch.stack([torch.nn.functional.cross_entropy(scores[real], labels) for scores in found]).mean()


@pytest.mark.parametrize("gate", ["token", "sequence"])
@pytest.mark.parametrize("learns", ["both", "labels"])
def test_labels_train_the_gate_by_a_mean_over_modules_and_real_tokens(tokens, gate, learns):
    types = torch.tensor([2, 0, 1])
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    settings = {"gate": gate, "train_domains": [], "router_supervision_coef": 3.0}

    def gradients(model, loss) -> list[torch.Tensor]:
        routers = [p for n, p in model.named_parameters() if n.endswith(".router")]
        return list(torch.autograd.grad(loss, routers, allow_unused=True))

    model = adapted(gate_training=learns, **settings).train()
    given = gradients(model, model(**batch, task_types=types).loss)
    plain = adapted(**settings).train()
    for layer in layers_of(
        plain
    ):  # a gate must not learn from the labels of layers above it by way of its weights either
        layer.experts("default").by_labels_alone = learns == "labels"
    wanted = gradients(plain, 3.0 * cross_entropy_of_all_gates(plain, batch, types, gate == "sequence"))
    if learns == "both":
        wanted = [a + b for a, b in zip(wanted, gradients(plain, plain(**batch).loss), strict=True)]
    assert len(given) == (1 if gate == "sequence" else len(layers_of(model)))
    for one, two in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_a_stock_trainer_hands_the_names_in_a_column_on(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(POCKET_DIR)
    base = AutoModelForCausalLM.from_pretrained(POCKET_DIR, dtype=torch.float32)
    settings = {"gate_training": "labels", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, DomainMoeConfig(domains=DOMAINS, **settings))
    questions = {"law": "12+30=", "medicine": "reverse: abc\n", "code": "x"}
    rows = [{"prompt": questions[name], "completion": "42", "domain": name} for name in DOMAINS] * 4
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=5, report_to=[], use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    with pytest.raises(ValueError, match=r"'loss' where .* samples' domains. Add a column `domain` .*names=\['law'"):
        trainer.train()
    trainer.data_collator = moe_peft.TaskTypeCollator(trainer.data_collator, "domain", names=DOMAINS)
    seen = []

    def see(module, args, kwargs):
        seen.extend(zip(kwargs["input_ids"].tolist(), kwargs["task_types"].tolist(), strict=True))

    model.register_forward_pre_hook(see, with_kwargs=True)
    trainer.train()
    trained = len(seen)
    trainer.evaluate()
    assert trained == 10
    assert len(seen) == 22
    firsts = {tokenizer(question)["input_ids"][0]: DOMAINS.index(name) for name, question in questions.items()}
    assert all(firsts[ids[0]] == domain for ids, domain in seen)


def test_labels_that_are_missing_or_outside_are_refused(tokens):
    model = adapted(gate_training="labels").train()
    with pytest.raises(
        ValueError, match="`gate_training` is 'labels', but must be 'loss' where the model is not told"
    ):
        model(input_ids=tokens, labels=tokens).loss.backward()
    allowed = "whole numbers from 0 to 2, the places of the domains. They are 0 law, 1 medicine, 2 code"
    with pytest.raises(ValueError, match=rf"`task_types` is \[0, 3, 1\], but must be {allowed}"):
        model(input_ids=tokens, labels=tokens, task_types=torch.tensor([0, 3, 1])).loss.backward()
    model = adapted(gate="given")
    with pytest.raises(ValueError, match="`gate` is 'given', but must be another gate where the model is not told"):
        logits(model, tokens)
    with pytest.raises(ValueError, match=f"`task_types` is .* but must be {allowed}"):
        logits(model, tokens, task_types=torch.tensor([0, 3, 1]))


def test_the_labels_loss_teaches_a_token_gate_the_domains(tokens):
    model = adapted(gate_training="labels", train_domains=[], top_k=1).train()
    batch = {"input_ids": tokens, "labels": tokens, "task_types": torch.tensor([0, 1, 2])}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    report = routing_report(model.eval(), {name: [{"input_ids": tokens[i : i + 1]}] for i, name in enumerate(DOMAINS)})
    right = [counts[d][d] / sum(counts[d]) for counts in report.counts.values() for d in range(3)]
    assert sum(right) / len(right) > 0.95


# --- gates without training ---


def test_prototypes_are_the_means_of_the_prompts_means(tokens):
    model = adapted(gate="prototype")
    ids, mask = left_padded(tokens)
    labels = tokens.clone()
    labels[:, :9] = -100
    batches = {
        "law": [
            {"input_ids": ids[:1], "attention_mask": mask[:1]},
            {"input_ids": ids[1:], "attention_mask": mask[1:]},
        ],
        "medicine": [{"input_ids": tokens.flip(0)[:1], "labels": labels[:1]}],
        "code": [{"input_ids": tokens + 0 * mask}],
    }
    set_prototypes(model, batches)
    embed, router = model.get_input_embeddings().weight, gate_of_model(model).router
    means = [embed[row[-length:]].mean(0) for row, length in zip(tokens, LENGTHS, strict=True)]
    torch.testing.assert_close(router[0], torch.stack(means).mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router[1], embed[tokens[2, :9]].mean(0), rtol=1e-5, atol=1e-6)
    assert not isinstance(router, torch.nn.Parameter)


def test_set_prototypes_refuses(tokens):
    batch = [{"input_ids": tokens}]
    model = adapted(gate="prototype")
    with pytest.raises(ValueError, match="`batches` is .*of every domain; 'code' has no text"):
        set_prototypes(model, {"law": batch, "medicine": batch})
    with pytest.raises(ValueError, match="Domain 'code' has no text"):
        set_prototypes(model, {"law": batch, "medicine": batch, "code": []})
    with pytest.raises(ValueError, match="`batches` is 'coed', but must be of the domains .* Did you mean 'code'"):
        set_prototypes(model, {"law": batch, "coed": batch})
    with pytest.raises(ValueError, match="`gate` is 'token', but must be 'prototype', 'arrow' or 'arrow_init'"):
        set_prototypes(adapted())
    with pytest.raises(ValueError, match="`batches` is .* left out with `gate` = 'arrow'"):
        set_prototypes(adapted(gate="arrow"), {"law": batch})


def test_a_gate_whose_prototypes_nobody_has_computed_is_refused(tmp_path, tokens):
    loras = {name: make_lora(tmp_path, name) for name in ("law", "code")}
    model = from_loras(loras, make_tiny_llama(dtype=torch.float64), gate="prototype").eval()
    with pytest.raises(
        ValueError, match="`gate` is 'prototype', but must be another where no prototypes were computed"
    ):
        logits(model, tokens)
    set_prototypes(model, {"law": [{"input_ids": tokens[:1]}], "code": [{"input_ids": tokens[1:2]}]})
    stock = PeftModel.from_pretrained(make_tiny_llama(dtype=torch.float64), loras["code"]).eval()
    torch.testing.assert_close(logits(model, tokens[1:2]), logits(stock, tokens[1:2]), **EXACT)


def test_the_singular_vector_is_that_of_the_dense_product():
    for r, d_in, d_out in ((3, 8, 5), (1, 4, 9), (6, 4, 5)):
        A, B = torch.randn(r, d_in, dtype=torch.float64), torch.randn(r, d_out, dtype=torch.float64)
        dense = torch.linalg.svd(B.T @ A).Vh[0]
        found = top_right_singular_vector(A, B)
        torch.testing.assert_close(found * (found @ dense).sign(), dense, **EXACT)
    assert not top_right_singular_vector(A, torch.zeros_like(B)).any()


@pytest.mark.parametrize("gate", ["arrow", "arrow_init"])
def test_arrow_weighs_experts_by_the_absolute_product_with_their_strongest_direction(tmp_path, gate):
    loras = {name: make_lora(tmp_path, name) for name in LORAS}
    model = from_loras(loras, make_tiny_llama(dtype=torch.float64), gate=gate, top_k=2).eval()
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    factors = layer.expert_factors("default")
    directions = torch.stack([torch.linalg.svd(B.T @ A).Vh[0] for A, B in factors.values()])
    x = torch.randn(9, 64, dtype=torch.float64)
    scores = (x @ directions.T).abs()
    kept = scores.topk(2, dim=-1)
    gates = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values.softmax(-1))
    wanted = layer.base_layer(x) + sum(gates[:, [i]] * (x @ A.T @ B) for i, (A, B) in enumerate(factors.values()))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, **EXACT)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == (set() if gate == "arrow" else {"router"})


# --- the null expert ---


def test_the_threshold_separates_best_and_counts_as_it_says():
    good, bad = torch.tensor([3.0, 2.0, 5.0, 1.0]), torch.tensor([0.0, 1.5, -1.0])
    threshold = separating(good.double(), bad.double())
    candidates = torch.linspace(-3, 7, 2001)
    balanced = [((good >= t).float().mean() + (bad < t).float().mean()) / 2 for t in candidates]
    best = ((good >= threshold).float().mean() + (bad < threshold).float().mean()) / 2
    torch.testing.assert_close(best, max(balanced))
    assert threshold == 1.75  # half way between 1.5 and 2


@pytest.mark.parametrize("gate", ["sequence", "prototype"])
def test_prompts_below_the_threshold_get_the_frozen_model(tmp_path, tokens, gate):
    model = gate_model(gate)
    with torch.no_grad():
        gate_of_model(model).router[0] += 0.01
    adapted_logits = logits(model, tokens)
    with model.disable_adapter():
        base = logits(model, tokens)
    scores = gate_of_model(model).prompt_scores(prompt_pools(model, [{"input_ids": tokens}]))
    order = scores.amax(-1).argsort()
    found = set_null_threshold(model, [{"input_ids": tokens[order[1:]]}], [{"input_ids": tokens[order[:1]]}])
    assert (found.kept, found.rejected) == (1.0, 1.0)
    after = logits(model, tokens)
    assert torch.equal(after[order[0]], base[order[0]])
    torch.testing.assert_close(after[order[1:]], adapted_logits[order[1:]], **EXACT)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(dtype=torch.float64), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, tokens), after, rtol=1e-5, atol=1e-6)
    assert gate_of_model(model.half()).null_threshold.dtype == torch.float32


def test_training_does_not_look_at_the_threshold(tokens):
    model = gate_model().train()
    batch = {"input_ids": tokens, "labels": tokens.clone().index_fill_(1, torch.arange(4), -100)}
    before = model(**batch).logits
    gate_of_model(model).null_threshold.fill_(1.0)  # above every log-probability
    torch.testing.assert_close(model(**batch).logits, before, **EXACT)
    model.eval()
    torch.testing.assert_close(logits(model, tokens), logits(make_tiny_llama(dtype=torch.float64), tokens), **EXACT)


def test_the_quantile_of_known_prompts_falls_to_the_frozen_model(tokens):
    model = gate_model()
    many = torch.randint(1, 100, (40, 6), generator=torch.Generator().manual_seed(4))
    found = set_null_threshold(model, [{"input_ids": many}], quantile=0.25)
    assert (found.kept, found.rejected) == (0.75, None)
    report = routing_report(model, {"all": [{"input_ids": many}]})
    (counts,) = report.counts.values()
    assert counts[0][3] / sum(counts[0]) == 0.25  # the null expert is the last


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda t: set_null_threshold(adapted(), [t]), "`gate` is 'token', but must be 'sequence' or 'prototype'"),
        (lambda t: set_null_threshold(gate_model(), [t], quantile=1), "`quantile` is 1, but must be at least 0"),
        (lambda t: set_null_threshold(gate_model(), []), "`known` is 'empty', but must be at least one batch"),
        (lambda t: set_null_threshold(gate_model(), [t], []), "`unknown` is 'empty', but must be at least one batch"),
    ],
)
def test_set_null_threshold_refuses(tokens, call, match):
    with pytest.raises(ValueError, match=match):
        call({"input_ids": tokens})


def test_reports_name_the_experts(tokens, tmp_path):
    model = gate_model()
    report = routing_report(model, {"one": [{"input_ids": tokens[:1]}], "two": [{"input_ids": tokens[1:]}]})
    assert report.experts == [*DOMAINS, "null"]
    report.save(tmp_path / "routing.json")
    assert '"medicine"' in (tmp_path / "routing.json").read_text()
    assert "law, medicine, code, null" in health_table(report).caption
    rows = dict(_rows(model.peft_config["default"]))
    assert rows["domains"] == "law (rank 3), medicine (rank 3), code (rank 3)"
