"""The commands of `moe-peft` that turn a trained adapter into something to run: merge, shrink, export, bundle, serve.

As in `moe_peft.cli`, heavy imports stand inside the commands.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console


def add_to(app: typer.Typer) -> None:
    """Put them on the command line, in this order."""
    for command in (merge, shrink, merge_loras, join, export):
        app.command()(command)
    app.command(name="import")(import_)
    for command in (bundle, serve):
        app.command()(command)


def merge(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, or an id on the Hub.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the weights, their record and the picture.")],
    calibration: Annotated[
        str | None,
        typer.Option(help="Text to fit on, as for `train --dataset`; not for an adapter without routing."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="ls (the default), usage, learned, distill or ls+distill; see the README."),
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


def shrink(
    adapter: Annotated[
        str, typer.Argument(help="The folder of a LINEAR_MOE or FFN_MOE adapter, or an id on the Hub.")
    ],
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
    merge: Annotated[str | None, typer.Option(help="With group: lstsq (the default) or usage.")] = None,
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


def join(
    loras: Annotated[list[str], typer.Argument(help="Plain LoRAs with names: law=loras/law code=loras/code.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the adapter.")],
    gate: Annotated[
        str,
        typer.Option(help="prototype (nearest mean prompt), arrow (from the LoRAs alone) or given (told by hand)."),
    ] = "prototype",
    data: Annotated[str | None, typer.Option(help="Rows of the domains, as for `train --dataset`.")] = None,
    by: Annotated[str, typer.Option(help="The column of --data with the domain's name.")] = "domain",
    unknown: Annotated[
        str | None, typer.Option(help="Rows that no domain is for: prompts like these are left to the base model.")
    ] = None,
    limit: Annotated[int, typer.Option(help="At most this many rows of each file.")] = 256,
    model: Annotated[str | None, typer.Option(help="The backbone, if not the one that the LoRAs name.")] = None,
) -> None:
    """Ready LoRAs as the named experts of one adapter, each exactly as it was, under a gate that needs no training."""
    from moe_peft.joining import join_loras

    join_loras(Console(), loras, output, gate, data, by, unknown, limit, model)


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
        assert output is not None  # or it would have been refused
        describe_output(adapter, output)
        return
    for option in ("--prompt", "--domain", "--data"):
        if given[option] is not None:
            raise ValueError(f"`{option}` goes with `--to loras` or `--to request-lora` alone, but `--to` is '{to}'.")
    export_adapter(Console(), adapter, to, output, check, model, target, base_weights, dtype, max_shard_size, verify)
    if output is not None and not check:
        describe_output(adapter, output)


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
    max_requests: Annotated[int, typer.Option(help="That are answered or wait at one time; others get a 503.")] = 256,
) -> None:
    """A trained adapter as an OpenAI-compatible server on this machine, routed as it was trained."""
    from moe_peft.serving.command import serve_bundle

    limits = (max_new_tokens_limit, max_body_bytes, max_requests)
    serve_bundle(Console(), folder, host, port, continuous_batching, *limits)
