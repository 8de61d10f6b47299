"""Upstream test class -> the same class over our adapter types, or a line in `EXCLUDED` that says why not.

No upstream file is edited. A test is taken over when its `parametrize` marks name a config, a config class or a model
that we can replace by ours; marks that name neither (a dtype, a flag) are kept. Whatever is neither taken over nor
excluded is printed at the end of the run, so a new version of PEFT cannot drop or add a test unseen.
"""

import contextlib
import copy
import fnmatch
import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from moe_peft import (
    BottleneckMoeConfig,
    DomainMoeConfig,
    FfnMoeConfig,
    LinearMoeConfig,
    RankMoeConfig,
    ShardPoolConfig,
)


PEFT_VERSION = version("peft")
COMMAND = [sys.executable, *f"-m pip download --no-deps --no-binary :all: peft=={PEFT_VERSION}".split()]
UPSTREAM = Path(__file__).parent / "upstream" / f"peft-{PEFT_VERSION}"
PACKAGE = "peft_tests"  # upstream's tests import each other relatively, so they need a package name
SKIP = "MOE_PEFT_SKIP_CONFORMANCE"
UPSTREAM_MARKERS = ["single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"]


class Exclusion(NamedTuple):
    """Tests that are not run, and why.

    Attributes:
        tests: `module::Class::test`, shell wildcards allowed.
        reason: a sentence.
        routed_only: leave out only the cases whose adapter routes; the one-expert cases run.
    """

    tests: str
    reason: str
    routed_only: bool = False


_OTHER_METHOD = "It builds another method's config or layer and holds that method's behaviour."
_NO_BIAS = "It trains biases; our types have no field `bias`."
_HUB = "It reads a model from the Hub, and the run is offline."
_STRICT = "An unknown key of a config is an error here, where PEFT ignores it with a warning (tests/test_config.py)."
_ROUTED_MERGE = "It merges, and a routed adapter has no weight to merge; it refuses (tests/test_contract.py)."
_WEIGHTED = "It adds adapters up into a new one by `add_weighted_adapter`, which only LoRA and IA3 have."
_EMBEDDING = "It targets an embedding; ours are added to linear layers."
_PROMPT = "It is about prompt learning: virtual tokens, no layers."
_GPU = "It measures time, on an accelerator only."

_CUSTOM = "test_custom_models::TestPeftCustomModel::"
_REQUIRES_GRAD = "test_custom_models::TestRequiresGrad::"
_MIXED = "test_custom_models::TestMixedAdapterBatches::"
_DECODER = "test_decoder_models::TestDecoderModels::"
_CLASSIFIER = "test_seq_classifier::TestSequenceClassificationModels::"
_SEQ2SEQ = "test_encoder_decoder_models::TestEncoderDecoderModels::"
_CONFIG = "test_config::TestPeftConfig::"
_OTHER_METHODS = "adalora boft fourierft hra ia3 lntuning loha lokr miss oft pvera randlora vblora vera".split()

