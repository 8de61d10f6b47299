"""The routing report: known values at the extremes, counts that match the router, a picture that is written."""

import json
import math
import re

import pytest
import torch
from conftest import make_tiny_llama
from peft import get_peft_model

from moe_peft import LinearMoeConfig
from moe_peft.merge import routed_layers
from moe_peft.report import (
    RouterHealth,
    RoutingReport,
    domain_information,
    health_table,
    health_verdict,
    heat_map,
    routing_report,
    short_name,
    verdict,
)
from moe_peft.watch import DEAD_SHARE


def model_and_text(**settings):
    torch.manual_seed(3)
    config = LinearMoeConfig(**{"num_experts": 4, "r": 2, "target_modules": "all-linear", **settings})
    model = get_peft_model(make_tiny_llama(layers=2), config)
    generator = torch.Generator().manual_seed(0)
    return model, {d: [{"input_ids": torch.randint(1, 100, (4, 9), generator=generator)}] for d in ("law", "code")}


def test_domain_information_is_1_when_each_domain_has_its_own_expert_and_0_when_all_are_alike():
    assert domain_information(torch.eye(4).double()) == pytest.approx(1.0)
    assert domain_information(torch.ones(4, 3).double()) == pytest.approx(0.0, abs=1e-12)
    assert domain_information(torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 9.0, 9.0]])) == pytest.approx(1.0)
    assert domain_information(torch.ones(1, 3)) == 0.0


def test_every_token_is_counted_top_k_times_in_its_own_domain():
    model, batches = model_and_text()
    report = routing_report(model, batches)
    assert report.domains == ["law", "code"]
    assert len(report.health) == 2 * 7
    for table in report.counts.values():
        assert [sum(row) for row in table] == [2 * 4 * 9, 2 * 4 * 9]


def test_the_number_of_experts_that_tokens_choose_is_that_of_the_rule():
    model, batches = model_and_text(num_null_experts=3, top_k=4, router_init_std=0.5)
    name, layer = next(iter(routed_layers(model).items()))
    seen, router = [], layer.experts("default")
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    report = routing_report(model, batches)
    handle.remove()
    index = (torch.cat(seen) @ router.router.T).topk(4).indices
    wanted = float((index < 4).sum(1).double().mean())
    assert 0 < wanted < 4
    assert report.health[name].active == pytest.approx(wanted)
    assert [str(column.header) for column in health_table(report).columns][-1] == "active"
    plain = routing_report(*model_and_text())
    assert {h.active for h in plain.health.values()} == {None}
    assert [str(column.header) for column in health_table(plain).columns][-1] == "domain"


def test_where_tokens_visit_all_experts_their_weights_are_what_counts():
    model, batches = model_and_text(num_experts=2, top_k=2, balance="none", router_init_std=2.0)
    name, layer = next(iter(routed_layers(model).items()))
    seen, router = [], layer.experts("default")
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    report = routing_report(model, batches)
    handle.remove()
    wanted = [(x @ router.router.T).softmax(-1).sum(0).tolist() for x in seen]
    for got, row in zip(report.counts[name], wanted, strict=True):
        assert got == pytest.approx(row, rel=1e-4)
    assert report.health[name].domain_information > 0


def test_a_null_expert_that_nothing_visits_is_not_dead():
    model, batches = model_and_text(num_null_experts=1, router_bias=True)
    with torch.no_grad():
        for layer in routed_layers(model).values():
            layer.experts("default").router_bias[-1] = -1e4
    for health in routing_report(model, batches).health.values():
        assert health.load[-1] == 0
        assert health.dead == sum(share * 5 < DEAD_SHARE for share in health.load[:4])


def test_a_router_that_sends_everything_to_one_pair_of_experts_is_seen():
    model, batches = model_and_text()
    name, layer = next(iter(routed_layers(model).items()))
    router = layer.linear_moe_experts["default"].router
    with torch.no_grad():
        router.zero_()
    even = routing_report(model, batches).health[name]
    assert even.entropy == pytest.approx(1.0, abs=1e-5)  # undecided: all probabilities alike
    assert even.dead == 2  # ties always go to the same two experts
    assert even.max_load == pytest.approx(2.0)
    assert even.domain_information == pytest.approx(0.0, abs=1e-9)


