"""`allocate`: gains that are right where the truth is known, budgets that are met, the command, and every refusal."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn

from moe_peft import FfnMoeConfig, LinearMoeConfig, RankMoeConfig, allocate, allocating, cli, gain
from moe_peft.adapted_layers import find_sites, without_weights
from moe_peft.allocating import buy, concave
from moe_peft.budget import count_config
from moe_peft.catalogue import adapter_config
from moe_peft.gain import Site, k_means, measure_gain
from moe_peft.grouping import DAMPING, Sums, fitted_gain, held_out_gain, join
from moe_peft.pocket import make_suite
from moe_peft.trial import load_pocket


FFN = ["gate_proj", "up_proj", "down_proj"]


def text(batches: int = 6, rows: int = 4, length: int = 12, seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 100, (rows, length), generator=draw) for _ in range(batches)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]


def some_sums(cells: int = 5, k_out: int = 4, k_in: int = 3, seed: int = 0) -> tuple[Sums, list]:
    """Sums by cell, and the tokens that they are of: (half, cell, g, x)."""
    draw = torch.Generator().manual_seed(seed)
    tokens = []
    for n in range(160):
        g, x = (torch.randn(k, generator=draw, dtype=torch.float64) for k in (k_out, k_in))
        tokens.append((n % 3 % 2, n % cells, g * (1 + n % cells), x + n % 2))
    G, L, R, counts = (
        torch.zeros(*s, dtype=torch.float64)
        for s in ((2, cells, k_out, k_in), (cells, k_out, k_out), (cells, k_in, k_in), (2, cells))
    )
    for half, c, g, x in tokens:
        G[half, c] += torch.outer(g, x)
        L[c] += x.dot(x) * torch.outer(g, g)
        R[c] += g.dot(g) * torch.outer(x, x)
        counts[half, c] += 1
    return Sums(G, L, R, counts), tokens


def inverse_root(C: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(C + DAMPING * C.trace() / len(C) * torch.eye(len(C), dtype=C.dtype))
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def test_a_groups_gain_is_the_formula_over_its_tokens():
    sums, tokens = some_sums()
    groups = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.float64)
    for half in (0, 1):
        fitted, held_out = (f(sums.grouped(groups), half) for f in (fitted_gain, held_out_gain))
        for row, members in enumerate(groups):
            own = [t for t in tokens if members[t[1]]]
            L = sum(x.dot(x) * torch.outer(g, g) for _, _, g, x in own)
            R = sum(g.dot(g) * torch.outer(x, x) for _, _, g, x in own)
            M = []
            for of in (half, 1 - half):
                G = torch.stack([torch.outer(g, x) for h, _, g, x in own if h == of]).mean(0) * len(own)
                M.append(L.trace().sqrt() * inverse_root(L) @ G @ inverse_root(R))
            assert torch.allclose(fitted[row], 0.5 * M[0].square().sum(), atol=1e-9)
            U, s, Vh = torch.linalg.svd(M[0], full_matrices=False)
            for r in (1, 2, 3):
                best = (U[:, :r] * s[:r]) @ Vh[:r]
                assert torch.allclose(held_out[row, r - 1], 0.5 * (best * M[1]).sum(), atol=1e-9)


def test_the_scale_of_the_gradients_does_not_matter():
    sums, _ = some_sums()
    scaled = Sums(7 * sums.G, 49 * sums.L, 49 * sums.R, sums.counts)
    assert torch.allclose(fitted_gain(sums, 0), fitted_gain(scaled, 0), rtol=1e-9)


def test_tokens_that_pull_in_opposite_ways_gain_nothing_together():
    sums, _ = some_sums(cells=1)
    both = Sums(
        torch.cat((sums.G, -sums.G), 1),
        *(torch.cat((t, t), -3) for t in (sums.L, sums.R)),
        torch.cat((sums.counts,) * 2, 1),
    )
    together = both.grouped(torch.ones(1, 2, dtype=torch.float64))
    assert float(fitted_gain(both, 0).min()) > 0.1
    assert torch.allclose(fitted_gain(together, 0), torch.zeros(1, dtype=torch.float64), atol=1e-12)


def test_joining_gives_partitions_that_lose_least_at_each_step():
    sums, _ = some_sums()
    groupings = join([sums], 0, 5)
    for n, groups in enumerate(groupings, start=1):
        assert groups.shape == (n, 5)
        assert torch.equal(groups.sum(0), torch.ones(5, dtype=torch.float64))
    for fewer, more in itertools.pairwise(groupings):
        best = max(
            float(
                fitted_gain(
                    sums.grouped(
                        torch.stack([*(r for i, r in enumerate(more) if i not in pair), more[pair[0]] + more[pair[1]]])
                    ),
                    0,
                ).sum()
            )
            for pair in itertools.combinations(range(len(more)), 2)
        )
        assert float(fitted_gain(sums.grouped(fewer), 0).sum()) == pytest.approx(best, rel=1e-9)


def test_k_means_finds_clusters_that_are_apart():
    draw = torch.Generator().manual_seed(0)
    middles = 10 * torch.randn(6, 3, generator=draw)
    of = torch.arange(120) % 6
    points = middles[of] + 0.1 * torch.randn(120, 3, generator=draw)
    nearest = torch.cdist(points, k_means(points, 6, draw)).argmin(1)
    assert len({(a, b) for a, b in zip(of.tolist(), nearest.tolist(), strict=True)}) == 6


def test_gradients_are_those_of_the_weights(monkeypatch):
    monkeypatch.setattr(gain, "SKETCH", 1000)  # no projection
    model, batches = make_tiny_llama(layers=2).double(), text(3)
    names = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    probes = [gain._Probe(Site(0, (name,)), 0) for name in names]
    with gain._watching(model, probes):
        for again in (0, 1):
            for half, batch in enumerate(batches):
                gain._backward(model, batch, probes, half % 2)
            for probe in () if again else probes:
                probe.find_cells()
    for batch in batches:
        n = batch["labels"][:, 1:].numel()
        (n * model(**batch).loss).backward()
    for name, probe in zip(names, probes, strict=True):
        found = probe.sums[name].G.sum((0, 1))
        wanted = model.get_submodule(name).weight.grad.float()
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))


class Parallel(nn.Module):
    """Three linears side by side, each with a target of its own; the loss is the mean squared distance.

    0: the weight is right but for noise. 1: all tokens want one and the same change of rank 1. 2: half of the tokens want
    that change and half its opposite, and the sign of the first input says which.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8, bias=False)}) for _ in range(3)])
        self.change = torch.outer(torch.randn(8), torch.randn(8)) / 4

    def forward(self, x: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        sign = x[..., :1].sign()
        asked = (torch.zeros_like(sign), torch.ones_like(sign), sign)
        loss = 0
        for layer, ask in zip(self.layers[:3], asked, strict=True):
            fc = layer["fc"]
            target = nn.functional.linear(x, fc.weight).detach() + ask * (x @ self.change.T) + noise
            loss = loss + (fc(x) - target).square().sum(-1).mean()
        return SimpleNamespace(loss=loss)


@pytest.fixture(scope="module")
def known():
    torch.manual_seed(0)
    model = Parallel()
    batches = []
    for _ in range(8):
        x = torch.randn(8, 32, 8)
        x[..., 0] = 3 * x[..., 0].sign()
        batches.append({"x": x, "noise": 0.3 * torch.randn(8, 32, 8), "labels": torch.zeros(8, 32, dtype=torch.long)})
    return model, batches, [Site(n, (f"layers.{n}.fc",)) for n in range(3)]


def test_gains_are_found_where_they_are(known):
    model, batches, sites = known
    right, same, opposite = measure_gain(model, batches, sites, 4)
    one, more = slice(0, 1), slice(1, 2)
    assert float(same[one, 0]) > 5 * max(float(right[one, 0].abs()), float(opposite[one, 0].abs()))
    assert float(opposite[more, 0] - opposite[one, 0]) > 5 * max(
        float((t[more, 0] - t[one, 0]).abs()) for t in (right, same)
    )
    assert float(same[0, 0]) > 0.8 * float(same[0, -1])  # the change has rank 1
    assert float(opposite[1, 0]) == pytest.approx(
        float(same[0, 0]), rel=0.3
    )  # two experts are as good there as one here


def test_experts_go_where_tokens_disagree_and_rank_where_changes_are_wide(known):
    model, batches, _ = known
    config = LinearMoeConfig(num_experts=1, r=1, routing="softmax", target_modules=["fc"])
    found = allocate(model, batches, config, "=2:1:1", max_experts=2)
    assert found.config.num_experts == [1, 1, 2]
    config = LinearMoeConfig(num_experts=1, r=2, routing="softmax", target_modules=["fc"])
    ranked = allocate(model, batches, config, choose="rank")
    assert sum(ranked.config.r) == 6
    assert ranked.config.r[1] == max(ranked.config.r) > ranked.config.r[0]


def test_padding_changes_no_gain():
    model, batches = make_tiny_llama(layers=2), text(4)
    padded = []
    for batch in batches:
        empty = torch.zeros(4, 5, dtype=torch.long)
        padded.append(
            {
                "input_ids": torch.cat((batch["input_ids"], empty), 1),
                "attention_mask": torch.cat((batch["attention_mask"], empty), 1),
                "labels": torch.cat((batch["labels"], empty - 100), 1),
            }
        )
    sites = [Site(0, ("model.layers.0.mlp.up_proj",)), Site(1, ("model.layers.1.self_attn.q_proj",))]
    for a, b in zip(measure_gain(model, batches, sites, 3), measure_gain(model, padded, sites, 3), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_the_budget_is_met_and_the_model_is_left_as_it_was(kind):
    model = make_tiny_llama()
    model.train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    config = (
        LinearMoeConfig(num_experts="2:4:6:8", r=2, target_modules=FFN)
        if kind == "linear"
        else FfnMoeConfig(num_experts="2:4:6:8", r=2, target_modules="all-linear")
    )
    calls = []
    found = allocate(model, text(), config, progress=lambda done, total: calls.append((done, total)))
    assert found.trainable == found.budget == count_config(without_weights(model), found.config).trainable
    assert sum(found.config.num_experts) == 20
    assert min(found.config.num_experts) >= 2
    assert (found.config.r, found.config.top_k) == (2, 2)
    assert calls == [(n, 12) for n in range(1, 13)]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    get_peft_model(model, found.config)  # the lists are of the right length


@pytest.mark.parametrize("choose", ["rank", "both"])
def test_rank_is_chosen_within_its_bounds(choose):
    config = LinearMoeConfig(num_experts=4, r=3, target_modules=FFN)
    found = allocate(make_tiny_llama(), text(), config, choose=choose, max_rank=5)
    assert found.budget * 0.9 < found.trainable <= found.budget
    assert found.trainable == count_config(without_weights(make_tiny_llama()), found.config).trainable
    assert all(1 <= r <= 5 for r in found.config.r)
    assert found.config.num_experts == 4 if choose == "rank" else len(found.config.num_experts) == 4


def test_costs_are_those_that_the_count_gives():
    model = make_tiny_llama()
    config = FfnMoeConfig(
        num_experts=4, r=3, num_shared_experts=1, target_modules="all-linear", modules_to_save=["lm_head"]
    )
    found = allocate(model, text(2), config, choose="both", max_experts=4, max_rank=3)
    fixed = found.trainable - sum(layer.cost[n][m] for layer, (n, m) in zip(found.layers, found.picks, strict=True))
    assert fixed == model.lm_head.weight.numel()
    for n, r in ((2, 1), (4, 3)):
        uniform = FfnMoeConfig(
            num_experts=n, r=r, num_shared_experts=1, target_modules="all-linear", modules_to_save=["lm_head"]
        )
        cost = sum(layer.cost[layer.experts.index(n)][layer.ranks.index(r)] for layer in found.layers)
        assert count_config(without_weights(model), uniform).trainable == fixed + cost


def test_layers_that_are_not_adapted_are_left_out():
    config = LinearMoeConfig(num_experts=3, r=2, target_modules=FFN, layers_to_transform=[1, 3])
    found = allocate(make_tiny_llama(), text(), config, max_experts=4)
    assert [layer.number for layer in found.layers] == [1, 3]
    assert len(found.config.num_experts) == 4
    assert found.config.num_experts[0] == found.config.num_experts[2] == 2
    assert found.trainable == found.budget


def test_the_copy_that_is_counted_on_has_no_weights():
    model = make_tiny_llama(layers=1)
    model.lm_head.state = SimpleNamespace(CB=torch.zeros(3))  # as bitsandbytes' 8-bit layers
    skeleton = without_weights(model)
    tensors = [*skeleton.parameters(), *skeleton.buffers(), skeleton.lm_head.state.CB]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert model.lm_head.weight.device.type == model.lm_head.state.CB.device.type == "cpu"


def test_the_linears_of_an_ffn_block_follow_the_cells_of_its_input():
    model = make_tiny_llama(layers=2)
    names = tuple(f"model.layers.0.mlp.{name}" for name in FFN)
    probes = [gain._Probe(Site(0, names, readers=2), 0), gain._Probe(Site(0, names[:1]), 0)]
    with gain._watching(model, probes):
        for again in (0, 1):
            gain._backward(model, text(1)[0], probes, 0)
            for probe in () if again else probes:
                probe.find_cells()
    counts = [probes[0].sums[name].counts for name in names] + [probes[1].sums[names[0]].counts]
    assert all(torch.equal(counts[0], other) for other in counts)
    assert int((counts[0] > 0).sum()) > 10


def test_an_ffn_block_is_one_site_and_attention_has_no_experts():
    skeleton = without_weights(make_tiny_llama(layers=2))
    assert all(p.device.type == "meta" for p in skeleton.parameters())
    sites, total = find_sites(skeleton, FfnMoeConfig(target_modules="all-linear"))
    assert total == 2
    mixed = [site for site in sites if site.routed]
    assert [site.linears for site in mixed] == [tuple(f"model.layers.{n}.mlp.{name}" for name in FFN) for n in (0, 1)]
    assert {site.readers for site in mixed} == {2}
    assert len(sites) == 2 + 2 * 4


def test_numbers_that_the_config_does_not_allow_are_not_chosen():
    config = LinearMoeConfig(num_experts=4, r=1, routing="softmax", balance="localized", target_modules=["up_proj"])
    found = allocate(make_tiny_llama(), text(), config)
    assert all(n % 2 == 0 for n in found.config.num_experts)
    assert sum(found.config.num_experts) == 16


def test_steps_are_bought_as_well_as_by_trying_everything():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        steps = torch.rand(3, 4, generator=draw).sort(dim=1, descending=True).values
        gains = [[[float(v)] for v in row.cumsum(0)] for row in steps]
        costs = [[[10 * (n + 1)] for n in range(4)] for _ in range(3)]
        for budget in (30, 57, 80, 120):
            picks = buy(gains, costs, budget)
            possible = [
                sum(gains[i][n][0] for i, n in enumerate(pick))
                for pick in itertools.product(range(4), repeat=3)
                if sum(costs[i][n][0] for i, n in enumerate(pick)) <= budget
            ]
            assert sum(gains[i][n][m] for i, (n, m) in enumerate(picks)) == pytest.approx(max(possible))


def test_what_is_left_of_a_budget_buys_nothing_more():
    gains = [[[0.0], [1.0], [1.1]], [[0.0], [0.9], [1.7]]]
    costs = [[[10], [13], [16]], [[20], [27], [34]]]
    for budget in range(30, 51):
        picks = buy(gains, costs, budget)
        left = budget - sum(costs[i][n][m] for i, (n, m) in enumerate(picks))
        steps = [costs[i][n + 1][m] - costs[i][n][m] for i, (n, m) in enumerate(picks) if n < 2]
        assert left >= 0
        assert all(step > left for step in steps)


def test_without_any_gain_parameters_are_spread_evenly():
    costs = [[[10 * (n + 1)] for n in range(4)] for _ in range(3)]
    assert buy([[[0.0]] * 4] * 3, costs, 60) == [(1, 0)] * 3


def test_concave_curves_stay_and_others_get_the_nearest_one():
    assert concave([1, 2, 3], [1.0, 3.0, 4.0]) == [1.0, 3.0, 4.0]
    assert concave([2, 3, 4, 5], [0.0, 1.0, 4.0, 3.5]) == [0.0, 2.0, 4.0, 4.0]
    assert concave([2, 4, 5], [0.0, 2.0, 5.0]) == pytest.approx([0.0, 10 / 3, 5.0])
    assert concave([3], [-1.0]) == [-1.0]


LINEAR = LinearMoeConfig(num_experts=4, r=2, target_modules=FFN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"config": LoraConfig(target_modules=FFN)},
            "`config` is 'LORA', but must be of a type with experts in each layer",
        ),
        (
            {"config": RankMoeConfig(target_modules=FFN)},
            "`config` is 'RANK_MOE', but must be of a type with experts in each layer",
        ),
        ({"config": "mola"}, "`config` is 'mola', but must be of a type with experts .* Give a LinearMoeConfig"),
        ({"batches": text(2)[0]["input_ids"]}, "`batches` is 'Tensor', but must be of batches that map names"),
        ({"choose": "expert"}, "`choose` is 'expert', but must be one of .* Did you mean 'experts'"),
        ({"budget": 10}, "`budget` is 10, but must be at least .* what the least of everything costs"),
        ({"budget": "=9:9:9:9"}, r"`budget` is '=9:9:9:9', but must be at most .* \(.* parameters\). .*`max_experts`"),
        ({"budget": 10**9, "choose": "rank"}, "but must be at most .* raise `max_rank`"),
        ({"budget": "=2:3:4:5:6"}, "a pattern of at most 4 groups"),
        ({"budget": "=2:x"}, "`num_experts` is '2:x'"),
        ({"budget": "many"}, "`budget` is 'many', but must be a number of parameters, or an allocation"),
        ({"budget": 0.5}, "`budget` is 0.5, but must be a number of parameters"),
        ({"min_experts": 1}, r"`min_experts` is 1, but must be 2 to 8 here \(`top_k` = 2"),
        ({"min_experts": 9}, "`min_experts` is 9, but must be 2 to 8 here"),
        ({"min_experts": 0}, "`min_experts` is 0, but must be a whole number of at least 1"),
        ({"max_experts": 1}, "`max_experts` is 1, but must be at least as many as the config needs"),
        ({"max_experts": 33}, "`max_experts` is 33, but must be at most 32"),
        ({"max_experts": 5, "choose": "rank"}, "`max_experts` is 5, but must be left out with `choose` = 'rank'"),
        ({"max_rank": 4}, "`max_rank` is 4, but must be left out with `choose` = 'experts'"),
        ({"max_rank": 0, "choose": "rank"}, "`max_rank` is 0, but must be a whole number of at least 1"),
        ({"batches": []}, "0 of 0 batches of calibration text have labels"),
        ({"batches": text(1)}, "1 of 1 batches of calibration text have labels, .* at least 2 are needed"),
        ({"batches": [{**b, "labels": 0 * b["labels"] - 100} for b in text(3)]}, "0 of 3 batches"),
        ({"batches": [{"input_ids": b["input_ids"]} for b in text(3)]}, "has no `labels`"),
        (
            {"config": LinearMoeConfig(r=2, target_modules=["up_proj", "lm_head"])},
            "The target 'lm_head' has no layer number in its name, .*exclude_modules=",
        ),
        ({"config": LinearMoeConfig(r=2, target_modules=["up_prjo"])}, "Target modules .*up_prjo.* not found"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message):
    given = {"model": make_tiny_llama(), "batches": text(2), "config": LINEAR, **arguments}
    with pytest.raises(ValueError, match=message):
        allocate(**given)


def test_a_model_with_an_adapter_is_refused():
    with pytest.raises(ValueError, match="carries an adapter already"):
        allocate(get_peft_model(make_tiny_llama(), LINEAR), text(2), LINEAR)


def test_targets_in_two_lists_of_layers_are_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})]) for _ in range(2))

    with pytest.raises(ValueError, match=r"lie in 2 lists of layers \(a, b\)"):
        allocate(Two(), text(2), LinearMoeConfig(target_modules=["fc"]))