EXCLUDED: list[Exclusion] = [
    Exclusion(f"{_CUSTOM}test_adding_multiple_adapters_with_bias_raises", _NO_BIAS),
    Exclusion(f"{_CUSTOM}test_disable_adapter_with_bias_warns", _NO_BIAS),
    Exclusion(f"{_CUSTOM}test_merge_with_lora_bias_*", _NO_BIAS),
    Exclusion("test_custom_models::TestPeftFsdpStateDict::*_learnable_bias", _NO_BIAS),
    Exclusion(f"{_CUSTOM}test_add_weighted_adapter_*", _WEIGHTED),
    Exclusion(f"{_CUSTOM}test_multiple_adapters_*_merging_adapters*", _WEIGHTED),
    Exclusion(f"{_CUSTOM}test_*dora*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_glora_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_gralora_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_ia3_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_lora_safe_merge_*_bias", _NO_BIAS),
    Exclusion(f"{_CUSTOM}test_mha_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_monteclora_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_pvera_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_set_requires_grad_trainable_tokens", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_trainable_tokens_*", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_unload_adapter_multihead_attention", _OTHER_METHOD),
    Exclusion(f"{_CUSTOM}test_load_resized_embedding_*", _EMBEDDING),
    Exclusion(f"{_CUSTOM}test_save_pretrained_targeting_lora_to_embedding_layer*", _EMBEDDING),
    Exclusion(f"{_CUSTOM}test_delete_adapter_multiple_adapters_with_trainable_token_indices", _HUB),
    Exclusion(f"{_CUSTOM}test_multiple_adapters_automatic_modules_to_save", _HUB),
    Exclusion(f"{_CUSTOM}test_multiple_adapters_no_needless_copy_modules_to_save", _HUB),
    Exclusion("test_custom_models::TestMultipleActiveAdapters::test_*dora*", _OTHER_METHOD),
    *(Exclusion(f"{_REQUIRES_GRAD}test_requires_grad_{method}_*", _OTHER_METHOD) for method in _OTHER_METHODS),
    Exclusion(f"{_REQUIRES_GRAD}test_loading_adapter_preserves_custom_requires_grad", _OTHER_METHOD),
    Exclusion(f"{_REQUIRES_GRAD}test_requires_grad_lora_conv2d", _OTHER_METHOD),
    Exclusion(f"{_REQUIRES_GRAD}test_requires_grad_lora_emb_conv1d", _EMBEDDING),
    Exclusion(f"{_MIXED}test_*dora*", _OTHER_METHOD),
    Exclusion(f"{_MIXED}test_*_mha_raises", _OTHER_METHOD),
    Exclusion(f"{_MIXED}test_*_conv2d", _OTHER_METHOD),
    Exclusion(f"{_MIXED}test_*_timing", _GPU),
    Exclusion(f"{_MIXED}test_mixed_adapter_batches_merged_raises", _ROUTED_MERGE, routed_only=True),
    Exclusion("test_custom_models::TestDefaultTargetModules::test_*_osf", _OTHER_METHOD),
    Exclusion(f"{_DECODER}test_adding_multiple_adapters_with_bias_raises", _NO_BIAS),
    Exclusion(f"{_DECODER}test_prompt_*", _PROMPT),
    Exclusion(f"{_DECODER}test_prefix_*", _PROMPT),
    Exclusion(f"{_DECODER}test_training_prompt_learning_tasks", _PROMPT),
    Exclusion(f"{_DECODER}test_set_requires_grad_prompt_learning_raises", _PROMPT),
    Exclusion(f"{_DECODER}test_weighted_combination_of_adapters", _WEIGHTED),
    Exclusion(f"{_DECODER}test_generate_adalora_*", _OTHER_METHOD),
    Exclusion(f"{_DECODER}test_lora_layer_replication", "It repeats layers by LoRA's `layer_replication`."),
    Exclusion(f"{_DECODER}test_lora_embed_scale_*", _EMBEDDING),
    Exclusion(f"{_DECODER}test_save_pretrained_targeting_lora_to_embedding_layer", _EMBEDDING),
    Exclusion(f"{_DECODER}test_merge_and_unload_fixes_tie_word_embeddings_config", _EMBEDDING),
    Exclusion(f"{_SEQ2SEQ}test_adding_multiple_adapters_with_bias_raises", _NO_BIAS),
    Exclusion(f"{_SEQ2SEQ}test_active_adapters_prompt_learning", _PROMPT),
    Exclusion(f"{_SEQ2SEQ}test_prompt_*", _PROMPT),
    Exclusion(f"{_SEQ2SEQ}test_training_prompt_learning_tasks", _PROMPT),
    Exclusion(f"{_SEQ2SEQ}test_weighted_combination_of_adapters", _WEIGHTED),
    Exclusion(f"{_SEQ2SEQ}test_load_model_low_cpu_mem_usage", _HUB),
    Exclusion(f"{_SEQ2SEQ}test_save_shared_tensors", _NO_BIAS),
    Exclusion("test_tuners_utils::*::test_realistic_example", _HUB),
    Exclusion("test_tuners_utils::*::test_ia3_*", _OTHER_METHOD),
    Exclusion(f"{_CLASSIFIER}test_prompt_*", _PROMPT),
    Exclusion(f"{_CONFIG}test_from_pretrained_forward_compatible*", _STRICT),
    Exclusion(f"{_CONFIG}test_from_pretrained_sanity_check", _STRICT),
    Exclusion(f"{_CONFIG}test_from_pretrained_cache_dir_remote", _HUB),
    Exclusion(f"{_CONFIG}test_from_peft_type", "It makes a config of every method, and AdaMSS's needs scikit-learn."),
    Exclusion(f"{_CONFIG}test_ia3_*", _OTHER_METHOD),
    Exclusion(f"{_CONFIG}test_adalora_*", _OTHER_METHOD),
    Exclusion(f"{_CONFIG}test_prompt_encoder_*", _PROMPT),
    Exclusion("test_quantization::TestQuantization::test_merge_unmerge_unload", _ROUTED_MERGE, routed_only=True),
]


