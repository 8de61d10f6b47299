"""`moe-peft`: parses, calls the other rooms, prints. A command is one function with `@app.command()`.

Heavy imports stand inside the commands, so that `--help` and a misspelt command do not wait for a trainer. What a user
can set right is raised as an exception with a sentence; `main` prints that sentence and leaves with code 2.
"""

import difflib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moe_peft import cli_serving


USER_ERROR, INTERRUPTED = 2, 130
WIDE = 120  # columns of a terminal

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mixtures of LoRA experts for Hugging Face PEFT: train them with TRL, look into them, merge or export them.",
)


@app.callback()
def _before_any_command(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the command; `main` reads them."""


@app.command()
def methods(
    names: Annotated[list[str] | None, typer.Argument(help="Only these entries; by default all.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Count their parameters on a backbone.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --compare: a folder with a config.json or an id on the Hub. Default: LLaMA-2-7B's shape."
        ),
    ] = None,
) -> None:
    """The catalogue: every published method that `--adapter` takes by name; with --compare, how large each is."""
    from moe_peft import catalogue

    if compare:
        from moe_peft.comparing import print_comparison

        print_comparison(Console(), names or [], model)
        return
    if model is not None:
        raise ValueError(f"`--model` is '{model}', but there is nothing to count. Give `--compare` as well.")
    for name in names or []:
        catalogue.entry_folder(name)
    console = Console()
    titles = ("name", "type", "experts", "routing", "balance", "idea")
    # A narrow terminal has room for what a reader chooses by; the card says the rest.
    shown = titles if console.width >= WIDE else ("name", "type", "idea")
    table = Table(title="Methods for --adapter", caption="Each has a card: adapters/NAME/README.md")
    for title in shown:
        table.add_column(title, overflow="fold")
    for name in names or catalogue.methods():
        cells = {"name": name, **catalogue.at_a_glance(name)}
        table.add_row(*(cells[title] for title in shown))
    console.print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Train an adapter on your data with TRL; `moe-peft train --help` lists what it takes."""
    try:
        from moe_peft.training import main as train_main
    except ModuleNotFoundError as error:
        if error.name in ("trl", "datasets"):
            raise ImportError(f"Training needs {error.name}: pip install trl datasets bitsandbytes") from error
        raise

    train_main(context.args)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Gets the adapters, the picture and all figures.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(help="Of the rows and of both adapters.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimiser steps for each adapter.")] = 300,
) -> None:
    """The whole product in minutes on a CPU: train, compare with LoRA, reload, merge, look at the routers."""
    from transformers.utils.logging import disable_progress_bar

    from moe_peft.demo import run

    disable_progress_bar()
    run(output_dir, seed=seed, steps=steps)


@app.command()
def inspect(
    adapter: Annotated[str, typer.Argument(help="The folder that training wrote, or an id on the Hub.")],
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the adapter names.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to route, as for `train --dataset`; a slice: rows.jsonl#train[:100].")
    ] = None,
    by: Annotated[str | None, typer.Option(help="The column of --data that names a row's domain.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Gets routing.json and routing.png.")] = None,
    load_in: Annotated[str, typer.Option(help="4bit, 8bit or none.")] = "4bit",
) -> None:
    """What an adapter is: parameters, the LoRA of the same size, and with --data the health of its routers."""
    from moe_peft.card import describe_routers
    from moe_peft.inspecting import inspect_adapter

    inspect_adapter(Console(), adapter, model, data, by, limit, output, load_in)
    if data is not None and output is not None:
        describe_routers(adapter, output / "routing.json")


