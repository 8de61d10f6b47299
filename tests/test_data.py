"""Rows from files and folders into TRL's formats, and a sentence for every way in which they can be wrong."""

import json
import re

import pytest


datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

from moe_peft.data import TaskTypes, training_rows  # noqa: E402


USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "chat", "want"),
    [
        ({"text": "1+1=2"}, False, {"text": "1+1=2"}),
        ({"prompt": "1+1?", "completion": "2"}, False, {"prompt": "1+1?", "completion": "2"}),
        ({"prompt": [USER], "completion": [ANSWER]}, True, {"prompt": [USER], "completion": [ANSWER]}),
        ({"messages": [USER, ANSWER]}, True, {"messages": [USER, ANSWER]}),
        (
            {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
            True,
            {"messages": [USER, ANSWER]},
        ),
        ({"question": "1+1?", "answer": "2"}, True, {"prompt": [USER], "completion": [ANSWER]}),
        ({"question": "1+1?", "answer": "2"}, False, {"prompt": "Question: 1+1?\nAnswer:", "completion": " 2"}),
        ({"instruction": "1+1?", "input": "", "output": "2"}, True, {"prompt": [USER], "completion": [ANSWER]}),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            True,
            {"prompt": [{"role": "user", "content": "Add.\n\n1+1"}], "completion": [ANSWER]},
        ),
        (
            {"instruction": "Add.", "input": "1+1", "output": "2"},
            False,
            {"prompt": "### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n", "completion": "2"},
        ),
        (
            {"instruction": "1+1?", "output": "2"},
            False,
            {"prompt": "### Instruction:\n1+1?\n\n### Response:\n", "completion": "2"},
        ),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, False, {"input_ids": [1, 2], "labels": [-100, 2]}),
    ],
)
def test_a_row_becomes_what_trl_trains_on(tmp_path, row, chat, want):
    rows = training_rows(write(tmp_path, [row, row]), chat=chat)
    assert rows.dataset.to_list() == [want, want]
    assert rows.unused == []
    assert rows.conversational == (isinstance(next(iter(want.values())), list) and "input_ids" not in want)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path, kind):
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(3)] + [{"prompt": "a", "completion": "NA"}]
    path = tmp_path / f"rows.{kind}"
    if kind in ("json", "jsonl"):
        write(tmp_path, rows, path.name)
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{kind}")(path)
    assert training_rows(str(path)).dataset.to_list() == rows


def test_a_line_of_a_text_file_is_a_row(tmp_path):
    rows = training_rows(write(tmp_path, "first\n\n  \nsecond\n", "book.txt"), chat=False)
    assert rows.dataset["text"][:] == ["first", "second"]


def test_columns_that_training_does_not_read_are_named(tmp_path):
    rows = training_rows(write(tmp_path, [{"instruction": "a", "output": "b", "answer": "c", "id": 7}]))
    assert rows.unused == ["answer", "id"]


def test_another_column_of_text_wins_where_it_is_asked_for(tmp_path):
    path = write(tmp_path, [{"body": "a", "prompt": "b", "completion": "c"}])
    assert training_rows(path, text_field="body").dataset.to_list() == [{"body": "a"}]


def test_a_folder_is_read_split_by_split(tmp_path):
    write(tmp_path, [{"text": str(i)} for i in range(10)], "part-1.jsonl")
    write(tmp_path, [{"text": str(i)} for i in range(10, 20)], "part-2.jsonl")
    write(tmp_path, [{"text": "x"}], "test.jsonl")
    (tmp_path / "README.md").touch()
    assert len(training_rows(str(tmp_path)).dataset) == 20
    assert training_rows(str(tmp_path), "test").dataset["text"][:] == ["x"]
    assert training_rows(str(tmp_path), "train[8:12]").dataset["text"][:] == ["8", "9", "10", "11"]
    assert len(training_rows(str(tmp_path), "train[90%:]").dataset) == 2


def test_columns_that_are_asked_for_are_kept(tmp_path):
    rows = training_rows(write(tmp_path, [{"question": "q", "answer": "a", "task_type": 1}]), keep=("task_type",))
    assert rows.dataset["task_type"][:] == [1]
    assert rows.unused == []


GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, {"prompt": "a", "id": 1}],
            "Row 2 of {path}: `completion` is missing (the row has: prompt, id). prompt and completion rows need `prompt` "
            "and `completion`: correct or remove the row.",
        ),
        (
            [GOOD, {**GOOD, "completion": 3}],
            "Row 2 of {path}: `completion` is 3, but must be text or a list of messages",
        ),
        (
            [GOOD, {"prompt": [USER], "completion": [ANSWER]}],
            "Row 2 of {path}: `prompt` is a list, unlike `prompt` of",
        ),
        (
            [{"messages": [USER, {"role": "assistant"}]}],
            "Row 1 of {path}: `messages` has a message 2 without `role` and",
        ),
        ([{"messages": [USER, ANSWER]}, {"messages": []}], "Row 2 of {path}: `messages` is an empty list"),
        ([{"messages": "hello"}], "`messages` is a text, but must be a list of messages"),
        ([{**GOOD, "completion": None}, GOOD], "Row 1 of {path}: `completion` is missing (the row has: prompt)"),
        ([{"promt": "a", "completion": "b"}], "in no format known here. `promt`: Did you mean 'prompt'? Rename them"),
        ([{"a": 1}], "have the columns a, which are in no format known here. Rename them to one of: `input_ids`"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "are preference pairs (`chosen`, `rejected`)"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, rows, message):
    path = write(tmp_path, rows)
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        training_rows(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n'),
        ("rows.csv", b"text\nw\xf6rld\n"),
        ("rows.txt", b"a\nw\xf6rld\n"),
    ],
)
def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not written in UTF-8: line 2 holds the byte 0xf[f6]\. Save it"):
        training_rows(str(tmp_path / name), "train", chat=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            '{"text": "a"}\n{"text": oops}\n',
            "cannot be read as json: line 2, column 10: Expecting value",
        ),
        ("rows.json", '[{"text": "a"},\n {"text" "b"}]', "cannot be read as json: line 2, column 10"),
        ("rows.csv", "a,b\n1\n2,3,4\n", "cannot be read as csv: Error tokenizing data"),
        ("rows.jsonl", "", "is empty. Give a file with at least one row"),
        ("rows.json", "[]", "has no rows"),
        ("rows.txt", "\n  \n", "has no rows"),
        ("rows.xml", "<a/>", "ends in '.xml', but data must end in one of .json, .jsonl, .csv, .parquet, .txt"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} {re.escape(message)}"):
        training_rows(str(path))


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("{folder}/row.jsonl", "train", "There is no file or folder '{folder}/row.jsonl'. Did you mean 'rows.jsonl'?"),
        ("{folder}/no/rows.jsonl", "train", "There is no folder '{folder}/no' either"),
        ("{folder}/rows.jsonl", "test", "`split` is 'test', but the single file {folder}/rows.jsonl is all 'train'"),
        ("{folder}/rows.jsonl", "train[5:2]", "The slice [5:2] of `split` leaves nothing of 1 rows"),
        ("{folder}/rows.jsonl", "train[:x]", "The slice [:x] of `split` cannot be read"),
        ("{folder}/rows.jsonl", "train[1]", "`split` is 'train[1]', but must be a name, or a name and a slice"),
        ("{folder}", "validation", "No file in '{folder}' has 'validation' in its name; it holds rows.jsonl"),
        ("{folder}/empty", "train", "The folder '{folder}/empty' holds no data"),
        ("no/body", "train", "'no/body' is no file or folder here, and cannot be loaded from the Hub either"),
    ],
)
def test_a_source_that_is_not_there_is_refused(tmp_path, source, split, message):
    write(tmp_path, [GOOD])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=re.escape(message.format(folder=tmp_path))):
        training_rows(source.format(folder=tmp_path), split)


def test_files_of_different_kinds_do_not_mix(tmp_path):
    write(tmp_path, [GOOD], "a.jsonl")
    write(tmp_path, [{"text": "a"}], "b.jsonl")
    with pytest.raises(ValueError, match=r"hold rows of different kinds \(plain text; prompt and completion\)"):
        training_rows(str(tmp_path))


def test_conversations_need_a_chat_template(tmp_path):
    path = write(tmp_path, [{"messages": [USER, ANSWER]}])
    with pytest.raises(
        ValueError, match=r"are conversations, but the tokenizer has no chat template .* `--chat_templ"
    ):
        training_rows(path, chat=False)


def test_a_column_to_keep_has_to_be_there_and_right(tmp_path):
    path = write(tmp_path, [{**GOOD, "task_type": 1}, {**GOOD, "task_type": 2}])
    with pytest.raises(ValueError, match=r"Row 2 of .*: `task_type` is 2, but must be 0 \(world knowledge\) or 1"):
        training_rows(path, keep=("task_type",))
    with pytest.raises(ValueError, match=r"have no `domain` \(they have prompt, completion, task_type\)"):
        training_rows(path, keep=("domain",))
    path = write(tmp_path, [GOOD], "untyped.jsonl")
    with pytest.raises(
        ValueError, match=r"have no `task_type` .* LoRAMoE's balance needs it: .* `--set balance=none`"
    ):
        training_rows(path, keep=("task_type",))


def test_a_domain_by_its_name_is_a_task_type(tmp_path):
    types = TaskTypes(2, "a place", "Add a column.", ["law", "code"])
    path = write(tmp_path, [{**GOOD, "domain": "code"}, {**GOOD, "domain": "law"}])
    rows = training_rows(path, keep=("task_type",), types=types)
    assert rows.dataset["task_type"][:] == [1, 0]
    assert rows.unused == []
    path = write(tmp_path, [{**GOOD, "domain": "code"}, {**GOOD, "domain": "art"}], "other.jsonl")
    with pytest.raises(
        ValueError, match=r"of the domain 'art', for which the adapter has no expert. .* 'law', 'code'"
    ):
        training_rows(path, keep=("task_type",), types=types)
    path = write(tmp_path, [GOOD], "none.jsonl")
    with pytest.raises(ValueError, match=r"have no `task_type` \(they have prompt, completion\). Add a column."):
        training_rows(path, keep=("task_type",), types=types)
