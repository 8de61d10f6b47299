"""`moe-peft train` from settings to a saved adapter, on the pocket backbone in 4 bits with TRL's own trainer."""

import io
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("bitsandbytes")

from moe_peft import saving  # noqa: E402
from moe_peft.arguments import parse  # noqa: E402
from moe_peft.backbone import load_backbone, load_tokenizer  # noqa: E402
from moe_peft.banner import example  # noqa: E402
from moe_peft.catalogue import from_catalogue, methods, recipe  # noqa: E402
from moe_peft.export.checkpoint import base_sha256  # noqa: E402
from moe_peft.plain_yaml import load_settings  # noqa: E402
from moe_peft.pocket import POCKET_DIR  # noqa: E402
from moe_peft.saving import checkpoint_to_resume  # noqa: E402
from moe_peft.training import load_rows, main, run  # noqa: E402


ROOT = Path(__file__).parent.parent
WORDS = ("abc", "de", "fghi", "jk", "lmn", "op", "qrs", "tu", "vwxy", "zab", "cd", "efg")
SHORT = ["--max_length", "32", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--disable_tqdm",
         "--logging_steps", "1", "--warmup_steps", "0", "--learning_rate", "1e-2"]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows(tmp_path):
    """Reversing words; the pocket backbone knows how."""
    pairs = [{"prompt": f"rev:{w}>", "completion": w[::-1], "task_type": i % 2} for i, w in enumerate(WORDS * 2)]
    return write(tmp_path / "rows.jsonl", pairs)


def trained(*argv):
    """Run as the command does; returns what was printed."""
    out = io.StringIO()
    main([*SHORT, *argv], Console(file=out, width=200))
    return out.getvalue()


def losses(folder, key="loss"):
    return [
        entry[key] for entry in json.loads((Path(folder) / "training_log.json").read_text())["log"] if key in entry
    ]


# ----- Settings: this machine < recipe < --config < command line -----


