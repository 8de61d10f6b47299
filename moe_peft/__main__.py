"""`python -m moe_peft` is `moe-peft`."""

from moe_peft_cli import main


main()
