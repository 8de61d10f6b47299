"""The settings of a training run, in one order: this machine < the method's recipe < `--config` < the command line.

Every name is a field of [`TrainArguments`] or of TRL's `SFTConfig`, wherever it is written. A name that is neither is an
error that says which one was meant.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from trl import SFTConfig, TrlParser  # pyright: ignore[reportPrivateImportUsage]

from moe_peft.catalogue import RECIPE_FILE, AdapterSource, adapter_config, methods
from moe_peft.errors import nearest
from moe_peft.plain_yaml import load_settings, pairs


PROGRAM = "moe-peft train"
LOAD_IN = ("4bit", "8bit", "none")


@dataclass
class TrainArguments:
    """What a run needs beside TRL's `SFTConfig`; the help texts below are the command's."""

    _argument_group_name = "what to train on what"

    adapter: str = field(
        default="molora",
        metadata={
            "help": "A name of the catalogue (`moe-peft methods`), a folder with an adapter_config.json, or an id."
        },
    )
    model: str = field(
        default="pocket",
        metadata={
            "help": "A folder or an id on the Hub; 'pocket' is the small backbone that comes with this package."
        },
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    dataset: str = field(
        default="",
        metadata={"help": "A json, jsonl, csv, parquet or txt file, a folder of them, or an id on the Hub."},
    )
    split: str = field(default="train", metadata={"help": "Which split to train on; a slice works: 'train[:300]'."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Data to evaluate on during training."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Its split; without --eval_dataset a split of --dataset, or the share of it to hold out (0.1)."
        },
    )
    experts_from: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders or ids of trained LoRAs that the experts start from, one for each expert."},
    )
    load_in: str = field(
        default="4bit",
        metadata={"help": "4bit (NF4 with double quantisation), 8bit or none.", "choices": LOAD_IN},
    )
    no_quantize: bool = field(default=False, metadata={"help": "The same as --load_in none."})
    set: list[str] = field(
        default_factory=list,
        metadata={"help": "Change a field of the adapter: --set num_experts=4 --set r=8.", "action": "extend"},
    )


class Settings(NamedTuple):
    """A run, ready to start.

    Attributes:
        arguments: what to train on what, with `load_in` decided.
        training: for TRL's trainer. Its `assistant_only_loss` is None where nobody said, and the data decide.
        output_dir: gets the adapter and the checkpoints.
        source: the adapter.
        given: every setting that somebody gave, so that a recipe of it repeats the run.
    """

    arguments: TrainArguments
    training: SFTConfig
    output_dir: Path
    source: AdapterSource
    given: dict[str, Any]


def parse(argv: Sequence[str], program: str = PROGRAM) -> Settings:
    """The settings that a command line asks for.

    Raises:
        ValueError: an unknown name, a value of the wrong kind, or settings that exclude each other.
        SystemExit: after `--help`.
    """
    parser = make_parser(program)
    set_defaults(parser, of_this_machine(), "this machine's settings")
    pristine = {action.dest: action.default for action in reversed(parser._actions)}  # of --x and --no_x, that of --x
    undecided = {"assistant_only_loss": None, "eval_strategy": None}
    set_defaults(parser, undecided, "the defaults")

    first = parsed(parser, argv)
    own: dict[str, Any] = {}
    if first.config is not None:
        own = from_file(first.config)
    own_overrides = pairs(own.pop("set", {}))
    spec = first.adapter if mentions(argv, "adapter") else own.get("adapter", first.adapter)
    overrides = {**own_overrides, **pairs(first.set)}
    source = adapter_config(spec, **overrides)
    set_defaults(parser, source.recipe, f"{RECIPE_FILE} of '{source.name}'")
    set_defaults(parser, own, str(first.config))

    values = vars(parsed(parser, argv))
    values.pop("config")
    values["set"] = [f"{key}={value}" for key, value in overrides.items()]
    values["output_dir"] = values["output_dir"] or f"output/{source.name.rsplit('/', 1)[-1]}"
    written = {"model", "dataset", "output_dir", *source.recipe, *own}
    given: dict[str, Any] = {"adapter": spec, **({"set": overrides} if overrides else {})}
    for key, value in values.items():
        changed = value != pristine[key] and not (key in undecided and value is None)
        if key not in ("adapter", "set", "resume_from_checkpoint") and (key in written or changed):
            given[key] = value
    _decide_evaluation(values)
    arguments = TrainArguments(**{f.name: values.pop(f.name) for f in fields(TrainArguments)})
    _decide_quantisation(arguments, mentions(argv, "load_in", "load-in") or "load_in" in own)
    if not arguments.dataset:
        raise ValueError(
            "`--dataset` is missing. Give a json, jsonl, csv, parquet or txt file, a folder of them, or an id on the Hub."
        )
    return Settings(arguments, make_sft_config(values), Path(values["output_dir"]).expanduser(), source, given)


def make_sft_config(values: dict[str, Any]) -> SFTConfig:
    """TRL's own config; it is silent about a deprecated field that TRL itself still sets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`gradient_checkpointing", category=FutureWarning)
        return SFTConfig(**values)


