"""Plain LoRAs merged as the products that they are, held against definitions on dense matrices."""

import json
import shutil

import pytest
import torch
from conftest import make_tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import ties

from moe_peft import LinearMoeConfig, cli, merge_loras
from moe_peft.merging_loras import RECORD_FILE, knots_parts
from moe_peft.plain_loras import Pair, read_lora
from moe_peft.pocket import make_suite
from moe_peft.trial import load_pocket


def save_lora(folder, seed, base=None, **settings):
    torch.manual_seed(seed)
    given = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base or make_tiny_llama(layers=1), LoraConfig(**given))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("loras")
    # Different ranks, scales and modules: the second is rank-stabilised and has no up_proj.
    law = save_lora(root / "law", 1)
    code = save_lora(root / "code", 2, r=2, use_rslora=True, target_modules=["q_proj", "v_proj"])
    return {"law": law, "code": code}


def deltas(folder) -> dict[str, torch.Tensor]:
    """Module name -> the dense change, by PEFT's own class on the base."""
    model = PeftModel.from_pretrained(make_tiny_llama(layers=1), folder)
    found = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double()
    return found


def cut(delta: torch.Tensor, r: int) -> torch.Tensor:
    U, sigma, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :r] * sigma[:r] @ Vh[:r]


def dense_knots(parts: list[torch.Tensor], density: float) -> torch.Tensor:
    """KnOTS as its release does it, on dense matrices."""
    U, sigma, Vh = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False)
    keep = sigma > 1e-5
    each = (sigma[keep, None] * Vh[keep]).split([part.shape[1] for part in parts], dim=1)
    return U[:, keep] @ ties(list(each), torch.ones(len(parts)).double(), density)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "knots_ties"])
def test_the_merged_lora_is_the_definition(two, tmp_path, method):
    settings = {"density": 0.5} if "ties" in method else {"weights": {"law": 0.7, "code": -0.4}}
    found = merge_loras(two, tmp_path / "out", method, **settings)
    made, each = deltas(tmp_path / "out"), [deltas(folder) for folder in two.values()]
    assert set(made) == set(each[0]) | set(each[1])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for module, delta in made.items():
        parts = [one[module] for one in each if module in one]
        weights = [w for w, one in zip((0.7, -0.4), each, strict=True) if module in one]
        total = sum(w * part for w, part in zip(weights, parts, strict=True))
        rank = {name: len(read_lora(folder).pairs.get(module, Pair([], []))[0]) for name, folder in two.items()}
        if method == "cat":
            wanted, ranks = total, sum(rank.values())
        elif method == "linear":
            wanted, ranks = cut(total, max(rank.values())), max(rank.values())
        elif method == "ties":
            wanted, ranks = (
                cut(ties(parts, torch.ones(len(parts)).double(), 0.5), max(rank.values())),
                max(rank.values()),
            )
        else:
            wanted, ranks = dense_knots(parts, 0.5), sum(rank.values())
        torch.testing.assert_close(delta, wanted, rtol=1e-4, atol=1e-5, msg=module)
        assert found.ranks[module] == ranks
    assert all(-1 <= value <= 1 for value in found.likeness.values())


def test_compact_knots_is_dense_knots():
    torch.manual_seed(0)
    pairs = [Pair(torch.randn(r, 20).double(), torch.randn(r, 15).double()) for r in (2, 3, 4)]
    dense = torch.cat([pair.B.T @ pair.A for pair in pairs], dim=1)
    U, parts = knots_parts(pairs)
    torch.testing.assert_close(U.T @ U, torch.eye(9).double(), rtol=0, atol=1e-12)
    for pair, part in zip(pairs, parts, strict=True):
        torch.testing.assert_close(U @ part, pair.B.T @ pair.A, rtol=1e-10, atol=1e-11)
    sigma = torch.linalg.svdvals(torch.cat(parts, dim=1))
    torch.testing.assert_close(sigma, torch.linalg.svdvals(dense)[:9], rtol=1e-12, atol=1e-12)


def test_ties_of_a_lora_with_itself_is_that_lora(two, tmp_path):
    merge_loras([two["law"], two["law"]], tmp_path / "out", "knots_ties")
    made, whole = deltas(tmp_path / "out"), deltas(two["law"])
    for module, delta in whole.items():
        torch.testing.assert_close(made[module], delta, rtol=1e-4, atol=1e-5)
    merged = merge_loras([two["law"], two["law"]], tmp_path / "mean", "linear")
    assert all(error < 1e-6 for error in merged.errors.values())
    assert list(merged.likeness.values()) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_rank_cuts_and_says_what_it_costs(two, tmp_path):
    found = merge_loras(two, tmp_path / "out", "cat", rank=2)
    made, each = deltas(tmp_path / "out"), [deltas(folder) for folder in two.values()]
    for module, delta in made.items():
        total = sum(0.5 * one[module] for one in each if module in one)
        torch.testing.assert_close(delta, cut(total, 2), rtol=1e-4, atol=1e-5)
        assert found.errors[module] == pytest.approx(float((delta - total).norm() / total.norm()), rel=1e-4, abs=1e-6)


