"""Another project publishes an import package of the same name; the two cannot share an environment."""

from importlib.metadata import PackageNotFoundError, distribution


def refuse_rival() -> None:
    """Stop when the distribution `moe-peft` (TUDB-Labs) is installed: both write into one folder `moe_peft`.

    Raises:
        ImportError: what is there, and how to get rid of it.
    """
    try:
        other = distribution("moe-peft")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"This environment also has the distribution 'moe-peft' {other.version}, another project with an import package "
        "of the same name: both write into the folder `moe_peft`, and which files are whose is chance. Use a fresh "
        "environment, or `pip uninstall moe-peft peft-moe` and then `pip install peft-moe`."
    )