@app.command()
def allocate(
    data: Annotated[str, typer.Option(help="Text to measure on, as for `train --dataset`: the training data.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the config, the figures and the picture.")],
    adapter: Annotated[str, typer.Option(help="As for `train --adapter`.")] = "mola",
    model: Annotated[str, typer.Option(help="The backbone.")] = "pocket",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Trained parameters at most, or as many as an allocation costs: =5:5:5:5. Default: as it is."
        ),
    ] = None,
    choose: Annotated[str, typer.Option(help="experts, rank or both.")] = "experts",
    min_experts: Annotated[int | None, typer.Option(help="Per layer; by default the fewest allowed.")] = None,
    max_experts: Annotated[int | None, typer.Option(help="Per layer; by default 8, or the most named.")] = None,
    max_rank: Annotated[int | None, typer.Option(help="Per layer; by default twice the largest named.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a field of the adapter: --set r=4.")] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows of text.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows per pass.")] = 8,
    load_in: Annotated[str, typer.Option(help="4bit, 8bit or none.")] = "4bit",
) -> None:
    """Experts or rank for each layer, by what the layers of the frozen model have to gain from your data."""
    from moe_peft.allocating_report import allocate_adapter

    bounds = (min_experts, max_experts, max_rank)
    allocate_adapter(
        Console(), adapter, model, data, output, budget, choose, *bounds, set_ or [], limit, batch_size, load_in
    )


@app.command()
def bank(
    bank: Annotated[Path, typer.Argument(help="A folder of LoRA folders, as PEFT saves them.")],
    shots: Annotated[str, typer.Option(help="A few labelled rows, as for `train --dataset`; 50 are usual.")],
    output: Annotated[Path, typer.Option(help="Gets scores, choice and a mixture to train; run again, it goes on.")],
    model: Annotated[str, typer.Option(help="The backbone that the LoRAs are for.")] = "pocket",
    select: Annotated[int, typer.Option(help="How many LoRAs to choose.")] = 4,
    candidates: Annotated[int, typer.Option(help="Of how many by rank; all their subsets are tried.")] = 8,
    open_rows: Annotated[
        str | None, typer.Option(help="More rows: those most like the shots join the training rows.")
    ] = None,
    open_limit: Annotated[int, typer.Option(help="At most this many of them.")] = 1000,
    skip_unusable: Annotated[
        bool, typer.Option("--skip-unusable", help="List what cannot be used and go on without it.")
    ] = False,
    load_in: Annotated[str, typer.Option(help="4bit, 8bit or none.")] = "4bit",
    batch_size: Annotated[int, typer.Option(help="Shots per pass.")] = 8,
) -> None:
    """Choose LoRAs of a bank by a few labelled shots (Rocket), and get a mixture of them to train."""
    from moe_peft.bank_command import BankOptions, select_from_bank

    limits = (open_rows, open_limit, skip_unusable, load_in, batch_size)
    select_from_bank(Console(), BankOptions(bank, shots, output, model, select, candidates, *limits))


cli_serving.add_to(app)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point: runs a command and leaves with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)]
    # TRL sets a field that transformers has renamed; the user can do nothing about it.
    warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing", category=FutureWarning)
    try:
        _refuse_unknown_command(arguments)
        code = int(app(arguments, prog_name="moe-peft", standalone_mode=False) or 0)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # of typer's own errors
        if type(error).__name__ == "Abort":  # some versions of typer raise it for Ctrl-C, others return the code
            code = INTERRUPTED
        elif debug or not (usage or isinstance(error, (ValueError, TypeError, ImportError, OSError, RuntimeError))):
            raise
        else:
            _say(usage() if usage else str(error).strip() or type(error).__name__)
            if not usage and not isinstance(error, (ValueError, ImportError)):  # it may be our mistake as well
                _say("`moe-peft --debug ...` shows where this comes from.", "dim")
            code = USER_ERROR
    if code == INTERRUPTED:
        again = "; `--resume_from_checkpoint` goes on from the last checkpoint" if "train" in arguments[:2] else ""
        _say(f"Interrupted. What was saved before is as it was{again}.")
    sys.exit(code)


def _say(sentence: str, style: str = "red") -> None:
    Console(stderr=True, soft_wrap=True).print(sentence, style=style, markup=False, highlight=False)


def _refuse_unknown_command(arguments: Sequence[str]) -> None:
    command = next((word for word in arguments if not word.startswith("-")), None)
    known = [
        c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands if c.callback is not None
    ]
    if command is None or command in known:
        return
    close = difflib.get_close_matches(command, known, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else f"Choose one of: {', '.join(known)}."
    raise ValueError(f"`moe-peft {command}` is not a command. {hint}")
