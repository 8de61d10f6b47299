"""Merging layer by layer: the walk is the model, the fit is least squares, and both say what is lost."""

import contextlib

import pytest
import torch
from conftest import make_tiny_llama
from families import FAMILIES, make_family
from peft import get_peft_model

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig
from moe_peft.agreement import measure_agreement
from moe_peft.merge import fit_static, instead_of_routing, routed_layers
from moe_peft.merging.decoder import Decoder
from moe_peft.merging.gram import Cross, Gram, Readout, least_squares, truncated
from moe_peft.merging.layerwise import fit_layer
from moe_peft.merging.walk import Fit, _enter, sequential, walk


KINDS = {
    "linears": lambda **more: LinearMoeConfig(num_experts=4, r=2, lora_alpha=64, target_modules="all-linear", **more),
    "one router for a block": lambda **more: LinearMoeConfig(
        num_experts=4, r=2, lora_alpha=64, target_modules="all-linear", router_scope="block", **more
    ),
    "ranks": lambda **more: RankMoeConfig(r=8, top_k=4, lora_alpha=64, target_modules="all-linear", **more),
    "ffn": lambda **more: FfnMoeConfig(num_experts=4, r=2, lora_alpha=64, target_modules="all-linear", **more),
    "ffn grouped": lambda **more: FfnMoeConfig(
        **{
            "num_experts": 6,
            "num_distinct_experts": 2,
            "r": 2,
            "lora_alpha": 64,
            "target_modules": "all-linear",
            **more,
        }
    ),
}


def adapted(kind: str, layers: int = 2, **more):
    torch.manual_seed(3)
    return get_peft_model(make_tiny_llama(layers=layers), KINDS[kind](init_weights=False, **more)).eval()


def text(batches: int = 4, padding: int = 0, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(batches):
        ids = torch.randint(1, 100, (4, 20), generator=generator)
        mask = torch.ones_like(ids)
        if padding:
            mask[1, -padding:] = 0
        found.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_walk_with_given_factors_measures_what_whole_passes_do(kind):
    model = adapted(kind)
    decoder = Decoder(model)
    held_out = text(2, padding=5, seed=1)
    factors = walk(decoder, held_out, None, text(), Fit("usage", 0.0, None)).factors
    found = walk(decoder, held_out, factors)
    if kind.startswith(
        "ffn"
    ):  # whole passes look at each linear, which an FFN mixture's experts cannot be asked about
        wanted = whole_passes(model, factors, held_out)
    else:
        a = measure_agreement(model, factors, held_out)
        wanted = [(a.loss_base, a.kl_base), (a.loss_routed, 0.0), (a.loss_merged, a.kl_merged)]
        assert found.tokens == a.tokens
    for figures, (loss, kl) in zip(found.figures.values(), wanted, strict=True):
        assert figures.loss == pytest.approx(loss, rel=1e-5)
        assert figures.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
    assert found.figures["routed"].top1 == 1.0
    assert found.figures["merged"].kl > 1e-4  # else nothing was compared


def whole_passes(model, factors, batches):
    def log_probs(batch):
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        wanted = batch["labels"][:, 1:] != -100
        return logits[wanted].log_softmax(-1), batch["labels"][:, 1:][wanted]

    sums, tokens = torch.zeros(3, 2), 0
    with torch.no_grad():
        for batch in batches:
            routed, labels = log_probs(batch)
            with model.disable_adapter():
                base, _ = log_probs(batch)
            with instead_of_routing(model, factors):
                merged, _ = log_probs(batch)
            for row, p in zip(sums, (base, routed, merged), strict=True):
                row += torch.stack([-p.gather(1, labels[:, None]).sum(), (routed.exp() * (routed - p)).sum()])
            tokens += len(labels)
    return (sums / tokens).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "phi", "bloom"])
