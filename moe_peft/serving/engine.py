"""One bundle in memory and its two ways to answer, both transformers': `generate` one request at a time, and batches.

Batches run on a second skeleton of modules over the same weights. It has its own attention implementation and its own
routing context, so that neither way sees the other's masks, caches or switches.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import (
    CBGenerateManager,
    GenerateManager,
    GenerationState,
    InferenceThread,
    Modality,
)

from moe_peft.backbone import load_backbone, load_tokenizer
from moe_peft.errors import refuse
from moe_peft.serving.bundle import Bundle
from moe_peft.serving.requests import Asked, Limits, RequestRefused
from moe_peft.serving.switches import check_control, expert_control
from moe_peft.tuners.layer import MoeTunerLayer


_NO_ADAPTER = {"subfolder": "none"}
_TOKEN_LOCAL = ("LINEAR_MOE", "FFN_MOE", "RANK_MOE", "SHARD_POOL", "DOMAIN_MOE", "LORA")
"""Types of adapters that route every token by itself, unless their config says otherwise."""

DEFAULT_NEW_TOKENS = 1024  # as `transformers serve`
_BATCH_TOKENS_ON_CPU = 512  # larger batches gain nothing there
_CACHE_TOKENS_ON_CPU = 64 * 256
_PAGE = 256


class Engine:
    """A loaded bundle.

    Attributes:
        name: of the model, for requests.
        model: the `PeftModel` that `generate` runs.
        processor: its tokenizer.
        limits: of requests.
        thread: on which `generate` runs, one request after the other.
        batches: transformers' manager of continuous batching, or None.
        unbatched: why there are no batches, or None.
        models: what transformers' handlers ask for models.
    """

    def __init__(self, bundle: Bundle, max_new_tokens: int, batched: bool | None) -> None:
        """Load the bundle.

        Args:
            bundle: as `open_bundle` gives it.
            max_new_tokens: the most that a request may ask for.
            batched: whether requests run in batches; None where the adapter allows it and there is an accelerator.

        Raises:
            ValueError: a bundle that cannot be loaded, or batches where the adapter would mix the requests of one.
        """
        folder = str(bundle.folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # The adapter comes from PEFT, as in `PeftModel.from_pretrained`, which leaves it in fp32 on a bf16 base;
        # transformers' own way would round it.
        backbone = load_backbone(folder, "none", device, dtype="auto", adapter_kwargs=_NO_ADAPTER)
        self.name = bundle.name
        self.model: Any = PeftModel.from_pretrained(backbone, folder).eval()
        self.processor: Any = load_tokenizer(folder)
        if not hasattr(self.processor, "_tokenizer"):
            raise refuse("tokenizer", type(self.processor).__name__, "a fast one", "Save it as a tokenizer.json.")
        self.limits = self._limits(max_new_tokens)
        self.thread = InferenceThread()
        self.models = OneModel(self.name)
        self.batches: Batched | None = None
        self.unbatched = why_not_batched(self.model)
        if batched and self.unbatched:
            remedy = "Leave it out, or pass --no-continuous-batching: requests then run one after the other."
            raise refuse("--continuous-batching", True, f"left out here, as {self.unbatched}", remedy)
        if batched is None and not self.unbatched and device == "cpu":
            self.unbatched = "there is no accelerator (--continuous-batching has them all the same)"
        if batched is False:
            self.unbatched = "you asked for none"
        if self.unbatched is None:
            self.batches = Batched(self)

    def _limits(self, max_new_tokens: int) -> Limits:
        config = self.model.config.get_text_config()
        template = self.processor.chat_template
        return Limits(
            model=self.name,
            max_new_tokens=max_new_tokens,
            context=getattr(config, "max_position_embeddings", None),
            vocabulary=config.vocab_size,
            tools="tools" in (template if isinstance(template, str) else ""),
        )

    def state(self, asked: Asked) -> "OneRequest":
        """How this request is answered.

        Raises:
            RequestRefused: if it switches experts that there are not.
        """
        check_control(self.model, asked.experts)
        batches = self.batches if self.batches and joins_batches(asked, self.model.generation_config) else None
        return OneRequest(self, asked, batches)

    def stop(self) -> None:
        """End the batches."""
        if self.batches is not None:
            self.batches.stop()


def why_not_batched(model: PeftModel) -> str | None:
    """Why requests of one batch would not get the answers that they get alone; None where they do.

    A batch is one row that holds tokens of all its requests, one behind the other.
    """
    config: Any = model.peft_config["default"]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _TOKEN_LOCAL:
        return f"adapters of type {kind} are not known to look at each token by itself"
    if any(layer.routes_sequences() for layer in model.modules() if isinstance(layer, MoeTunerLayer)):
        return "its routers look at whole sequences, and would mix the requests of a batch"
    if getattr(config, "expert_groups", None) or getattr(config, "gate", None) == "given":
        return "its experts follow the samples' task types, which the requests of a batch would share"
    base: Any = model.get_base_model()
    if not hasattr(base, "init_continuous_batching"):
        return f"{type(base).__name__} has no continuous batching in transformers"
    dropped = [p for p in base._get_logits_processor(base.generation_config) if not _in_batches(p)]
    if dropped:
        return f"its generation config asks for {type(dropped[0]).__name__}, which transformers leaves out of batches"
    return None


def _in_batches(processor: Any) -> bool:
    return bool(getattr(processor, "supports_continuous_batching", False))


def joins_batches(asked: Asked, default: GenerationConfig) -> bool:
    """Whether a request draws its tokens as the generation config says: batches have one way to draw for all in them."""
    body = asked.body
    if asked.experts.given or asked.seed is not None or "stop" in body or "logit_bias" in body:
        return False
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if not default.do_sample:
        return temperature == 0 or (temperature is None and top_p in (None, 1))
    return temperature in (None, default.temperature) and top_p in (None, default.top_p)


class OneModel:
    """What transformers' server asks of its `ModelManager`, for one model that stays where it is."""

    get_model_modality = staticmethod(ModelManager.get_model_modality)

    def __init__(self, name: str) -> None:
        self.force_model = name

    def get_gen_models(self) -> list[dict[str, Any]]:
        """The entries of `/v1/models`."""
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "moe_peft"}]

    def shutdown(self) -> None:
        """Nothing: the engine ends with its server."""