class _Parser(TrlParser):
    """TRL's parser, with errors as exceptions; names have to be written out. `ours` is the first of its dataclasses."""

    ours: type = TrainArguments

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}. See `{self.prog} --help`.")


def make_parser(
    program: str, ours: type = TrainArguments, usage: str = "--adapter NAME --dataset FILE", description: str = ""
) -> _Parser:
    """A parser of the fields of `ours` and of TRL's `SFTConfig`."""
    parser = _Parser(
        (ours, SFTConfig),  # pyright: ignore[reportArgumentType]  (its NewType stands for a dataclass)
        prog=program,
        usage=f"{program} {usage} [--model MODEL] [--config FILE.yaml] [--any_field_of_SFTConfig VALUE]",
        description=description
        or f"Train a mixture of LoRA experts on a frozen backbone. Methods: {', '.join(methods())}.",
        epilog="Every field of TRL's SFTConfig is an option here; --help_all shows them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.ours = ours
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings of your own, over those of the recipe.")
    parser.add_argument("-h", "--help", action=_Help, help="Show this and stop.")
    parser.add_argument("--help_all", "--help-all", action=_Help, help="Show the fields of SFTConfig as well.")
    for action in parser._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True  # `--bf16` alone is as good as `--bf16 true`
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", "true"
            action.help = "A checkpoint to go on from; alone, or 'true': the last whole one in --output_dir."
    return parser


class _Help(argparse.Action):
    """Prints the help; TRL's hundred options only when asked for all."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if "--help_all" not in self.option_strings:
            assert isinstance(parser, _Parser)
            ours = {f.name for f in fields(parser.ours)} | {"config", "output_dir", "resume_from_checkpoint"}
            for action in parser._actions:
                if action.dest not in ours and not isinstance(action, _Help):
                    action.help = argparse.SUPPRESS
        parser.print_help()
        parser.exit()


def parsed(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    namespace, rest = parser.parse_known_args(list(argv))
    _refuse_rest(parser, rest)
    return namespace


def parsed_by_trl(parser: Any, argv: Sequence[str]) -> tuple[Any, ...]:
    """The objects that a `TrlParser` makes of a command line, and of the file that `--config` names.

    Raises:
        ValueError: an option that there is not, with the nearest that there is.
    """
    *found, rest = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    _refuse_rest(parser, rest)
    return tuple(found)


def _refuse_rest(parser: Any, rest: Sequence[str]) -> None:
    if rest:
        option = next((word for word in rest if word.startswith("--")), None)
        if option is None:
            raise ValueError(f"'{rest[0]}' belongs to no option. Options start with --; see `{parser.prog} --help`.")
        name = option[2:].split("=")[0]
        raise ValueError(f"`--{name}` is not an option. {nearest(name.replace('-', '_'), _names(parser))}")


def _names(parser: Any) -> list[str]:
    return [action.dest for action in parser._actions if action.dest != argparse.SUPPRESS]


def mentions(argv: Sequence[str], *names: str) -> bool:
    return any(word.split("=")[0] == f"--{name}" for word in argv for name in names)


def set_defaults(parser: _Parser, settings: dict[str, Any], origin: str) -> None:
    """Make `settings` the defaults, checked and converted as if they had been typed."""
    for key, value in settings.items():
        actions = [action for action in parser._actions if action.dest == key]
        if not actions or key == "config":
            raise ValueError(f"`{key}` in {origin} is not a setting of training. {nearest(key, _names(parser))}")
        if isinstance(value, (bool, int, float, str)):
            try:
                value = parser._get_value(actions[0], str(value))
                parser._check_value(actions[0], value)
            except argparse.ArgumentError as error:
                raise ValueError(f"`{key}` in {origin}: {error.message}.") from error
        for action in actions:
            action.default = value


def from_file(path: str) -> dict[str, Any]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"`--config` is '{path}', but there is no such file. Give a YAML file with settings.")
    return load_settings(file.read_text(encoding="utf-8"), path)


def of_this_machine() -> dict[str, Any]:
    """Mixed precision where the device has it; TRL's own default asks for bf16 even on a CPU, and fails."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return {"bf16": bf16, "fp16": not bf16}
    return {"bf16": False, "use_cpu": not torch.backends.mps.is_available()}


def _decide_evaluation(values: dict[str, Any]) -> None:
    wanted, has_data = values["eval_strategy"], bool(values["eval_dataset"] or values["eval_split"])
    if wanted is None:
        values["eval_strategy"] = "epoch" if has_data else "no"
    elif wanted != "no" and not has_data:
        raise ValueError(
            f"`eval_strategy` is '{wanted}', but there are no data to evaluate on. Give `--eval_dataset`, or "
            "`--eval_split` (a split of --dataset, or the share to hold out, such as 0.1)."
        )


def _decide_quantisation(arguments: TrainArguments, chosen: bool) -> None:
    if arguments.no_quantize and chosen and arguments.load_in != "none":
        raise ValueError(f"`--no_quantize` and `--load_in {arguments.load_in}` exclude each other. Leave one out.")
    if arguments.no_quantize:
        arguments.load_in = "none"
