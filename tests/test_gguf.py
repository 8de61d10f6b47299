"""Exports as GGUF: llama.cpp's own converter takes the folder, and llama.cpp answers as transformers does, or we say why not.

The slow tests need llama-cpp-python's source, which holds the converter, and its build. They take both from the package
index, which is some minutes of compiling. With `$MOE_PEFT_LLAMA_CPP` they use what lies in that folder, and build into it
what is missing, so that the next run finds it:

    MOE_PEFT_LLAMA_CPP=~/.cache/moe_peft_llama_cpp pytest -m slow tests/test_gguf.py

`python tests/test_gguf.py` prints the table of measured differences.
"""

import json
import os
import re
import string
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export_helpers import LLAMA3_ROPE, make_adapter, make_base
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from moe_peft.export import export_moe, plan_export
from moe_peft.export.gguf import ALIKE, llama_cpp_says


PACKAGE = "llama-cpp-python==0.3.36"  # its llama.cpp is what `moe_peft.export.gguf` tells of
VOCABULARY = 288
TOKENS = 24  # of each of the three texts
SPECIAL = ("<unk>", "<s>", "</s>")
GLM_SPECIAL = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")

CONVERT = """
import runpy, sys
from pathlib import Path
script, site, known = sys.argv[1:4]
sys.argv = [script, *sys.argv[4:]]
sys.path.insert(0, str(Path(script).parent))
sys.path.append(site)
if known == "False":
    # The converter knows the way a tokenizer splits words by a hash of what it makes of one text. A toy tokenizer has no such
    # hash. This names the split for it, and touches nothing of the weights and of the config.
    from conversion.base import TextModel
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(script, run_name="__main__")
"""
ANSWER = """
import json, sys
site, model, asked, out, exact = sys.argv[1:]
sys.path.append(site)
import numpy as np
from llama_cpp import Llama
F32 = 0  # ggml's number of that type; keys and values in 16 bits alone cost 1e-2
cache = {"type_k": F32, "type_v": F32} if exact == "True" else {}
llm = Llama(model_path=model, n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, **cache)
asked = json.loads(open(asked).read())
logits = []
for ids in asked["ids"]:
    llm.reset()
    llm.eval(ids)
    logits.append(llm.scores[: len(ids)].copy())
llm.reset()
greedy = [token for token, _ in zip(llm.generate(asked["ids"][0], temp=0.0, repeat_penalty=1.0), range(12))]
words = [llm.tokenize(text.encode(), add_bos=False) for text in asked["texts"]]
np.savez(out, logits=np.stack(logits), greedy=greedy)
open(out + ".json", "w").write(json.dumps(words))
"""
TEXTS = ["the cat sat", "a thing they saw\nand 3 more"]


class LlamaCpp(NamedTuple):
    """Attributes:
    convert: llama.cpp's `convert_hf_to_gguf.py`.
    site: the folder that `llama_cpp` is imported from.
    """

    convert: Path
    site: Path