def test_each_familys_layers_are_called_as_the_model_calls_them(family):
    assert family in FAMILIES
    torch.manual_seed(0)
    config = LinearMoeConfig(num_experts=2, r=2, target_modules="all-linear", init_weights=False)
    model = get_peft_model(make_family(family), config).eval()
    decoder, batch = Decoder(model), {k: v % 64 for k, v in text(1)[0].items() if k != "labels"}
    with torch.no_grad(), decoder.reading():
        entered = decoder.enter(batch)
        hidden = entered.hidden
        for index in range(len(decoder)):
            hidden = decoder.step(index, hidden, entered.calls[index])
        parts = [logits for _, logits in decoder.logits(batch, hidden)]
        torch.testing.assert_close(torch.cat(parts), model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert not any("forward" in block.__dict__ for block in decoder.blocks)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_linear_is_merged_without_loss(kind):
    one = {"r": 1, "top_k": 1} if kind == "ranks" else {"r": 2, "num_experts": 1}
    torch.manual_seed(3)
    settings = {"lora_alpha": 64, "target_modules": "all-linear", "init_weights": False, **one}
    config = {"ranks": RankMoeConfig, "ffn": FfnMoeConfig}.get(kind, LinearMoeConfig)(**settings)
    model = get_peft_model(make_tiny_llama(layers=2), config).eval()
    found, _ = sequential(Decoder(model), text(), text(1, seed=1), ridges=(1e-3,))
    assert found.figures["merged"].kl < 1e-6
    assert found.figures["base"].kl > 1e-3
    assert max(found.layer_error.values()) < 1e-3


def collected(model, name, batches):
    """The inputs of one linear, by plain passes of the whole model, and what its experts add to them."""
    layer, xs, deltas = routed_layers(model)[name], [], []

    def see(module, args, output):
        xs.append(args[0].reshape(-1, args[0].shape[-1]))
        deltas.append((output - layer.base_layer(args[0])).reshape(-1, output.shape[-1]))

    handle = layer.register_forward_hook(see)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    counted = torch.cat([torch.nn.functional.pad(b["labels"][:, 1:] != -100, (0, 1)).reshape(-1) for b in batches])
    return torch.cat(xs)[counted].double(), torch.cat(deltas)[counted].double()


@pytest.mark.parametrize("kind", ["linears", "one router for a block", "ranks"])
def test_the_fit_of_the_first_layer_is_the_ridge_solution(kind):
    """Held against the normal equations of the whole weight, solved for d_out x d_in numbers at once."""
    model, alpha, batches = adapted(kind), 1e-2, text(8, padding=4)
    decoder = Decoder(model)
    with torch.no_grad(), decoder.reading():
        factors = fit_layer(decoder, 0, _enter(decoder, batches), "ls", alpha, None)
    for name in factors:
        x, delta = collected(model, name, batches)
        experts = routed_layers(model)[name].experts("default")
        gates = experts.gates(x.float(), decoder.context) if kind != "one router for a block" else None
        if gates is None:
            continue
        A, B = (f.double() for f in experts.stacked())
        usage = B.T @ (gates.double().mean(0).repeat_interleave(experts.r)[:, None] * A)
        G = x.T @ x / len(x)
        ridge = alpha * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
        wanted = (delta.T @ x / len(x) + usage @ ridge) @ torch.linalg.inv(G + ridge)
        f = factors[name]
        torch.testing.assert_close((f.B @ f.A).double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_last_linear_of_an_ffn_is_the_ridge_solution():
    """The block, merged before its last linear, against the routed block's output."""
    model, alpha, batches = adapted("ffn"), 1e-3, text(8)
    decoder = Decoder(model)
    with torch.no_grad(), decoder.reading():
        stream = _enter(decoder, batches)
        usage, factors = (fit_layer(decoder, 0, stream, method, alpha, None) for method in ("usage", "ls"))
        block = model.get_base_model().model.layers[0].mlp
        name = "model.layers.0.mlp.down_proj"
        seen: dict[str, list] = {"x": [], "routed": [], "h": []}

        def see(module, args, output):
            seen["x"].append(args[0])
            seen["routed"].append(output)

        handle = block.register_forward_hook(see)
        for batch in batches:
            model(**batch)
        handle.remove()
        last = decoder.adapted[0][name]
        handle = last.register_forward_pre_hook(lambda m, a: seen["h"].append(a[0]))
        with decoder.without(0, usage):
            for x in seen["x"]:
                block(x)
        handle.remove()
        counted = torch.cat([torch.nn.functional.pad(b["labels"][:, 1:] != -100, (0, 1)).reshape(-1) for b in batches])
        h, y = (torch.cat(seen[key]).flatten(0, 1)[counted].double() for key in ("h", "routed"))
        W = last.base_layer.weight.double()
        G, prior = h.T @ h / len(h), (usage[name].B @ usage[name].A).double()
        ridge = alpha * G.diagonal().mean() * torch.eye(len(G), dtype=torch.float64)
        wanted = ((y - h @ W.T).T @ h / len(h) + prior @ ridge) @ torch.linalg.inv(G + ridge)
    f = factors[name]
    torch.testing.assert_close((f.B @ f.A).double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    for other in set(factors) - {name}:
        torch.testing.assert_close(factors[other].B @ factors[other].A, usage[other].B @ usage[other].A)


def test_truncation_loses_least_on_the_text():
    """Reduced-rank regression: no other map of that rank is closer on the text, nor is the plain truncation."""
    torch.manual_seed(0)
    x = torch.randn(500, 12, dtype=torch.float64) * torch.linspace(0.05, 3, 12)
    M, B = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    L = torch.linalg.cholesky(x.T @ x)
    f = truncated(Readout(M, B), 2, L)
    target = x @ (B.T @ M).T
    U, sigma, Vh = torch.linalg.svd(target, full_matrices=False)
    best = float(sigma[2:].square().sum())  # Eckart-Young for the outputs themselves
    error = float((target - x @ f.A.double().T @ f.B.double().T).square().sum())
    assert error == pytest.approx(best, rel=1e-4)
    plain = truncated(Readout(M, B), 2)
    assert error < 0.99 * float((target - x @ plain.A.double().T @ plain.B.double().T).square().sum())
    whole = truncated(Readout(M, B), None, L)
    torch.testing.assert_close((whole.B @ whole.A).double(), B.T @ M, rtol=1e-4, atol=1e-4)


def test_the_ridge_leads_from_least_squares_to_the_prior():
    torch.manual_seed(0)
    x, u, prior = torch.randn(300, 5), torch.randn(300, 3), torch.randn(3, 5)
    for alpha, wanted in ((1e-12, torch.linalg.lstsq(x, u).solution.T), (1e9, prior)):
        gram, cross = Gram(5, x.device), Cross(3, 5, x.device)
        for part in (slice(0, 100), slice(100, 300)):
            gram.add(x[part])
            cross.add(u[part], x[part])
        L, ridge = gram.root(alpha)
        M = least_squares(cross, gram.tokens, prior, L, ridge)
        torch.testing.assert_close(M.float(), wanted, rtol=1e-3, atol=1e-4)


def test_padding_takes_no_part_in_the_fit():
    model = adapted("linears", layers=1)
    decoder = Decoder(model)
    plain = text(4, padding=6)
    other = [dict(batch) for batch in plain]
    for batch in other:
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    with torch.no_grad(), decoder.reading():
        fits = [fit_layer(decoder, 0, _enter(decoder, b), "ls", 1e-3, None) for b in (plain, other)]
    for name in fits[0]:
        torch.testing.assert_close(fits[0][name].B @ fits[0][name].A, fits[1][name].B @ fits[1][name].A)


def test_least_squares_in_the_whole_input_space_is_no_worse_than_in_the_experts_own():
    """On its own text, where no layer before it is merged: the subspace that `fit_static` reads is a part of it."""
    model, batches = adapted("linears", layers=1), text(30)
    full = walk(Decoder(model), batches, None, batches, Fit("ls", 1e-6, None))
    for name in list(full.factors)[:3]:
        x, delta = collected(model, name, batches)
        subspace = fit_static(model, batches)[name]
        errors = [
            float((delta - x @ f.A.double().T @ f.B.double().T).square().sum()) for f in (full.factors[name], subspace)
        ]
        assert errors[0] <= errors[1] * 1.001


def test_an_adapter_outside_the_stack_is_refused():
    model = get_peft_model(
        make_tiny_llama(), LinearMoeConfig(num_experts=2, r=2, target_modules=["lm_head", "up_proj"])
    )
    with pytest.raises(ValueError, match="'lm_head' outside of the stack of decoder layers"):
        Decoder(model)


def test_a_layer_is_fitted_to_what_the_merged_layers_before_it_let_through():
    """Sequential: the second layer's factors are those on the first one's merged output, and not on its routed output."""
    model, batches, fit = adapted("linears"), text(6), Fit("ls", 1e-3, None)
    decoder = Decoder(model)
    found = walk(decoder, batches[:1], None, batches, fit, tokens="answers").factors
    first = {name: found[name] for name in decoder.adapted[0]}
    fitted = {}
    with torch.no_grad(), decoder.reading():
        for way in ("merged", "routed"):
            stream = _enter(decoder, batches)
            with decoder.without(0, first) if way == "merged" else contextlib.nullcontext():
                stream.hidden = list(stream.outputs(decoder, 0))
            fitted[way] = fit_layer(decoder, 1, stream, *fit)
    for name, f in fitted["merged"].items():
        product, routed = found[name].B @ found[name].A, fitted["routed"][name].B @ fitted["routed"][name].A
        torch.testing.assert_close(f.B @ f.A, product, rtol=1e-4, atol=1e-5)
        assert (product - routed).norm() > 0.01 * product.norm()