def test_layers_that_the_loss_does_not_reach_are_refused(known):
    model, batches, sites = known
    model.layers.append(nn.ModuleDict({"fc": nn.Linear(8, 8)}))
    try:
        with pytest.raises(ValueError, match="No gradient reached the adapted layers"):
            measure_gain(model, batches, [Site(3, ("layers.3.fc",))], 2)
        table = measure_gain(model, batches, [*sites, Site(3, ("layers.3.fc",))], 2)[3]
    finally:
        del model.layers[3]
    assert not table.any()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, make_suite("fact8tag", 0, num_people=8).train)))
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_the_command_writes_a_folder_that_train_takes(rows, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "allocated"
    assert run("allocate", "--adapter", "mola", "--set", "r=2", "--data", rows, "--output", out, "--limit", 32) == 0
    said = capsys.readouterr().out
    assert "Experts and rank by layer" in said
    record = json.loads((out / "allocation.json").read_text())
    assert sum(record["num_experts"]) == 20
    assert record["trainable"] == record["budget"]
    assert [layer["chosen"]["experts"] for layer in record["layers"]] == record["num_experts"]
    assert (out / "allocation.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json",
        "allocation.json",
        "allocation.png",
        "recipe.yaml",
    ]
    source = adapter_config(str(out))
    assert source.config.num_experts == record["num_experts"]
    assert source.recipe == adapter_config("mola").recipe
    pytest.importorskip("trl")
    options = ("--max_steps", 1, "--gradient_accumulation_steps", 1, "--output_dir", tmp_path / "trained")
    assert run("train", "--adapter", out, "--dataset", rows, *options) == 0
    trained = adapter_config(str(tmp_path / "trained"))
    assert trained.config.num_experts == record["num_experts"]


def test_the_commands_refusals(rows, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")

    def refusal(*arguments: object) -> str:
        assert run("allocate", "--data", rows, *arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    out = tmp_path / "out"
    assert "must be a new or empty folder" in refusal("--output", tmp_path / "full")
    assert "Did you mean 'mola'?" in refusal("--output", out, "--adapter", "moola")
    assert "`--set` is 'r'" in refusal("--output", out, "--set", "r")
    assert "1 of 1 batches of calibration text have labels" in refusal("--output", out, "--limit", 8)
    assert "`batch_size` is 0" in refusal("--output", out, "--batch-size", 0)
    assert "must be at least" in refusal("--output", out, "--budget", 100)
    assert not out.exists()


def test_a_4_bit_model_is_left_bit_for_bit_as_it_was():
    model, _ = load_pocket()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = allocate(model, text(3), LinearMoeConfig(num_experts=3, r=2, target_modules="all-linear"), max_experts=4)
    assert found.trainable == found.budget
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_kind_of_choice_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from moe_peft.allocating_report import allocation_table, draw_allocation

    for choose in allocating.CHOICES:
        found = allocate(
            make_tiny_llama(layers=2),
            text(2),
            LINEAR,
            choose=choose,
            **({} if choose == "rank" else {"max_experts": 4}),
        )
        draw_allocation(found, tmp_path / f"{choose}.png")
        assert (tmp_path / f"{choose}.png").stat().st_size > 1000
        assert allocation_table(found).row_count == 2