def test_each_layer_of_settings_wins_over_the_one_below(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "adapter: mola\ndataset: d.jsonl\nmax_length: 99\nlearning_rate: 3e-3\neval_strategy: no\nset: {r: 4}\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    )
    settings = parse(["--config", str(mine), "--learning-rate", "7e-4", "--set", "top_k=1", "num_experts=1"])
    training = settings.training
    assert training.bf16 == torch.cuda.is_available()  # this machine's, not TRL's default
    assert training.per_device_train_batch_size == recipe("mola")["per_device_train_batch_size"]
    assert (training.max_length, training.learning_rate) == (99, 7e-4)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    config = settings.source.config
    assert (config.r, config.top_k, config.num_experts, config.lora_alpha) == (4, 1, 1, 16)
    assert (training.output_dir, training.eval_strategy) == ("output/mola", "no")


@pytest.mark.parametrize("name", methods())
def test_every_recipe_is_understood_and_can_be_repeated(name, tmp_path):
    settings = parse(["--adapter", name, "--dataset", "d.jsonl", "--set", "r=8", "--output_dir", str(tmp_path)])
    for key, value in recipe(name).items():
        assert getattr(settings.training, key) == value
    again = tmp_path / "again.yaml"
    again.write_text(__import__("yaml").safe_dump(settings.given))
    repeated = parse(["--config", str(again)])
    assert repeated.arguments == settings.arguments
    assert repeated.source.config == settings.source.config
    assert repeated.training.to_dict() == settings.training.to_dict()


def test_a_recipe_beside_an_adapter_counts_too(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LINEAR_MOE", "num_experts": 2}')
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1e-3\n")
    with pytest.raises(ValueError, match=r"`learning_rat` in recipe.yaml of '.*' is not a setting .* 'learning_rate'"):
        parse(["--adapter", str(tmp_path), "--dataset", "d.jsonl"])
    (tmp_path / "recipe.yaml").write_text("learning_rate: 1e-3\n")
    assert parse(["--adapter", str(tmp_path), "--dataset", "d.jsonl"]).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat", "1"], "`--learning_rat` is not an option. Did you mean 'learning_rate'?"),
        (["--num-experts", "4"], "`--num-experts` is not an option"),
        (["--adapter", "molor"], "'molor' is neither in the catalogue nor a folder. Did you mean 'molora'?"),
        (["--set", "num_expert=4"], "`num_expert` is not a field of LinearMoeConfig. Did you mean 'num_experts'?"),
        (["--set", "r:4"], "`--set` is 'r:4', but must be a field of the adapter and its value. Write `--set"),
        (
            ["--learning_rate", "fast"],
            "Argument --learning_rate/--learning-rate: invalid float value: 'fast'. See `moe-",
        ),
        (["--load_in", "5bit"], "Argument --load_in/--load-in: invalid choice: '5bit'"),
        (["--load_in", "8bit", "--no-quantize"], "`--no_quantize` and `--load_in 8bit` exclude each other"),
        (["--eval_strategy", "steps"], "`eval_strategy` is 'steps', but there are no data to evaluate on"),
        (["--config", "no.yaml"], "`--config` is 'no.yaml', but there is no such file"),
        (["stray"], "'stray' belongs to no option"),
    ],
)
def test_a_wrong_command_line_is_refused(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(["--dataset", "d.jsonl", *argv])


def test_data_have_to_be_given():
    with pytest.raises(ValueError, match="`--dataset` is missing. Give a json, jsonl, csv"):
        parse([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_lenght: 8", "`max_lenght` in {path} is not a setting of training. Did you mean 'max_length'?"),
        ("max_length: long", "`max_length` in {path}: invalid int value: 'long'"),
        ("per_device_train_batch_size: 2.5", "`per_device_train_batch_size` in {path}: invalid int value: '2.5'"),
        ("load_in: 5bit", "`load_in` in {path}: invalid choice: '5bit'"),
        ("set: {rank: 8}", "`rank` is not a field of LinearMoeConfig"),
        ("- a", "{path} must hold settings, one `name: value` a line, but holds a list"),
    ],
)
def test_a_wrong_settings_file_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        parse(["--dataset", "d.jsonl", "--config", str(path)])


# ----- The backbone -----


def test_a_4_bit_backbone_can_be_evaluated_and_then_trained():
    model = load_backbone("pocket", device="cpu", dtype=torch.float32)
    four_bit = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(four_bit) == 28
    assert not any(getattr(m, "support_avx512bf16_for_cpu", False) for m in four_bit)
    assert all(m.weight.quant_type == "nf4" and m.weight.quant_state.nested for m in four_bit)
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model.eval()(tokens)
    inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model.train()(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "There is no model folder './nowhere'"),
        ("pockt", "There is no model folder 'pockt'. Did you mean 'pocket'?"),
        ("{folder}", "The folder '{folder}' has no config.json, so it holds no model"),
        ("no/body", "The model 'no/body' cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        load_backbone(name.format(folder=tmp_path))


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match=r"holds no model. It holds an adapter: that goes with `--adapter`"):
        load_backbone(str(tmp_path))


def test_a_wrong_precision_is_refused():
    with pytest.raises(
        ValueError, match="`load_in` is '4bits', but must be '4bit', '8bit' or 'none'. Did you mean '4bit'"
    ):
        load_backbone("pocket", "4bits")


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(POCKET_DIR / name, tmp_path)
    with pytest.raises(ValueError, match=r"The folder '.*' has no tokenizer .* say where they are with `--tokenizer`"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), "pocket").eos_token == "<eos>"
    alone = tmp_path / "alone"  # as training leaves it beside an adapter
    load_tokenizer("pocket").save_pretrained(alone)
    assert load_tokenizer(str(tmp_path), str(alone)).eos_token == "<eos>"


# ----- Whole runs -----


WITHOUT_ROUTER = {"moram", "mos", "mosa", "smoe-dropout", "task-moe", "thor"}  # or with one that is not trained


