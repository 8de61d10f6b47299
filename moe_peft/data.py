"""Rows for supervised fine-tuning: from a file, a folder or the Hub into the formats that TRL trains on.

What TRL knows goes through as it is. Two common shapes are mapped, because whole benchmarks come in them:

| columns of a row                  | what TRL gets                                                                     |
|-----------------------------------|-----------------------------------------------------------------------------------|
| `input_ids` (and `labels`)        | the same: already tokenised                                                       |
| `messages`                        | the same                                                                          |
| `conversations`                   | `messages`; ShareGPT's `from` and `value` become `role` and `content`             |
| `prompt`, `completion`            | the same, texts or lists of messages                                              |
| `instruction`, (`input`), `output` | prompt and completion: a user's and an assistant's message where the tokenizer has |
|                                   | a chat template, else Alpaca's "### Instruction: ... ### Response:"               |
| `question`, `answer`              | likewise; without a chat template lm-eval's "Question: ... Answer: ..."            |
| `text`                            | the same; of a `.txt` file each line that is not blank is a row                    |

The first line that fits decides. A row without its field stops the run before anything is trained.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from moe_peft.errors import nearest
from moe_peft.sources import load, sliced, split_and_slice


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ALONGSIDE = ("tools", "chat_template_kwargs")
"""Columns that TRL reads beside messages."""


class TaskTypes(NamedTuple):
    """What a column `task_type` must hold for an adapter.

    Attributes:
        count: how many types there are.
        meaning: of the numbers.
        need: why the column has to be there, and what to do.
        names: of the types, where they have any: then a column `domain` may hold these in its place.
    """

    count: int = 2
    meaning: str = "0 (world knowledge) or 1 (other tasks)"
    need: str = (
        "LoRAMoE's balance needs it: 0 for world knowledge, 1 for other tasks. Add the column, or train without: "
        "`--set balance=none`."
    )
    names: list[str] | None = None


Row = dict[str, Any]


class Rows(NamedTuple):
    """What the trainer is given.

    Attributes:
        dataset: in a format of TRL's.
        form: what a row is, for the eyes of the user.
        conversational: whether the rows hold messages, so that the chat template applies.
        unused: columns of the source that training does not read.
    """

    dataset: Dataset
    form: str
    conversational: bool
    unused: list[str]


class _Form(NamedTuple):
    """One line of the table above. `convert` is told whether there is a chat template."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    convert: Callable[[Row, bool], Row] | None = None


def training_rows(
    source: str,
    split: str = "train",
    chat: bool = True,
    text_field: str = "text",
    keep: tuple[str, ...] = (),
    types: TaskTypes | None = None,
) -> Rows:
    """Load, check and shape the rows of a split.

    Args:
        source: a json, jsonl, csv, parquet or txt file, a folder of them, or a data set's id on the Hub.
        split: of a folder, the files whose names contain it (for "train" also those that name no split); a single file
            is all "train". A slice is possible: "train[:300]", "train[90%:]".
        chat: whether the tokenizer has a chat template.
        text_field: the column of plain text, TRL's `dataset_text_field`.
        keep: columns to carry along, which every row must have.
        types: what a kept `task_type` must hold; LoRAMoE's two by default.

    Raises:
        ValueError: what cannot be found, read or trained on, and what to do.
    """
    name, brackets = split_and_slice(split)
    types = types or TaskTypes()
    parts = [_shaped(part, label, chat, text_field, keep, types) for label, part in load(source, name)]
    if len({tuple(part.dataset.column_names) for part in parts}) > 1:
        forms = "; ".join(sorted({part.form for part in parts}))
        raise ValueError(
            f"The files of '{source}' hold rows of different kinds ({forms}). Train on one kind at a time."
        )
    dataset = parts[0].dataset if len(parts) == 1 else concatenate_datasets([part.dataset for part in parts])
    if brackets:
        dataset = sliced(dataset, brackets)
    unused = sorted({column for part in parts for column in part.unused})
    return Rows(dataset, parts[0].form, parts[0].conversational, unused)


def _shaped(
    dataset: Dataset, label: str, chat: bool, text_field: str, keep: tuple[str, ...], types: TaskTypes
) -> Rows:
    if "task_type" in keep and types.names:
        dataset = _numbered(dataset, label, types.names)
    columns = dataset.column_names
    form = _form_of(columns, text_field, label)
    missing = [column for column in keep if column not in columns]
    if missing:
        raise ValueError(
            f"The rows of {label} have no `{missing[0]}` (they have {', '.join(columns)}). "
            + (types.need if missing[0] == "task_type" else "Name a column that they have.")
        )
    _check(dataset, form, label, keep, types)
    messages = isinstance(dataset[0][form.required[0]], list) and form.required[0] != "input_ids"
    if messages and not chat:
        raise ValueError(
            f"The rows of {label} are conversations, but the tokenizer has no chat template to turn them into text. "
            "Give one with `--chat_template_path` (a .jinja file, or a model whose template fits), use a model that "
            "has one, or write the rows as `prompt` and `completion`."
        )
    used = [column for column in dict.fromkeys((*form.required, *form.optional, *keep)) if column in columns]
    unused = [column for column in columns if column not in used]
    dataset = dataset.select_columns(used)
    if form.convert is not None:
        convert = form.convert
        dropped = [column for column in used if column not in (*_ALONGSIDE, *keep)]
        dataset = dataset.map(lambda row: convert(row, chat), remove_columns=dropped, desc=f"Reading {form.name}")
        messages = chat or messages
    return Rows(dataset, form.name, messages, unused)


