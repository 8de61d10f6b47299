"""`python -m moe_peft` is `moe-peft`."""

from moe_peft.cli import main


main()
