"""What a merge costs, for people: a table of the three models, a picture of the error layer by layer, a sentence."""

from pathlib import Path

from rich.table import Table

from moe_peft.merging.walk import Measured
from moe_peft.pictures import pyplot
from moe_peft.report import short_name


def merge_table(measured: Measured, title: str) -> Table:
    """Base, routed and merged model beside each other."""
    scored = measured.figures["routed"].score is not None
    shown = Table(title=title, caption=f"on {measured.tokens:,} tokens it was not fitted to; KL in nats per token")
    for column in ("", "loss", "KL from routed", "same top token", *(["exact match"] if scored else [])):
        shown.add_column(column, justify="right")
    for name, f in measured.figures.items():
        score = [f"{f.score:.1%}"] if scored and f.score is not None else []
        shown.add_row(name, f"{f.loss:.4f}", f"{f.kl:.4f}", f"{f.top1:.1%}", *score)
    return shown


def kept(measured: Measured) -> str:
    """How much of what the adapter does is left, in one sentence."""
    base, merged = measured.figures["base"].kl, measured.figures["merged"].kl
    share = 1 - merged / base if base > 0 else 1.0
    worst = max(measured.layer_error, key=lambda name: measured.layer_error[name], default=None)
    where = f"; the layer that is furthest off is {short_name(worst).split()[0]}" if worst else ""
    return f"The merge closes {share:.1%} of the distance between the base and the routed model{where}."


def error_plot(
    errors: dict[str, dict[str, float]], path: Path, title: str = "What each layer loses in the merge"
) -> None:
    """Draw the error of each decoder layer as a PNG.

    Args:
        errors: name of a merge -> decoder layer -> relative error.
        path: a file that is not there yet.

    Raises:
        ImportError: without matplotlib (`pip install matplotlib scipy`).
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, layers in errors.items():
        axes.plot(range(len(layers)), list(layers.values()), marker="o", label=name)
    numbers = [short_name(name).split()[0] for name in next(iter(errors.values()))]
    step = max(1, len(numbers) // 16)
    axes.set_xticks(range(0, len(numbers), step), numbers[::step])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("|merged - routed| / |routed - base|\nof the layer's output, on the routed model's states")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    if len(errors) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