def _form_of(columns: list[str], text_field: str, label: str) -> _Form:
    if "chosen" in columns and "rejected" in columns:
        raise ValueError(
            f"The rows of {label} are preference pairs (`chosen`, `rejected`), which supervised fine-tuning cannot use. "
            "Give them to TRL's DPOTrainer with `peft_config=moe_peft.from_catalogue(...)`, or keep the chosen answers."
        )
    forms = list(_FORMS)
    text = _Form("plain text", (text_field,))
    forms.insert(len(forms) if text_field == "text" else 0, text)
    for form in forms:
        if all(column in columns for column in form.required):
            return form
    known = {column for form in forms for column in form.required}
    near = [(column, hint) for column in columns if (hint := nearest(column, known)).startswith("Did you mean")]
    # The word that is nearly right helps more than the list, and both are short.
    hint = "".join(f" `{column}`: {text}" for column, text in near if column not in known)
    needs = "; ".join(" and ".join(f"`{column}`" for column in form.required) for form in forms)
    raise ValueError(
        f"The rows of {label} have the columns {', '.join(columns)}, which are in no format known here.{hint} Rename "
        f"them to one of: {needs}. For another column of plain text give `--dataset_text_field`."
    )


def _numbered(dataset: Dataset, label: str, names: list[str]) -> Dataset:
    """The rows with their `domain` as `task_type`, where they name it so."""
    if "domain" not in dataset.column_names or "task_type" in dataset.column_names:
        return dataset
    other = sorted({str(name) for name in dataset["domain"]} - set(names))
    if other:
        raise ValueError(
            f"The rows of {label} are of the domain{'s' if len(other) > 1 else ''} {', '.join(map(repr, other[:6]))}, for which "
            f"the adapter has no expert. Its experts are {', '.join(map(repr, names[:12]))}{' ...' if len(names) > 12 else ''}: "
            "`--set 'domains=[...]'` gives them other names."
        )
    numbers = [names.index(str(name)) for name in dataset["domain"]]
    return dataset.remove_columns("domain").add_column("task_type", numbers)  # pyright: ignore[reportCallIssue]


def _check(dataset: Dataset, form: _Form, label: str, keep: tuple[str, ...], types: TaskTypes) -> None:
    """Every row has every required field, of the right kind."""
    needed = list(dict.fromkeys((*form.required, *keep)))
    view = dataset.select_columns(needed)
    first = isinstance(view[0][needed[0]], list)
    for start in range(0, len(view), 1000):
        batch = view[start : start + 1000]
        for offset in range(len(batch[needed[0]])):
            for field in needed:
                value = batch[field][offset]
                problem = _kept_problem(field, value, types) if field in keep else _problem(field, value)
                if problem is None and field not in keep and isinstance(value, list) != first:
                    problem = f"is {'a list' if not first else 'a text'}, unlike `{needed[0]}` of the first row"
                if problem:
                    row = dataset[start + offset]
                    has = ", ".join(key for key, value in row.items() if value is not None) or "none"
                    raise ValueError(
                        f"Row {start + offset + 1} of {label}: `{field}` {problem} (the row has: {has}). {form.name} "
                        f"rows need {' and '.join(f'`{name}`' for name in needed)}: correct or remove the row."
                    )


def _kept_problem(field: str, value: Any, types: TaskTypes) -> str | None:
    if value is None:
        return "is missing"
    if field == "task_type" and str(value) not in map(str, range(types.count)):
        return f"is {value!r}, but must be {types.meaning}"
    return None


def _problem(field: str, value: Any) -> str | None:
    """What is wrong with the value of a field, or None."""
    if value is None:
        return "is missing"
    if field == "input_ids":
        return None
    if isinstance(value, str):
        return "is a text, but must be a list of messages" if field in ("messages", "conversations") else None
    if not isinstance(value, list):
        return f"is {value!r}, but must be text or a list of messages"
    if not value:
        return "is an empty list"
    for number, message in enumerate(value, start=1):
        keys = (
            ("from", "value") if isinstance(message, dict) and message.get("from") is not None else ("role", "content")
        )
        calls = isinstance(message, dict) and message.get("tool_calls")
        if not isinstance(message, dict) or any(message.get(key) is None for key in keys if not calls):
            return f"has a message {number} without `role` and `content`"
    return None


def _from_conversations(row: Row, chat: bool) -> Row:
    messages = []
    for turn in row["conversations"]:
        role, content = turn.get("role") or turn.get("from"), turn.get("content", turn.get("value"))
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    return {"messages": messages}


def _from_instruction(row: Row, chat: bool) -> Row:
    more = row.get("input") or ""
    if chat:
        return _messages(f"{row['instruction']}\n\n{more}" if more else row["instruction"], row["output"])
    middle = f"\n\n### Input:\n{more}" if more else ""
    prompt = f"### Instruction:\n{row['instruction']}{middle}\n\n### Response:\n"
    return {"prompt": prompt, "completion": row["output"]}


def _from_question(row: Row, chat: bool) -> Row:
    if chat:
        return _messages(row["question"], row["answer"])
    return {"prompt": f"Question: {row['question']}\nAnswer:", "completion": f" {row['answer']}"}


def _messages(user: str, assistant: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": user}],
        "completion": [{"role": "assistant", "content": assistant}],
    }


_FORMS = (
    _Form("tokenised", ("input_ids",), ("labels", "completion_mask", "assistant_masks")),
    _Form("conversation", ("messages",), _ALONGSIDE),
    _Form("conversation", ("conversations",), _ALONGSIDE, _from_conversations),
    _Form("prompt and completion", ("prompt", "completion"), _ALONGSIDE),
    _Form("instruction and output", ("instruction", "output"), ("input",), _from_instruction),
    _Form("question and answer", ("question", "answer"), (), _from_question),
)