class OneRequest(GenerationState):
    """What transformers' handler asks for the way to answer, for one request."""

    def __init__(self, engine: Engine, asked: Asked, batches: "Batched | None") -> None:
        super().__init__()
        self.engine, self.asked, self.batches = engine, asked, batches

    def use_continuous_batching(self, model: Any, modality: Modality) -> bool:
        return self.batches is not None

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        fit = Fit(self.asked, self.engine.limits.context)
        return BatchedOne(self.batches, fit) if self.batches is not None else Alone(self.engine, self.asked, fit)


class Fit:
    """Sees to it that prompt and answer fit into the model's context together."""

    def __init__(self, asked: Asked, context: int | None) -> None:
        self.asked, self.context = asked, context

    def __call__(self, inputs: Any, config: GenerationConfig) -> None:
        """Lower `config.max_new_tokens` to what there is room for.

        Raises:
            RequestRefused: if there is none, or less than was asked for.
        """
        ids = inputs["input_ids"]
        length = len(ids) if isinstance(ids, list) else ids.shape[-1]
        if length == 0:
            raise RequestRefused("The prompt holds no token. Write something for the model to answer.", "messages")
        if self.context is None:
            return
        room = self.context - length
        if room < 1:
            raise RequestRefused(
                f"The prompt is {length} tokens long, and the model takes {self.context} with its answer. Shorten it.",
                "messages",
            )
        if self.asked.max_new_tokens is not None and self.asked.max_new_tokens > room:
            raise RequestRefused(
                f"The prompt is {length} tokens long and `max_tokens` is {self.asked.max_new_tokens}, together more than the "
                f"{self.context} that the model takes. Ask for at most {room}, or shorten the prompt.",
                "max_tokens",
            )
        config.max_new_tokens = min(config.max_new_tokens or room, room)


class Alone(GenerateManager):
    """`generate` for one request, under its own switches and seed. All requests share one thread, so none overlap."""

    def __init__(self, engine: Engine, asked: Asked, fit: Fit) -> None:
        self._thread = engine.thread
        self._engine, self._asked, self._fit = engine, asked, fit

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        self._fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        self._fit(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    def submit(self, fn: Callable, *args: Any, **kwargs: Any):
        return super().submit(self._inside, fn, *args, **kwargs)

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any):
        return super().async_submit(self._inside, fn, *args, **kwargs)

    def _inside(self, fn: Callable, *args: Any, **kwargs: Any) -> Any:
        with seeded(self._asked.seed), expert_control(self._engine.model, self._asked.experts):
            return fn(*args, **kwargs)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers from `seed`, and afterwards on as if nothing had been drawn; None draws on."""
    with ExitStack() as stack:
        if seed is not None:
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(seed)
        yield


class Batched(CBGenerateManager):
    """Continuous batching over one model, started with the generation config and not with the first request's."""

    def __init__(self, engine: Engine) -> None:
        base = engine.model.get_base_model()
        super().__init__(batching_config(base, engine.limits))
        config = copy.deepcopy(base.generation_config)
        config.max_new_tokens, config.use_cache = engine.limits.max_new_tokens, False
        super().init_cb(second_skeleton(base), config)

    def init_cb(self, model: Any, gen_config: GenerationConfig) -> None:
        """Nothing: it runs already."""


class BatchedOne:
    """One request's way into the batches."""

    def __init__(self, batches: Batched, fit: Fit) -> None:
        self._batches, self._fit = batches, fit
        self.init_cb = batches.init_cb

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any):
        self._fit(inputs, gen_config)
        return self._batches.generate_streaming(model, processor, inputs, gen_config, *args, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *args: Any, **kwargs: Any
    ):
        self._fit(inputs, gen_config)
        return await self._batches.generate_non_streaming(model, processor, inputs, gen_config, *args, **kwargs)


def batching_config(model: Any, limits: Limits) -> ContinuousBatchingConfig:
    """transformers' own choices on an accelerator. On a CPU they would take 60 % of the machine's memory."""
    if model.device.type != "cpu":
        return ContinuousBatchingConfig()
    longest = limits.context or _CACHE_TOKENS_ON_CPU
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=max(_CACHE_TOKENS_ON_CPU, longest) // _PAGE + 2,
        max_batch_tokens=_BATCH_TOKENS_ON_CPU,
    )


def second_skeleton(model: nn.Module) -> Any:
    """Another model of other modules over the same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        packed = getattr(module, "quant_state", None)  # bitsandbytes' tables beside a 4-bit weight
        if packed is not None:
            shared[id(packed)] = packed
    return copy.deepcopy(model, shared)