def build(place: Path) -> LlamaCpp:
    """What is in the folder, and what is missing from the package index.

    Raises:
        RuntimeError: with the last lines of pip's output, where it cannot be had.
    """
    place = place.expanduser()
    place.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if not list(place.rglob("convert_hf_to_gguf.py")):
        source = place / "source"
        # Not all from source: what builds the package would be built itself.
        _run([*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", source, PACKAGE])
        for archive in source.glob("*.tar.gz"):
            with tarfile.open(archive) as file:
                file.extractall(source, filter="data")
    convert = next(place.rglob("convert_hf_to_gguf.py"))
    if not list(place.rglob("llama_cpp/lib/*llama.*")):
        _run([*pip, "install", "--no-deps", "--target", place / "site", PACKAGE, "diskcache"])
    site = next(place.rglob("llama_cpp/lib/*llama.*")).parents[2]
    if not (site / "sentencepiece").is_dir():
        _run([*pip, "install", "--no-deps", "--target", site, "sentencepiece"])
    return LlamaCpp(convert, site)


def _run(command, limit: int = 1500) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).strip().splitlines()[-8:]))


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory) -> LlamaCpp:
    place = os.environ.get("MOE_PEFT_LLAMA_CPP") or tmp_path_factory.mktemp("llama_cpp")
    try:
        return build(Path(place))
    except (RuntimeError, StopIteration, OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{PACKAGE} cannot be had from the package index, or does not build: {error}")


def llama_tokenizer(folder: Path) -> None:
    """As Llama 2 has it: BPE with a token for every byte, spaces as "▁". The converter takes it as it is."""
    symbols = ["▁", *string.ascii_lowercase, "th", "▁a"]
    vocabulary = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *symbols]
    assert len(vocabulary) == VOCABULARY
    model = models.BPE(
        {token: i for i, token in enumerate(vocabulary)},
        [("t", "h"), ("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _save(tokenizer, folder)


def byte_tokenizer(folder: Path) -> None:
    """As Qwen2 has it: BPE on bytes. GLM's special tokens are in it as well, which the converter of that model asks for."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *symbols, "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(GLM_SPECIAL))
    _save(tokenizer, folder)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def piece_tokenizer(folder: Path, site: Path) -> None:
    """A sentencepiece file, which the converter of ERNIE asks for, beside the tokenizer of Llama."""
    llama_tokenizer(folder)
    script = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "from sentencepiece import SentencePieceTrainer as T\n"
        "T.train(sentence_iterator=iter(['the cat sat on the mat', 'a thing they saw']), model_prefix=sys.argv[2],\n"
        f"vocab_size={VOCABULARY}, byte_fallback=True, hard_vocab_limit=False, minloglevel=2)"
    )
    _run([sys.executable, "-c", script, site, folder / "tokenizer"])


class Answers(NamedTuple):
    """What both gave for the same tokens.

    Attributes:
        error: largest difference of the logits over the largest logit.
        agree: share of positions with the same likeliest token.
        greedy: whether 12 tokens generated behind the first text are the same.
        words: whether both cut `TEXTS` into the same tokens.
    """

    error: float
    agree: float
    greedy: bool
    words: bool


class NoGguf(Exception):
    """The converter, or llama.cpp, does not take the export; with the end of what it said."""


TOKENIZERS = {"mixtral": llama_tokenizer, "granitemoe": byte_tokenizer, "ernie4_5_moe": piece_tokenizer}


class Case(NamedTuple):
    """A random dense model with a random adapter, and what becomes of their export.

    Attributes:
        family: of `test_export_helpers.FAMILIES`.
        target: what "auto" chooses, or "!" and what is asked for.
        outcome: "alike", "wrong" (it loads and answers otherwise) or "refused" (by the converter or by llama.cpp).
        said: a part of what the plan says of it.
        experts: one number, or one per layer.
        model, config: of the dense model and of the adapter.
    """

    family: str
    target: str
    outcome: str = "alike"
    said: str = ALIKE
    experts: int | list[int] = 4
    model: dict[str, Any] = {}
    config: dict[str, Any] = {}

    def __str__(self) -> str:
        more = " ".join(f"{k}={v['rope_type'] if k == 'rope_parameters' else v}" for k, v in self.model.items())
        routing = self.config.get("routing", "softmax_top_k")
        return f"{self.family} {more} -> {self.target.strip('!')}, {self.experts} experts, {routing}".replace(
            "  ", " "
        )

    def inputs(self, folder: Path) -> tuple[str, str]:
        """The dense model and the adapter."""
        base = make_base(folder / "base", self.family, vocab_size=VOCABULARY, **self.model)
        return str(base), str(make_adapter(folder / "adapter", base, self.experts, **self.config))

    def asked(self) -> str:
        return self.target[1:] if self.target.startswith("!") else "auto"

    def export(self, folder: Path) -> Path:
        """In fp32."""
        plan = export_moe(*self.inputs(folder), folder / "out", target=self.asked(), verify=False)
        assert plan.target == self.target.strip("!")
        return folder / "out"


TOP_1, SIGMOID = {"routing": "top_1"}, {"routing": "sigmoid_top_k"}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {**LINEAR, "rope_type": "dynamic"}
CASES = [
    Case("llama", "mixtral"),
    Case("llama tied, head_dim", "mixtral"),
    Case("phi3 full", "mixtral"),
    Case("mistral", "mixtral", model={"rope_parameters": YARN}),
    Case("mistral", "mixtral", model={"rope_parameters": LINEAR}),
    Case("mistral", "mixtral", "alike", "on texts longer than", model={"rope_parameters": DYNAMIC}),  # on short ones
    Case("mistral window", "mixtral", model={"sliding_window": 200}),
    Case(
        "mistral window",
        "mixtral",
        "wrong",
        "no sliding window for this model and would be wrong on texts of more than 8",
    ),
    Case("qwen3", "qwen3_moe"),
    Case("qwen3", "qwen3_moe", model={"tie_word_embeddings": True}),
    Case("qwen3", "qwen3_moe", config={"routing": "top_1_hard"}),
    Case("qwen3", "qwen3_moe", "wrong", "always renormalises .*'softmax_top_k' or 'top_1_hard'", config=TOP_1),
    Case("qwen3", "qwen3_moe", "refused", "with experts in every layer only", experts=[4, 0, 4, 4]),
    Case("qwen3", "qwen3_moe", "refused", "without attention biases", model={"attention_bias": True}),
    Case("qwen2", "qwen2_moe", config=TOP_1),
    Case("qwen2", "qwen2_moe", config={"routing": "softmax"}),
    Case("qwen2", "qwen2_moe", "wrong", "ignores `norm_topk_prob` .* train with routing='top_1' or 'softmax'"),
    Case("mistral", "!qwen2_moe", "wrong", "ignores `norm_topk_prob` .* target='mixtral'"),
    Case("qwen2", "qwen2_moe", "refused", "with experts in every layer only", [4, 0, 4, 4], config=TOP_1),
    Case("qwen2", "qwen2_moe", "refused", "as `lm_head`", model={"tie_word_embeddings": True}, config=TOP_1),
    Case("qwen2 window", "qwen2_moe", "wrong", "would be wrong on texts of more than 8 tokens", config=TOP_1),
    Case("seed_oss", "qwen2_moe", config=TOP_1),
    Case("seed_oss", "qwen2_moe", "refused", "takes `head_dim`", model={"head_dim": 24}, config=TOP_1),
    Case("mistral", "qwen2_moe", config=TOP_1),
    Case("llama", "qwen2_moe", "wrong", "drops the scaling of positions .'llama3'", config=TOP_1),
    Case("granite", "granitemoe"),
    Case("llama attention_bias", "granitemoe"),
    Case("granite", "granitemoe", "refused", "takes `head_dim`", model={"head_dim": 24}),
    Case(
        "granite", "granitemoe", "refused", "fails on the scaling of positions", model={"rope_parameters": LLAMA3_ROPE}
    ),
    Case("ernie4_5", "ernie4_5_moe", said="sentencepiece file"),
    Case("mistral", "ernie4_5_moe", said="sentencepiece file", experts=[2, 3, 4, 6]),
    Case("mistral", "!ernie4_5_moe", said="sentencepiece file", experts=[0, 4, 4, 4]),
    Case("mistral", "!ernie4_5_moe", "refused", "dense layers of this model at the start only", [0, 4, 4, 0]),
    Case("llama", "ernie4_5_moe", "wrong", "drops the scaling of positions .'llama3'", [2, 3, 4, 6]),
    Case("qwen2", "glm4_moe", said="GLM's special tokens", config=SIGMOID),
    Case("qwen3", "glm4_moe", said="GLM's special tokens", config=SIGMOID),
    Case("mistral", "glm4_moe", "alike", "GLM's special tokens", [0, 0, 4, 3], {"tie_word_embeddings": True}, SIGMOID),
    Case("llama", "glm4_moe", "wrong", "drops the scaling of positions .'llama3'", [2, 3, 4, 6], config=SIGMOID),
    Case("qwen3_5", "qwen3_5_moe_text", said=r"with `--no-mtp`", model={"head_dim": 64}),
    Case("cohere2", "cohere2_moe", experts=[0, 4, 4, 4]),
    Case("cohere2", "cohere2_moe", "refused", "dense layers of this model at the start only", [4, 0, 4, 4]),
    Case("olmo2", "flex_olmo", "refused", "llama.cpp does not know this model"),
    Case("hunyuan", "hunyuan_v1_moe", "refused", "fails on the config"),
]
MAIN = [CASES[0], CASES[7]]  # the two that most people will have
slow = pytest.mark.slow
waits = pytest.mark.timeout(2400)  # the first of them compiles llama.cpp


def to_gguf(built: LlamaCpp, export: Path) -> Path:
    """Give the export a toy tokenizer and convert it with llama.cpp's script."""
    target = json.loads((export / "config.json").read_text())["model_type"]
    write = TOKENIZERS.get(target, byte_tokenizer)
    write(export, built.site) if write is piece_tokenizer else write(export)
    out = export.parent / "model.gguf"
    known = write is not byte_tokenizer
    # Qwen3.5's converter looks for a layer that predicts further tokens unless it is told that there is none.
    more = ["--no-mtp"] if target == "qwen3_5_moe_text" else []
    arguments = [built.convert, built.site, known, export, "--outfile", out, "--outtype", "f32", *more]
    _work(CONVERT, arguments, "the converter")
    return out


def _work(script: str, arguments, who: str) -> None:
    """In a process of its own, as llama.cpp ends the process where something is amiss."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-6:])
        raise NoGguf(f"{who} does not take it ({done.returncode}): {said}")


@torch.no_grad()
def compare(built: LlamaCpp, export: Path, exact: bool = True) -> Answers:
    """The folder in transformers and its GGUF in llama.cpp, both in fp32.

    Args:
        exact: keep keys and values in fp32 as well, which is not llama.cpp's default.
    """
    gguf = to_gguf(built, export)
    torch.manual_seed(5)
    ids = torch.randint(len(SPECIAL), VOCABULARY - len(GLM_SPECIAL), (3, TOKENS))
    asked, out = export.parent / "asked.json", export.parent / "answers.npz"
    asked.write_text(json.dumps({"ids": ids.tolist(), "texts": TEXTS}))
    _work(ANSWER, [built.site, gguf, asked, out, exact], "llama.cpp")
    answers = np.load(out)
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    expected, got = model(ids).logits, torch.from_numpy(answers["logits"])[..., :VOCABULARY]
    text = ids[:1]
    for _ in range(12):  # by hand, as `generate` stops at tokens that llama.cpp's does not
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(export)
    words = [tokenizer.encode(each, add_special_tokens=False) for each in TEXTS]
    return Answers(
        float((got - expected).abs().max() / expected.abs().max()),
        float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        text[0, TOKENS:].tolist() == answers["greedy"].tolist(),
        # ERNIE's converter reads a sentencepiece file, which here is another toy than transformers' tokenizer.
        (export / "tokenizer.model").exists() or words == json.loads(Path(f"{out}.json").read_text()),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_tells_what_llama_cpp_makes_of_it(case, tmp_path):
    plan = plan_export(*case.inputs(tmp_path), target=case.asked())
    assert plan.target == case.target.strip("!")
    said = llama_cpp_says(plan.choice.target, plan.choice.renormalised, plan.config, plan.choice)
    assert re.search(case.said, " ".join(said))
    assert (said == [ALIKE]) == (case.said == ALIKE)
    assert not any(sentence.endswith(".") for sentence in said)


@pytest.mark.parametrize("case", [case for case in CASES if "`norm_topk_prob`" in case.said], ids=str)
def test_what_would_be_silently_wrong_is_among_the_rows_of_a_plan(case, tmp_path):
    plan = plan_export(*case.inputs(tmp_path), target=case.asked())
    assert re.search(case.said, " ".join(value for name, value in plan.rows() if name == "note"))


@slow
@waits
@pytest.mark.parametrize("case", CASES, ids=str)
def test_llama_cpp_does_what_the_plan_tells(case, llama_cpp, tmp_path):
    if case.outcome == "refused":
        with pytest.raises(NoGguf):
            compare(llama_cpp, case.export(tmp_path))
        return
    answers = compare(llama_cpp, case.export(tmp_path))
    if case.outcome == "wrong":
        assert answers.error > 0.05
        assert answers.agree < 0.95
    else:
        assert answers.error < 2e-5
        assert answers.agree == 1.0
        assert answers.greedy
        assert answers.words


@slow
@waits
def test_a_shared_gate_of_zero_is_no_number_in_llama_cpp(llama_cpp, tmp_path):
    """Why the gate of the empty shared expert is written as 1e-6 (`moe_peft.export.weights`)."""
    out = Case("qwen2", "qwen2_moe", config=TOP_1).export(tmp_path)
    weights = load_file(out / "model.safetensors")
    zero = {name: torch.zeros_like(w) for name, w in weights.items() if name.endswith("shared_expert_gate.weight")}
    assert zero
    save_file({**weights, **zero}, out / "model.safetensors", metadata={"format": "pt"})
    assert np.isnan(compare(llama_cpp, out).error)


@slow
@waits
def test_keys_and_values_in_16_bits_alone_hide_the_likeness(llama_cpp, tmp_path):
    """Why everything here compares with `type_k` and `type_v` in fp32; llama.cpp's default is fp16."""
    assert 5e-5 < compare(llama_cpp, MAIN[0].export(tmp_path), exact=False).error < 0.1


if __name__ == "__main__":  # python tests/test_gguf.py: the table of measured differences, in markdown
    built = build(Path(os.environ.get("MOE_PEFT_LLAMA_CPP", "llama_cpp_build")))
    print("| export | outcome | largest difference / largest logit | same likeliest token | same 12 tokens |")
    print("|---|---|---|---|---|")
    for each in CASES:
        with tempfile.TemporaryDirectory() as place:
            try:
                got = compare(built, each.export(Path(place)))
                figures = f"{got.error:.1e} | {got.agree:.0%} | {'yes' if got.greedy else 'no'}"
            except NoGguf as error:
                figures = f"{str(error).split(' (')[0]} | |"
            print(f"| {each} | {each.outcome} | {figures} |", flush=True)