def upstream_is_here() -> bool:
    return (UPSTREAM / "testing_common.py").is_file()


def fetch() -> str | None:
    """Put the tests of the installed PEFT under `upstream/`, whole or not at all; returns why that failed, or None."""
    UPSTREAM.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UPSTREAM.parent) as beside:
        try:
            subprocess.run([*COMMAND, "--dest", beside], check=True, capture_output=True, text=True, timeout=280)
        except (subprocess.SubprocessError, OSError) as error:
            output = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return output[-1] if output else repr(error)
        (archive,) = Path(beside).glob("peft-*.tar.gz")
        tests = Path(beside) / "tests"
        tests.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                parts = Path(member.name).parts
                if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                    (tests / parts[2]).write_bytes(tar.extractfile(member).read())
        with contextlib.suppress(FileExistsError):
            tests.rename(UPSTREAM)
    return None if upstream_is_here() else f"the archive {archive.name} holds no tests"


unwanted = os.environ.get(SKIP) == "1"
fetch_error = None if unwanted or upstream_is_here() else fetch()


# --- what ours are, and what upstream's rules about methods become -------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "one expert": {"num_experts": 1},
    "top-k": {"num_experts": 4, "top_k": 2},
    "dense": {"num_experts": 3, "routing": "softmax", "router_init_std": 0.0},
    "shared": {"num_experts": 2, "top_k": 2, "num_shared_experts": 1},
    "top-1": {"num_experts": 4, "routing": "top_1"},
}
FFN_RULES: dict[str, dict[str, Any]] = {
    "FFN one expert": {"num_experts": 1},
    "FFN top-k": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1},
    "FFN top-1": {"num_experts": 3, "routing": "top_1_straight_through"},
}
"""For models with FFN blocks."""
SHARD_RULES: dict[str, dict[str, Any]] = {
    "own": {},
    "pools": {"equivalent_rank": 1},
    "splits": {"num_splits": 2},
}
"""For `ShardPoolConfig`. None of them routes, so all of them are merged."""
JOINED = {"equivalent_rank": 2, "shards_per_vector": 2}
"""Pools for models of even widths."""
RANK_RULES: dict[str, dict[str, Any]] = {
    "one rank": {"r": 1},
    "ranks by a router": {"r": 8, "top_k": 4},
    "ranks by themselves": {"r": 8, "top_k": 4, "routing": "self_activated", "temperature": 0.3},
}
DOMAIN_RULES: dict[str, dict[str, Any]] = {
    "one domain": {"domains": ["law"], "num_experts": 1},
    "domains": {"domains": ["law", "code", "C#"], "num_experts": 3, "routing": "softmax", "router_init_std": 0.0},
    "domains of unequal ranks": {
        "domains": ["law", "code"],
        "num_experts": 2,
        "domain_ranks": [1, 3],
        "router_init_std": 0.0,
    },
}
BOTTLENECK_RULES: dict[str, dict[str, Any]] = {
    "bottleneck": {"domains": ["law"], "gate": "none", "bottleneck_size": 4},
    "bottlenecks by a gate": {"domains": ["law", "code"], "gate": "sigmoid", "gate_size": 4, "bottleneck_size": 4},
}
"""Bottlenecks that a gate of tokens chooses, or nothing. Neither is linear, so that none is merged."""
SMALL = {"r": 4, "lora_alpha": 4}
"""For tests that take steps at learning rate 0.5 on inputs up to 90."""
LARGE = {"r": 4, "lora_alpha": 32}
"""For tests that ask for an effect on normalised states."""
PER_LAYER = {"num_experts": "2:4", "top_k": 2, "r": [2, 4], "lora_dropout": 0.05}
"""For models with numbered layers, of which there must be two."""


