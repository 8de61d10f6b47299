"""The card of a trained adapter: what it is, how it was trained, and a snippet that loads it."""

from typing import Any

from moe_peft.banner import method_line, parameter_counts
from moe_peft.catalogue import RECIPE_FILE


def adapter_card(model: Any, name: str, base_model: str, dataset: str, history: list[dict[str, Any]]) -> str:
    """Markdown for the README.md beside the adapter.

    Args:
        model: the trained PEFT model.
        name: of the method or folder that the adapter came from.
        base_model: as it is loaded.
        dataset: what it was trained on, as the user wrote it.
        history: the trainer's log.
    """
    count = parameter_counts(model)
    losses = [
        f"{key} {entry[key]:.4f}" for key in ("train_loss", "eval_loss") for entry in history[-3:] if key in entry
    ]
    ours = hasattr(model.peft_config["default"], "plugin")
    imports = "import moe_peft  # registers the adapter type\n" if ours else ""
    return f"""---
base_model: {base_model}
library_name: peft
tags:
- peft
- trl
- sft
- mixture-of-lora-experts
---

# {name} on {base_model.rstrip("/").rsplit("/", 1)[-1]}

{method_line(model.peft_config["default"])}. {count["trainable"]:,} trainable parameters, {count["router"]:,} of them in
routers; a token uses {count["active"]:,}. Trained on `{dataset}` with TRL ({", ".join(losses) or "no loss logged"});
`{RECIPE_FILE}` has every setting.

```python
{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(model, "PATH_OF_THIS_FOLDER")
```
"""
