"""One plain LoRA, or dense weights, in place of a routed adapter, and what that costs, measured."""