def is_routed(case: Any) -> bool:
    """Whether any config, or keyword arguments for one, among the values of a case asks for more than one expert."""
    values = getattr(case, "values", case)
    ranks = RankMoeConfig in [value for value in values if isinstance(value, type)]
    for value in values:
        if isinstance(value, ShardPoolConfig) or value is ShardPoolConfig:
            return False
        if isinstance(value, BottleneckMoeConfig) or value is BottleneckMoeConfig:
            return True
        if isinstance(value, RankMoeConfig):
            experts = value.r
        elif isinstance(value, (LinearMoeConfig, FfnMoeConfig, DomainMoeConfig)):
            experts = value.num_experts
        else:
            experts = _experts(value, ranks) if isinstance(value, dict) else None
        if experts not in (None, 1):
            return True
    return False


def _experts(config_kwargs: dict, ranks: bool) -> Any:
    return config_kwargs.get("r", 64) if ranks else config_kwargs.get("num_experts", 8)


def _skip_if_routed(model_id: str, config_cls: Any, config_kwargs: dict) -> None:
    if config_cls is BottleneckMoeConfig:
        pytest.skip("Bottlenecks have no weight to merge.")
    if config_cls is not ShardPoolConfig and _experts(config_kwargs, config_cls is RankMoeConfig) != 1:
        pytest.skip("A routed adapter has no weight to merge.")


def _skip_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def ours_for_lora(**kwargs: Any) -> LinearMoeConfig:
    """For tests that say `LoraConfig` but ask nothing of LoRA in particular."""
    if "init_lora_weights" in kwargs:
        kwargs["init_weights"] = kwargs.pop("init_lora_weights")
    return LinearMoeConfig(**{"lora_alpha": 64, **kwargs})


# --- loading -------------------------------------------------------------------------------------------------------


@functools.cache
def upstream(module: str) -> types.ModuleType:
    """The upstream test module, imported from where it was unpacked."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(UPSTREAM)]
        sys.modules[PACKAGE] = package
        pytest.register_assert_rewrite(*(f"{PACKAGE}.{path.stem}" for path in UPSTREAM.glob("*.py")))
        common, utils = upstream("testing_common"), upstream("testing_utils")
        common._skip_if_merging_not_supported = _skip_if_routed
        common._skip_if_conv1d_not_supported = _skip_nothing
        common.hub_online_once = utils.hub_online_once = contextlib.nullcontext  # it would undo HF_HUB_OFFLINE=1
    with _stub_diffusers():
        return importlib.import_module(f"{PACKAGE}.{module}")


@contextlib.contextmanager
def _stub_diffusers() -> Iterator[None]:
    """Some modules import one name from diffusers, for tests that we do not take over."""
    if "diffusers" in sys.modules or importlib.util.find_spec("diffusers"):
        yield
        return
    stub = types.ModuleType("diffusers")
    stub.StableDiffusionPipeline, stub.__version__ = type("StableDiffusionPipeline", (), {}), "0"
    sys.modules["diffusers"] = stub
    try:
        yield
    finally:
        del sys.modules["diffusers"]


# --- taking a class over -------------------------------------------------------------------------------------------

Cases = dict[str, list]
"""Argument names as in `parametrize`, without spaces -> our cases. `test:names` holds for that test only (wildcards
allowed) and goes first. Names without an entry keep upstream's values."""

_excluded: Counter = Counter()
_unclassified: list[str] = []
_used_rows: set[Exclusion] = set()
_seen_classes: set[str] = set()