def test_a_dense_router_reports_the_weight_that_each_expert_gets():
    model, batches = model_and_text(routing="softmax")
    with torch.no_grad():
        for layer in routed_layers(model).values():
            layer.linear_moe_experts["default"].router.zero_()
    for health in routing_report(model, batches).health.values():
        assert health.load == pytest.approx([0.25] * 4)
        assert (health.dead, health.entropy) == (0, pytest.approx(1.0, abs=1e-5))


def test_padding_is_not_counted():
    model, _ = model_and_text()
    ids = torch.randint(1, 100, (2, 6))
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.long)), dim=1)
    report = routing_report(model, {"a": [{"input_ids": padded, "attention_mask": (padded != 0).long()}]})
    assert all(sum(table[0]) == 2 * 12 for table in report.counts.values())


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ([[9.0, 0.0], [0.0, 9.0]], "The experts follow the domains: .* tells 100%"),
        ([[7.0, 3.0], [3.0, 7.0]], "follow the domains in part"),
        ([[5.0, 5.0], [5.0, 5.0]], "do not follow the domains"),
    ],
)
def test_the_verdict_says_whether_experts_follow_the_domains(counts, sentence):
    health = RouterHealth([0.5, 0.5], 0.5, 1.0, 0, domain_information(torch.tensor(counts)))
    assert re.search(sentence, verdict(RoutingReport(["a", "b"], {"x": counts}, {"x": health})))


@pytest.mark.parametrize(
    ("dead", "sentence"),
    [
        ({"x": 0, "y": 0}, r"Healthy: every router uses all .* gets 1\.8 times an even share \(y\)"),
        ({"x": 2, "y": 1}, r"2 of 2 routers have experts that .* 3 in all, most of them in x; .* 1\.8 times"),
    ],
)
def test_the_routers_health_in_one_sentence(dead, sentence):
    busiest = {"x": 0.5, "y": 0.9}
    health = {name: RouterHealth([s, 1 - s], 0.5, 2 * s, dead[name], 0.0) for name, s in busiest.items()}
    report = RoutingReport(["a"], {}, health)
    assert re.search(sentence, health_verdict(report))


def test_only_positions_that_predict_an_answer_are_counted_when_asked_for():
    model, _ = model_and_text()
    ids = torch.randint(1, 100, (2, 6))
    labels = ids.clone()
    labels[:, :4] = -100  # two answer tokens a row, predicted from positions 3 and 4
    batch = {"input_ids": ids, "labels": labels}
    report = routing_report(model, {"a": [batch]}, answers_only=True)
    assert all(sum(table[0]) == 2 * 2 * 2 for table in report.counts.values())
    assert all(sum(table[0]) == 2 * 2 * 6 for table in routing_report(model, {"a": [batch]}).counts.values())
    with pytest.raises(ValueError, match="`answers_only` is True, but domain 'a' has no `labels`"):
        routing_report(model, {"a": [{"input_ids": ids}]}, answers_only=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model, batches = model_and_text()
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routing_report(model, batches)
    assert model.training == training
    context = next(iter(routed_layers(model).values())).context
    assert not context.recording
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_written_as_json_and_as_a_picture(tmp_path):
    model, batches = model_and_text()
    report = routing_report(model, batches)
    report.save(tmp_path / "routing.json")
    saved = json.loads((tmp_path / "routing.json").read_text())
    assert saved["domains"] == ["law", "code"]
    assert saved["layers"][report.most_telling_layer()]["dead"] == report.health[report.most_telling_layer()].dead
    heat_map(report, tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["routing.json", "routing.png"]
    assert health_table(report).row_count == 14


def test_names_are_shortened_to_layer_and_projection():
    assert short_name("model.layers.3.mlp.up_proj") == "3 mlp.up_proj"
    assert short_name("lin0") == "lin0"


def test_entropy_is_a_share_of_the_largest_possible():
    model, batches = model_and_text()
    health = next(iter(routing_report(model, batches).health.values()))
    assert 0 < health.entropy <= 1
    assert health.max_load <= 4
    assert math.isclose(sum(health.load), 1.0, rel_tol=1e-6)


def test_bad_input_is_refused_in_words():
    model, _ = model_and_text()
    with pytest.raises(ValueError, match="Domain 'law' has no text"):
        routing_report(model, {"law": []})
    plain, batches = model_and_text(num_experts=1)
    with pytest.raises(ValueError, match="one expert in every layer, .* so nothing is routed"):
        routing_report(plain, batches)
