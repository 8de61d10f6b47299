"""The settings of `train_scripts/domains.py`: one folder of data for each domain, and who is to choose among the experts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from trl import SFTConfig

from moe_peft.arguments import LOAD_IN, from_file, make_parser, make_sft_config, of_this_machine, parsed, set_defaults
from moe_peft.domain_config import GATES, LEARNS_FROM, TRAINED_GATES, name_problems
from moe_peft.errors import refuse
from moe_peft.sources import FILE_KINDS


PROGRAM = "python train_scripts/domains.py"


@dataclass
class DomainArguments:
    """What a run over domains needs beside TRL's `SFTConfig`, whose fields hold for each domain's expert."""

    _argument_group_name = "domains, experts and their gate"

    domains: str = field(
        default="",
        metadata={"help": "A folder with a folder (or a json, jsonl, csv, parquet or txt file) for each domain."},
    )
    model: str = field(default="pocket", metadata={"help": "A folder or an id on the Hub; 'pocket' comes with us."})
    tokenizer: str | None = field(default=None, metadata={"help": "Where the tokenizer is, if not with the model."})
    r: int = field(default=8, metadata={"help": "Rank of each domain's expert."})
    lora_alpha: float = field(default=16, metadata={"help": "Its scale, over r."})
    target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "The linear layers to adapt, by name."}
    )
    gate: str = field(default="token", metadata={"help": "Who chooses the experts.", "choices": list(GATES)})
    gate_training: str = field(
        default="labels", metadata={"help": "What a trained gate learns from.", "choices": list(LEARNS_FROM)}
    )
    gate_steps: int = field(default=200, metadata={"help": "Optimizer steps of a trained gate, over all domains."})
    gate_learning_rate: float = field(default=5e-3, metadata={"help": "Its learning rate."})
    load_in: str = field(
        default="4bit", metadata={"help": "4bit (NF4 with double quantisation), 8bit or none.", "choices": LOAD_IN}
    )


class DomainSettings(NamedTuple):
    """A run over domains, ready to start.

    Attributes:
        arguments: what to train on what.
        sources: domain -> where its rows are, in the order of the names.
        values: of TRL's `SFTConfig`; each expert gets one of its own, with its own folder.
        output_dir: gets the adapter, and the experts in `experts/`.
    """

    arguments: DomainArguments
    sources: dict[str, str]
    values: dict[str, Any]
    output_dir: Path

    def sft_config(self, folder: Path, **changes: Any) -> SFTConfig:
        """TRL's config for one training in a folder of its own."""
        return make_sft_config({**self.values, "output_dir": str(folder), **changes})


def parse_domains(argv: Sequence[str]) -> DomainSettings:
    """The settings that a command line asks for.

    Raises:
        ValueError: an unknown name, a value that it may not have, no domains, or names that no expert can have.
        SystemExit: after `--help`.
    """
    about = "Train one LoRA per domain, each alone on the frozen backbone, then a gate that chooses among them."
    parser = make_parser(PROGRAM, DomainArguments, "--domains FOLDER", about)
    set_defaults(parser, of_this_machine(), "this machine's settings")
    first = parsed(parser, argv)
    if first.config is not None:
        set_defaults(parser, from_file(first.config), str(first.config))
    values = vars(parsed(parser, argv))
    values.pop("config")
    arguments = DomainArguments(**{f.name: values.pop(f.name) for f in fields(DomainArguments)})
    output_dir = Path(values.pop("output_dir") or "output/domains").expanduser()
    if values.get("packing") or values.get("padding_free"):
        name = "packing" if values.get("packing") else "padding_free"
        raise refuse(
            name, True, "False for domains", "A packed row holds several samples, and each has its own domain."
        )
    if arguments.r < 1:
        raise refuse("r", arguments.r, "a whole number of at least 1", "8 is common.")
    if arguments.gate_steps < 1 and arguments.gate in TRAINED_GATES:
        remedy = "200 are common; `--gate prototype` and `--gate arrow` need no training."
        raise refuse("gate_steps", arguments.gate_steps, f"at least 1 with the gate {arguments.gate!r}", remedy)
    return DomainSettings(arguments, domain_sources(arguments.domains), values, output_dir)


def domain_sources(folder: str) -> dict[str, str]:
    """Domain -> where its rows are.

    Args:
        folder: each folder in it, and each file of a kind that holds rows, is a domain of that name.

    Raises:
        ValueError: no such folder, none or one domain in it, one name twice, or names that no expert can have.
    """
    path = Path(folder).expanduser()
    if not folder or not path.is_dir():
        remedy = "Make one with a folder or a jsonl file for each domain: data/law/, data/code/."
        raise refuse("domains", folder, "a folder", remedy)
    found = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
    found = [p for p in found if p.is_dir() or p.suffix in FILE_KINDS]
    names = [p.name if p.is_dir() else p.stem for p in found]
    if len(names) < 2:
        remedy = "A gate has nothing to choose with one: for a single domain use `moe-peft train`."
        raise refuse("domains", folder, f"a folder with at least two domains, not {names}", remedy)
    problems = name_problems(names)
    if problems:
        raise refuse("domains", names, "names of experts", f"{'; '.join(problems)}. Rename the folder or file.")
    return {name: str(p) for name, p in zip(names, found, strict=True)}