def rebuild(
    module: str,
    class_name: str,
    cases: Cases,
    unchanged: tuple[str, ...] = (),
    say_lora: tuple[str, ...] = (),
    pretend_lora: tuple[str, ...] = (),
    **attributes: Any,
) -> type:
    """A subclass of an upstream test class that runs its tests over ours.

    Args:
        module, class_name: where upstream's class is.
        cases: see `Cases`.
        unchanged: tests (wildcards allowed) that cover ours as they stand.
        say_lora: tests that write `LoraConfig(...)` for any method; they get `ours_for_lora`.
        pretend_lora: tests and helpers that let only LoRA pass (`config_cls != LoraConfig`); there it is our class.
        attributes: set on the subclass.
    """
    parent = getattr(upstream(module), class_name)
    _seen_classes.add(f"{module}::{class_name}")
    namespace: dict[str, Any] = {"__doc__": f"Upstream's {module}.{class_name} over our adapter types.", **attributes}
    for name in dir(parent):
        function = getattr(parent, name)
        if not isinstance(function, types.FunctionType):
            continue
        replaced: dict[str, Any] = {}
        if _matches(name, say_lora):
            replaced["LoraConfig"] = ours_for_lora
        elif _matches(name, pretend_lora):
            replaced["LoraConfig"] = LinearMoeConfig
        if name.startswith("test_"):
            keep = _matches(name, unchanged) or _matches(name, say_lora)
            namespace[name] = _taken_over(module, class_name, function, cases, keep, replaced)
        elif replaced:
            namespace[name] = _with_globals(function, replaced)
    return type(class_name, (parent,), namespace)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _taken_over(
    module: str, class_name: str, function: Callable, cases: Cases, keep: bool, replaced: dict[str, Any]
) -> Callable | None:
    """The test over our cases, or None (which pytest does not collect) if it is excluded or cannot be taken over."""
    test = f"{module}::{class_name}::{function.__name__}"
    rows = [row for row in EXCLUDED if fnmatch.fnmatchcase(test, row.tests)]
    _used_rows.update(rows)
    marks, ours, items, dropped = [], keep, 1, 0
    for mark in getattr(function, "pytestmark", []):
        if mark.name != "parametrize":
            marks.append(mark)
            continue
        names, values = mark.args[:2]
        names = names if isinstance(names, str) else ",".join(names)
        names = names.replace(" ", "")
        replacing = _cases_for(function.__name__, names, cases)
        if replacing is not None:
            ours, values = True, replacing
            if any(row.routed_only for row in rows):
                dropped += sum(map(is_routed, values))
                values = [case for case in values if not is_routed(case)]
            mark = pytest.mark.parametrize(names, values).mark
        items *= len(values) or 1
        marks.append(mark)
    if any(not row.routed_only for row in rows):
        _excluded[f"{module}.py"] += items
        return None
    _excluded[f"{module}.py"] += dropped
    if not ours:
        _unclassified.append(test)
        return None
    clone = _with_globals(function, replaced)
    clone.pytestmark = marks
    return clone


def _cases_for(test: str, names: str, cases: Cases) -> list | None:
    for key, values in cases.items():
        pattern, _, key_names = key.rpartition(":")
        if key_names == names and pattern and fnmatch.fnmatchcase(test, pattern):
            return values
    return cases.get(names)


def _with_globals(function: Callable, replaced: dict[str, Any]) -> Callable:
    """A copy of the function that sees other objects under some global names."""
    scope = {**function.__globals__, **replaced} if replaced else function.__globals__
    clone = types.FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    clone.__kwdefaults__ = copy.copy(function.__kwdefaults__)
    clone.__dict__.update(function.__dict__)
    return clone


def excluded_counts() -> Counter:
    """Test module -> how many test cases the table keeps out of it."""
    return Counter(_excluded)


def loose_ends() -> list[str]:
    """Upstream tests that nobody decided on, and rows of the table that no longer match any test."""
    lines = [f"neither run nor excluded: {test}" for test in _unclassified]
    for row in EXCLUDED:
        if row not in _used_rows and fnmatch.filter(_seen_classes, row.tests.rsplit("::", 1)[0]):
            lines.append(f"excludes nothing: {row.tests}")
    return lines
