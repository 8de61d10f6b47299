"""`moe-peft`: parses, calls the other rooms, prints. A command is one function with `@app.command()`.

Heavy imports stand inside the commands, so that `--help` and a misspelt command do not wait for a trainer. What a user
can set right is raised as an exception with a sentence; `main` prints that sentence and leaves with code 2.
"""

import difflib
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


USER_ERROR, INTERRUPTED = 2, 130

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
    table = Table(title="Methods for --adapter", caption="Each has a card: adapters/NAME/README.md")
    for title in ("name", "type", "experts", "routing", "balance", "idea"):
        table.add_column(title, overflow="fold")
    for name in names or catalogue.methods():
        config = catalogue.from_catalogue(name)
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        top_k = getattr(config, "top_k", None)
        routing = getattr(config, "routing", "-") + (f", top {top_k}" if top_k else "")
        experts, balance = (
            str(getattr(config, "num_experts", "-") or f"{config.r} ranks"),
            getattr(config, "balance", "-"),
        )
        table.add_row(name, kind, experts, routing, balance, catalogue.idea(name))
    Console().print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Train an adapter on your data with TRL; `moe-peft train --help` lists what it takes."""
    try:
        from moe_peft.training import main as train_main
    except ModuleNotFoundError as error:
        if error.name in ("trl", "datasets"):
            raise ImportError(f'Training needs {error.name}: pip install "peft-moe[train]"') from error
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
def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, or an id on the Hub.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the weights, their record and the picture.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to fit on, as for `train --dataset`; not for an adapter without routing."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="ls (the default), usage, learned, distill, ls+distill or subspace; see the README."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the plain LoRA; by default all directions are kept.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Whole weights in place of a plain LoRA.")] = False,
    per_domain: Annotated[
        bool, typer.Option("--per-domain", help="One plain LoRA for each `domain` or `task_type` of the text.")
    ] = False,
    max_kl: Annotated[
        float | None, typer.Option(help="Write nothing if the merge is further from the routed model, in nats.")
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", help="Prompts and answers to score: rows, or a suite of the pocket backbone."),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on; by default a quarter of --calibration.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of distill and learned.")] = 300,
    mask_prompts: Annotated[
        bool, typer.Option("--mask-prompts", help="Fit to answers alone; by default to all tokens but padding.")
    ] = False,
    limit: Annotated[int, typer.Option(help="At most this many rows of text.")] = 512,
    base_weights: Annotated[
        str | None,
        typer.Option(help="With --dense: original; dequantized for what a 4-bit backbone computed with; auto."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="With --dense: float32, bfloat16 or float16; auto is the base's.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the adapter names.")] = None,
    load_in: Annotated[
        str, typer.Option(help="4bit, 8bit or none; layers reads them from disk one by one, for ls and usage.")
    ] = "4bit",
) -> None:
    """One plain LoRA, or dense weights, in place of an adapter: exact if it does not route, else what it loses is measured."""
    from moe_peft.card import describe_output
    from moe_peft.merging.command import Options, merge_adapter

    text = (calibration, method, rank, dense, per_domain, max_kl, evaluation, held_out)
    rest = (steps, limit, base_weights, dtype, model, load_in, mask_prompts)
    merge_adapter(Console(), Options(adapter, output, *text, *rest))
    describe_output(adapter, output)


@app.command()
def shrink(
    adapter: Annotated[str, typer.Argument(help="The folder of a LINEAR_MOE adapter, or an id on the Hub.")],
    calibration: Annotated[str, typer.Option(help="Text to choose by, as for `train --dataset`.")],
    output: Annotated[
        Path, typer.Option(help="A new or empty folder for the smaller adapter and moe_peft_shrink.json.")
    ],
    method: Annotated[
        str,
        typer.Option(help="prune: cut experts out; group: merge those that are used alike, under the same router."),
    ] = "prune",
    keep: Annotated[int | None, typer.Option(help="With prune: how many experts each layer keeps.")] = None,
    groups: Annotated[int | None, typer.Option(help="With group: how many experts each layer is left with.")] = None,
    by: Annotated[str | None, typer.Option(help="With prune: easy_ep (the default) or usage.")] = None,
    similarity: Annotated[str | None, typer.Option(help="With group: router (the default) or outputs.")] = None,
    merge: Annotated[str | None, typer.Option(help="With group: usage (the default) or lstsq.")] = None,
    recover: Annotated[int, typer.Option(help="Steps of distillation from the adapter as it was; 0 is none.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of --recover.")] = 2e-4,
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on; by default a quarter of --calibration.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Write nothing if the KL from the routed model is above this, in nats.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows of text.")] = 512,
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the adapter names.")] = None,
    load_in: Annotated[str, typer.Option(help="4bit, 8bit or none.")] = "4bit",
) -> None:
    """A smaller routed adapter in place of a trained one: fewer experts, and what that loses is measured."""
    from moe_peft.card import describe_output
    from moe_peft.shrinking_report import shrink_adapter

    words = {"method": method, "by": by, "similarity": similarity, "merge": merge}
    numbers = {"keep": keep, "groups": groups, "recover_steps": recover, "learning_rate": learning_rate}
    text = {"held_out": held_out, "max_kl": max_kl, "limit": limit}
    given: dict[str, Any] = {**words, **numbers, **text, "model": model, "load_in": load_in}
    shrink_adapter(Console(), adapter, calibration, output, **given)
    describe_output(adapter, output)


@app.command()
def merge_loras(
    loras: Annotated[list[str], typer.Argument(help="Two or more plain LoRAs: folders, or ids on the Hub.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the merged LoRA and moe_peft_merge.json.")],
    method: Annotated[str, typer.Option(help="ties, knots_ties, linear or cat (exact, of all ranks).")] = "ties",
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each LoRA, in order: --weight 0.7 --weight 0.3.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share that TIES keeps; default 0.2, and 1.0 for knots_ties.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the result; by default no more is cut than must be.")] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure on: one for all, or one for each LoRA in order. Without it nothing is measured."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows of each text.")] = 256,
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the first LoRA names.")] = None,
    load_in: Annotated[str, typer.Option(help="4bit, 8bit or none.")] = "4bit",
) -> None:
    """Several plain LoRAs of one backbone as one: TIES, KnOTS, or their sum, and what each of them loses by it."""
    from moe_peft.card import describe_output
    from moe_peft.merging_report import merge_plain_loras

    merge_plain_loras(Console(), loras, output, method, weight, density, rank, held_out or [], limit, model, load_in)
    describe_output(None, output)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="The folder of an FFN mixture, or an id on the Hub.")],
    output: Annotated[Path | None, typer.Option(help="A new or empty folder for the checkpoint.")] = None,
    to: Annotated[
        str,
        typer.Option(
            help="moe: a stock Mixture-of-Experts checkpoint, exact. loras: a plain LoRA per expert, and what picks among "
            "them. request-lora: the one LoRA for --prompt, exact where whole sequences are routed."
        ),
    ] = "moe",
    check: Annotated[bool, typer.Option("--check", help="Say what would be written, and write nothing.")] = False,
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the adapter names.")] = None,
    target: Annotated[
        str, typer.Option(help="auto, or the model type of the checkpoint: mixtral, qwen3_moe ...")
    ] = "auto",
    base_weights: Annotated[
        str,
        typer.Option(
            help="original; dequantized for what a 4-bit backbone computed with; auto asks the training log."
        ),
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16; auto is the backbone's.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Of one weights file.")] = "4GB",
    verify: Annotated[bool, typer.Option(help="Compare the export with the adapter on its backbone.")] = True,
    prompt: Annotated[str | None, typer.Option(help="For request-lora: the request.")] = None,
    domain: Annotated[str | None, typer.Option(help="For request-lora: the expert, in place of the router.")] = None,
    data: Annotated[
        str | None, typer.Option(help="For loras: labelled prompts to fit what picks, as for `train --dataset`.")
    ] = None,
    by: Annotated[str, typer.Option(help="For loras: the column of --data with the expert's name.")] = "domain",
) -> None:
    """A mixture for servers without a plugin: an FFN mixture as a stock MoE checkpoint, experts on linears as plain LoRAs."""
    from moe_peft.card import describe_output
    from moe_peft.exporting import PLAIN, export_adapter, export_plain

    given = {"--prompt": prompt, "--domain": domain, "--data": data, "--check": check or None}
    if to in PLAIN:
        export_plain(Console(), adapter, to, output, model, given, by)
        return
    for option in ("--prompt", "--domain", "--data"):
        if given[option] is not None:
            raise ValueError(f"`{option}` goes with `--to loras` or `--to request-lora` alone, but `--to` is '{to}'.")
    export_adapter(Console(), adapter, to, output, check, model, target, base_weights, dtype, max_shard_size, verify)
    if output is not None and not check:
        describe_output(adapter, output)


@app.command(name="import")
def import_(
    source: Annotated[
        str, typer.Argument(help="The folder of a MixLoRA checkpoint by TUDB-Labs, or an id on the Hub.")
    ],
    output: Annotated[Path, typer.Option(help="Gets the adapter; a new or empty folder.")],
    model: Annotated[str | None, typer.Option(help="The backbone; with it, layers and widths are checked.")] = None,
) -> None:
    """A MixLoRA checkpoint of the packages `moe-peft` or `mixlora` as one of ours, with equal outputs."""
    from moe_peft.exporting import import_checkpoint

    import_checkpoint(Console(), source, output, model)


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


@app.command()
def bundle(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, or an id on the Hub.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the bundle.")],
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the adapter names.")] = None,
    load_in: Annotated[
        str, typer.Option(help="How the backbone is stored: 4bit, 8bit or none; auto asks the training log.")
    ] = "auto",
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the backbone's files even where a hard link would do.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Also a backbone other than the training log's, by its hash.")
    ] = False,
) -> None:
    """Backbone, adapter and tokenizer in one folder with a record of their hashes: what `moe-peft serve` takes."""
    from moe_peft.serving.command import bundle_adapter

    bundle_adapter(Console(), adapter, output, model, load_in, copy, any_base)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A bundle, as `moe-peft bundle` writes it.", metavar="DIR")],
    host: Annotated[
        str, typer.Option(help="The address to listen at; others than this machine's own are open to all.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8000,
    continuous_batching: Annotated[
        bool | None,
        typer.Option(
            "--continuous-batching/--no-continuous-batching",
            help="Answer requests in batches. Default: on an accelerator, where the adapter allows it.",
        ),
    ] = None,
    max_new_tokens_limit: Annotated[int, typer.Option(help="The most tokens that a request may ask for.")] = 4096,
    max_body_bytes: Annotated[int, typer.Option(help="The longest request.")] = 2**20,
) -> None:
    """A trained adapter as an OpenAI-compatible server on this machine, routed as it was trained."""
    from moe_peft.serving.command import serve_bundle

    serve_bundle(Console(), folder, host, port, continuous_batching, max_new_tokens_limit, max_body_bytes)


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point: runs a command and leaves with its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments[: next((i for i, word in enumerate(arguments) if not word.startswith("-")), None)]
    # bitsandbytes tells CPU users of a kernel that is optional and that cannot be trained through.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
