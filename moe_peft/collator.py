"""The samples' task types on their way from the data set to the model: for LoRAMoE's balance, and for groups of experts."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moe_peft.errors import nearest, refuse


class TaskTypeCollator:
    """Wraps any data collator and adds `task_types`, `[B]`, from a column of the rows.

    The rows' column stays out of the wrapped collator's sight. Under TRL's SFT trainer:

        trainer = SFTTrainer(..., args=SFTConfig(..., remove_unused_columns=False), peft_config=...)
        trainer.data_collator = TaskTypeCollator(trainer.data_collator)

    `remove_unused_columns` must be off, as that trainer drops every column but its own three before the collator sees
    the rows. Packing and padding-free batches are refused: one row of theirs holds several samples.

    Args:
        collator: what makes a batch of rows without the column.
        column: where a row keeps its task type: a whole number from 0. Under `balance="localized"` 0 is world knowledge
            and 1 any other task; with `expert_groups` type t is its entry t.
        num_types: how many there are.
        names: of the types, in their order: an adapter's `domains`. The column may hold a name then, and `num_types` follows.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        column: str = "task_type",
        num_types: int = 2,
        names: Sequence[str] | None = None,
    ) -> None:
        self.collator = collator
        self.names = None if names is None else list(names)
        self.column, self.num_types = column, num_types if self.names is None else len(self.names)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if any(self.column not in row for row in rows):
            raise refuse(
                "column",
                self.column,
                "a column of every row: " + ", ".join(sorted(rows[0])),
                "Set `remove_unused_columns` to False, or the trainer drops it, and `packing` to False: a packed row "
                "holds several samples and has no task type of its own.",
            )
        task_types = torch.tensor([self._number(row[self.column]) for row in rows])
        if any(not 0 <= kind < self.num_types for kind in task_types.tolist()):
            raise refuse(
                self.column,
                sorted(set(task_types.tolist())),
                f"whole numbers from 0 to {self.num_types - 1} in every row",
                "Map your task names to them before training, or raise `num_types` of the collator. Under "
                "`balance='localized'` 0 is world knowledge and 1 any other task.",
            )
        batch = self.collator([{key: value for key, value in row.items() if key != self.column} for row in rows])
        if batch["input_ids"].shape[0] != len(rows):
            raise refuse(
                "padding_free",
                True,
                f"False where task types are used: {len(rows)} samples came out of the collator as "
                f"{batch['input_ids'].shape[0]} row(s)",
                "Set `padding_free` and `packing` to False.",
            )
        return {**batch, "task_types": task_types}

    def _number(self, value: Any) -> int:
        if self.names is not None and isinstance(value, str):
            if value not in self.names:
                allowed = "one of " + ", ".join(map(repr, self.names))
                raise refuse(self.column, value, allowed, nearest(value, self.names))
            return self.names.index(value)
        if isinstance(value, float) and value.is_integer():  # as a table with gaps keeps whole numbers
            return int(value)
        try:
            return operator.index(value if not isinstance(value, bool) else None)
        except TypeError as error:
            remedy = "For domains by name give the collator `names=model.peft_config['default'].domains`."
            raise refuse(self.column, value, "a whole number in every row", remedy) from error