@pytest.mark.filterwarnings("ignore:The gate was trained on samples of some domains")  # three steps, 28 domains
@pytest.mark.parametrize("name", [name for name in methods() if from_catalogue(name).task_type != "SEQ_CLS"])
def test_every_method_trains_and_comes_back_the_same(name, rows, tmp_path):
    out = tmp_path / "out"
    printed = trained("--adapter", name, "--dataset", rows, "--max_steps", "3", "--output_dir", str(out))
    kind = from_catalogue(name).peft_type.value
    for text in (
        "versions",
        "pocket, 4 bits",
        f"{name}: {kind}",
        "in routers",
        "_proj x4",
        "loss on",
        "completion",
    ):
        assert text in printed
    assert "rev:abc>cba<eos>" in printed
    static = kind == "SHARD_POOL" or name == "thor"
    assert f"moe-peft inspect {out}" + ("" if static else f" --data {rows}") in printed
    merge = f"moe-peft merge {out} --calibration {rows} --output {out / 'merged'}"
    export = f"moe-peft export {out} --to moe --output {out / 'exported'}"
    exact = f"moe-peft merge {out} --output {out / 'merged'}"
    if kind != "BOTTLENECK_MOE":  # which nothing plain can be fitted to
        assert (exact + "\n" if static else export if kind == "FFN_MOE" else merge) in printed
    log = json.loads((out / "training_log.json").read_text())
    assert (log["parameters"]["router"] > 0) == (name not in WITHOUT_ROUTER)
    assert log["settings"]["adapter"] == name
    assert log["base_sha256"] == base_sha256(POCKET_DIR)
    assert load_settings((out / "recipe.yaml").read_text(), "recipe.yaml")["dataset"] == rows
    assert "import moe_peft" in (out / "README.md").read_text()
    assert not (out / saving.UNFINISHED).exists()

    saved = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values() if tensor.is_floating_point())
    assert any(tensor.any() for key, tensor in saved.items() if "lora_B" in key)
    model = PeftModel.from_pretrained(load_backbone("pocket", device="cpu", dtype=torch.float32), out)
    again = tmp_path / "again"
    saving.save_adapter(model, again)
    for key, tensor in load_file(again / "adapter_model.safetensors").items():
        assert torch.equal(tensor, saved[key]), key


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(rows, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    common = ["--dataset", rows, "--eval_split", "0.25", "--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "6",
              "--save_steps", "3", "--set", "num_experts=4", "lora_dropout=0.1"]  # fmt: skip
    trained(*common, "--output_dir", str(whole))
    shutil.copytree(whole / "checkpoint-3", stopped / "checkpoint-3")
    shutil.copytree(whole / "checkpoint-6", stopped / "checkpoint-6")
    (stopped / "checkpoint-6" / "trainer_state.json").write_text('{"log_hist')  # killed while it saved
    trained(*common, "--output_dir", str(stopped), "--resume_from_checkpoint")
    for key in ("loss", "eval_loss", "router/max_load"):
        assert losses(stopped, key) == pytest.approx(losses(whole, key), rel=1e-5), key
    assert len(losses(whole)) == 6
    assert len(losses(whole, "eval_loss")) == 3
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, stopped))
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "message"), [("true", "has no whole checkpoint"), ("x/checkpoint-1", "holds no whole")]
)
def test_there_has_to_be_something_to_resume(tmp_path, wanted, message):
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is '{wanted}', .*{message}"):
        checkpoint_to_resume(wanted, tmp_path)
    assert checkpoint_to_resume(None, tmp_path) is checkpoint_to_resume("false", tmp_path) is None


def test_experts_start_from_the_loras_that_are_named(rows, tmp_path):
    """At a rate of nothing the command and the script both save what the LoRAs compute."""
    from banks import linears, write_lora

    layers = linears(load_backbone("pocket", "none"), "q_proj")
    loras = [str(write_lora(tmp_path / f"lora{i}", layers, r=4, seed=i)) for i in range(2)]
    arguments = [*SHORT, "--dataset", rows, "--max_steps", "1", "--learning_rate", "1e-30", "--load_in", "none",
                 "--adapter", "rocket", "--set", "num_experts=2", "target_modules=[q_proj]", "--experts_from", *loras]  # fmt: skip
    assert f"The experts start from {', '.join(loras)}." in trained(
        *arguments, "--output_dir", str(tmp_path / "command")
    )
    runpy.run_path(str(ROOT / "train_scripts" / "sft.py"))["main"](
        [*arguments, "--output_dir", str(tmp_path / "script")]
    )
    for kind in ("command", "script"):
        saved = load_file(tmp_path / kind / "adapter_model.safetensors")
        A, B = (next(t for k, t in saved.items() if f in k) for f in ("lora_A", "lora_B"))
        for expert, lora in enumerate(loras):
            given = load_file(Path(lora) / "adapter_model.safetensors")
            a, b = (next(t for k, t in given.items() if f in k) for f in ("lora_A", "lora_B"))
            torch.testing.assert_close(B[expert].T @ A[expert], 2 * b @ a, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="2 LoRAs for 3 experts"):
        trained(*arguments, "--set", "num_experts=3", "--output_dir", str(tmp_path / "three"))


def test_a_trained_adapter_is_not_written_over(rows, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"of an hour ago")
    arguments = ["--dataset", rows, "--max_steps", "1", "--output_dir", str(tmp_path), "--set", "num_experts=2"]
    with pytest.raises(
        ValueError, match="`output_dir` is .*, but must be a folder without a trained adapter. Name another"
    ):
        trained(*arguments)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"of an hour ago"


def test_packing_and_evaluation_go_together(rows, tmp_path):
    arguments = [
        "--dataset",
        rows,
        "--eval_dataset",
        rows,
        "--packing",
        "--max_steps",
        "2",
        "--output_dir",
        str(tmp_path),
    ]
    printed = trained(*arguments, "--set", "num_experts=2", "--load_in", "none")
    assert "pocket, float32" in printed
    assert len(losses(tmp_path, "eval_loss")) == 1  # an evaluation at the end of each epoch, as there are data for it


