"""The command `moe-peft`. A module beside the package, for what has to happen before PEFT is imported."""

import logging


def main() -> None:
    """Run the command line."""
    # PEFT imports bitsandbytes, which then tells CPU users of an optional kernel that cannot be trained through.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from moe_peft.cli import main as run

    run()