def test_a_lora_that_does_nothing_is_merged(tmp_path):
    torch.manual_seed(0)
    folders = []
    for name in ("a", "b"):
        model = get_peft_model(make_tiny_llama(layers=1), LoraConfig(target_modules=["q_proj"], r=2))
        model.save_pretrained(tmp_path / name)  # B is 0
        folders.append(tmp_path / name)
    for method in ("ties", "knots_ties", "linear", "cat"):
        found = merge_loras(folders, tmp_path / method, method)
        assert not any(delta.any() for delta in deltas(tmp_path / method).values())
        assert set(found.likeness.values()) == {0.0}


def test_everything_that_does_not_fit_is_said_at_once_and_nothing_is_written(two, tmp_path):
    dora = save_lora(tmp_path / "dora", 3, use_dora=True)
    biased = save_lora(tmp_path / "biased", 3, bias="lora_only")
    other = make_tiny_llama(layers=1)
    other.config.hidden_size = 32
    wide = save_lora(tmp_path / "wide", 3, type(other)(other.config))
    law = shutil.copytree(two["law"], tmp_path / "law")
    for folder, name in ((law, "base-a"), (wide, "base-b")):
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "base_model_name_or_path": f"somewhere/{name}"}))
    with pytest.raises(ValueError, match="cannot be merged, and nothing was written") as caught:
        merge_loras([law, dora, biased, wide], tmp_path / "out", "cat")
    said = str(caught.value)
    for part in (
        "`use_dora`: DoRA",
        "`bias` is 'lora_only'",
        "trained on somewhere/base-b",
        "goes from 32 to 64, and in",
    ):
        assert part in said, part
    assert not (tmp_path / "out").exists()
    config = LinearMoeConfig(num_experts=2, target_modules=["q_proj"])
    get_peft_model(make_tiny_llama(layers=1), config).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"moe \(LINEAR_MOE\)', but must be the folder or the Hub id of a plain LoRA"):
        merge_loras([two["law"], tmp_path / "moe"], tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tie"}, "`method` is 'tie', but must be one of .* Did you mean 'ties'"),
        ({"density": 0}, "`density` is 0, but must be above 0 and at most 1"),
        ({"density": 0.5, "method": "cat"}, "`density` is 0.5, but must be left out with `method` = 'cat'"),
        ({"rank": 0}, "`rank` is 0, but must be a whole number of at least 1"),
        ({"weights": [1.0]}, r"`weights` is \[1.0\], but must be 2 numbers"),
        ({"weights": {"law": 1.0}}, "`weights` is .* given for each of law, code"),
        ({"weights": [1.0, float("nan")]}, "`weights` is .* finite numbers"),
    ],
)
def test_what_is_mistyped_gets_a_sentence(two, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        merge_loras(two, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_one_lora_and_a_folder_in_use_are_refused(two, tmp_path):
    with pytest.raises(ValueError, match="must be two or more LoRAs"):
        merge_loras([two["law"]], tmp_path / "out")
    with pytest.raises(ValueError, match="`output` is .* a new or empty folder"):
        merge_loras(two, two["law"])


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_the_command_merges_and_measures(tmp_path, capsys):
    folders = [
        save_lora(tmp_path / name, seed, load_pocket()[0], target_modules=["up_proj"])
        for seed, name in enumerate("ab")
    ]
    rows = make_suite("fact8tag", 0, num_people=2).test
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, text = tmp_path / "out", ("--held-out", tmp_path / "rows.jsonl")
    assert run("merge-loras", *folders, "--method", "knots_ties", "--output", out, *text) == 0
    record = json.loads((out / RECORD_FILE).read_text())
    assert list(record["measured"]) == ["a", "b"]
    assert record["measured"]["a"]["loss_base"] == record["measured"]["b"]["loss_base"]
    assert record["measured"]["a"]["loss_routed"] != record["measured"]["b"]["loss_routed"]
    assert record["measured"]["a"]["kl_merged"] > 0
    assert "Merged into one LoRA of rank 6" in capsys.readouterr().out
    assert run("merge-loras", *folders, "--output", tmp_path / "x", *text, *text, *text) == 2
    assert "`--held-out` is" in " ".join(capsys.readouterr().err.split())
    assert run("merge-loras", *folders, "--output", tmp_path / "x", "--method", "knot_ties") == 2
    assert "Did you mean 'knots_ties'?" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()
