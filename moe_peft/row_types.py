"""What the samples of a batch are: their task types, checked, and what to do where they are missing."""

from typing import Any

import torch
from torch import Tensor

from moe_peft.errors import refuse


def no_task_types(
    field: str = "balance", value: Any = "localized", otherwise: str = "'none'", domains: list[str] | None = None
) -> ValueError:
    """What to do where routing or its balance needs the samples' task types and the batch has none.

    Args:
        field, value: of the config, that which needs them.
        otherwise: what the field may be without them.
        domains: the types' names, where they have any.
    """
    if domains:
        return refuse(
            field,
            value,
            f"{otherwise} where the model is not told the samples' domains",
            f"Add a column `domain` to the data set ({', '.join(map(repr, domains))}) and wrap the trainer's collator: "
            f"`trainer.data_collator = moe_peft.TaskTypeCollator(trainer.data_collator, 'domain', names={domains})`, "
            "with `remove_unused_columns=False`. A loop of your own calls `model(..., task_types=tensor)`, the place of "
            "each row's domain in that list; around `generate` use `domain=`.",
        )
    return refuse(
        field,
        value,
        f"{otherwise} where the model is not told the samples' task types",
        "Add a column `task_type` to the data set (whole numbers from 0; for LoRAMoE 0 is world knowledge and 1 other "
        "tasks) and wrap the trainer's collator: `trainer.data_collator = "
        "moe_peft.TaskTypeCollator(trainer.data_collator)`, with `remove_unused_columns=False`. A loop of your own calls "
        "`model(..., task_types=tensor)`, one number per row; around `generate` use `with moe_peft.task_types(model, [...])`.",
    )


def no_rows(balance: str) -> ValueError:
    """What to do where a balance loss is by row and the router cannot tell the rows apart."""
    return refuse(
        "balance",
        balance,
        "'switch', 'cv2' or 'bias' where a router does not see rows of tokens",
        "The input of the layer has lost its rows, as in some encoders and in padding-free batches.",
    )


def several_in_a_row(balance: str) -> ValueError:
    """What to do where a balance loss is by row and a row holds several samples."""
    allowed = "'switch', 'cv2' or 'bias' where one row holds several samples, which it would take for one"
    types = ", or give `task_types`" if balance == "mi" else ""
    return refuse("balance", balance, allowed, f"Turn packing and padding-free batches off{types}.")


def check_types(types: Tensor, count: int | None = None, names: list[str] | None = None) -> None:
    """Refuse what is no task type. Negative ones would count from the end. `names` are the types', where they have any.

    Values are looked at on the CPU alone: elsewhere the host would have to wait for them.
    """
    whole = not (types.is_floating_point() or types.is_complex() or types.dtype == torch.bool)
    here = types.device.type == "cpu" and types.numel() and not torch.compiler.is_compiling()
    if whole and not (here and (int(types.min()) < 0 or count is not None and int(types.max()) >= count)):
        return
    allowed = (
        "whole numbers from 0" if count is None else f"whole numbers from 0 to {count - 1}, as `expert_groups` has"
    )
    remedy = "Number the types from 0."
    if names:
        allowed = f"whole numbers from 0 to {len(names) - 1}, the places of the domains"
        remedy = "They are " + ", ".join(f"{place} {name}" for place, name in enumerate(names)) + "."
    raise refuse("task_types", types.flatten().tolist()[:8], allowed, remedy)


def one_per_row(task_types: Any, states: Tensor | None) -> Tensor:
    task_types = torch.as_tensor(task_types)
    check_types(task_types)
    if states is not None and task_types.shape == states.shape[:2]:
        return task_types
    if task_types.dim() != 1 or (states is not None and task_types.shape[0] != states.shape[0]):
        rows = "one number per row" if states is None else f"{states.shape[0]} numbers, one per row of the batch"
        raise refuse(
            "task_types",
            list(task_types.shape),
            f"of the shape of {rows}",
            "With packing or padding-free batches one row holds several samples: turn both off, or set `balance` to "
            "'none'.",
        )
    return task_types