def test_conversations_are_trained_on_the_assistants_turns(tmp_path):
    turns = [[{"role": "user", "content": f"rev:{w}>"}, {"role": "assistant", "content": w[::-1]}] for w in WORDS]
    path = write(tmp_path / "talk.jsonl", [{"messages": messages, "source": "x"} for messages in turns])
    arguments = [
        *SHORT,
        "--dataset",
        path,
        "--max_steps",
        "1",
        "--output_dir",
        str(tmp_path),
        "--set",
        "num_experts=2",
    ]
    out = io.StringIO()
    trainer = run(parse(arguments), Console(file=out, width=200))
    assert trainer.args.assistant_only_loss
    assert "the assistant's turns" in out.getvalue()
    assert "not used: source" in out.getvalue()
    row = trainer.train_dataset[0]
    assert trainer.processing_class.decode([i for i in row["labels"] if i != -100]) == "cba<eos>"
    shown = example(row, trainer.processing_class)
    assert shown.plain == "rev:abc>cba<eos>"
    assert [(span.start, span.end, span.style) for span in shown.spans] == [(0, 8, "dim")]


def test_rows_that_do_not_fit_are_counted_and_none_at_all_is_an_error(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": "a" * n, "completion": "bcdef"} for n in (4, 6, 40)])
    arguments = ["--dataset", path, "--max_steps", "1", "--set", "num_experts=2"]
    printed = trained(*arguments, "--max_length", "10", "--output_dir", str(tmp_path / "ten"))
    assert "1 of 3 rows are left out: their prompts alone fill `max_length` = 10." in printed
    assert "2 rows are cut at `max_length` = 10 tokens." in printed
    with pytest.raises(ValueError, match=r"None of the 3 rows is left: .* `max_length` = 3. Raise `--max_length`"):
        trained(*arguments, "--max_length", "3", "--output_dir", str(tmp_path / "three"))


def test_an_adapter_that_fits_no_layer_is_refused(rows, tmp_path):
    with pytest.raises(
        ValueError, match=r"`target_modules` = \['q_prj'\] matches no layer .* Did you mean 'q_proj'\?"
    ):
        trained("--dataset", rows, "--output_dir", str(tmp_path), "--set", "target_modules=[q_prj]")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--adapter", "loramoe", "--packing"],
            "`packing` is True, but `balance` = 'localized' and `expert_groups` need one sample per row",
        ),
        (
            ["--adapter", "dmoerm"],
            "`task_type of dmoerm` is 'SEQ_CLS', but must be 'CAUSAL_LM' for supervised fine-tuning. A reward model trains",
        ),
        (["--eval_split", "1.5"], "`--eval_split` is 1.5, but a share to hold out must be above 0 and below 1"),
        (
            ["--eval_split", "0.1", "--eval_dataset", "x"],
            "`--eval_split` is 0.1, a share to hold out of `--dataset`, but",
        ),
    ],
)
def test_ways_of_reading_that_exclude_each_other_are_refused(rows, argv, message):
    settings = parse(["--dataset", rows, *argv])
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rows(settings, load_tokenizer("pocket"))


def test_the_script_is_the_same_run(rows, tmp_path, capsys):
    arguments = [*SHORT, "--dataset", rows, "--max_steps", "2", "--set", "num_experts=2"]
    trained(*arguments, "--output_dir", str(tmp_path / "command"))
    script = runpy.run_path(str(ROOT / "train_scripts" / "sft.py"))
    script["main"]([*arguments, "--output_dir", str(tmp_path / "script")])
    assert "24 rows of prompt and completion" in capsys.readouterr().out
    first, second = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("command", "script"))
    for key, tensor in first.items():
        assert torch.equal(second[key], tensor), key


# ----- Saving -----


class HalfWritten:
    """A model whose saving is interrupted after the first file."""

    def save_pretrained(self, folder):
        (Path(folder) / "adapter_model.safetensors").write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_adapter_that_was_there(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        saving.save_adapter(HalfWritten(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_text() == "whole"
    beside = saving.begin(tmp_path)  # the next save clears the rest away
    assert list(beside.iterdir()) == []
    (beside / "default").mkdir()
    (beside / "default" / "adapter_config.json").write_text("new")
    saving.put_in_place(beside, tmp_path)
    assert (tmp_path / "default" / "adapter_config.json").read_text() == "new"
    assert not beside.exists()
