"""Preference pairs: sorted by what they were judged for, and what is amiss is told with its row."""

import json
import re

import pytest


datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()

from moe_peft.preferences import preferences  # noqa: E402


def row(label, chosen="yes", rejected="no", **more):
    return {"prompt": "?", "chosen": chosen, "rejected": rejected, "capability": label, "extra": 1, **more}


GOOD = [row("kind"), row(None), row("brief"), row("kind", "a"), row("", "b")]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def to(rows):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        return str(tmp_path / "pairs.jsonl")

    return to


def test_pairs_are_sorted_by_what_they_were_judged_for(write):
    found = preferences(write(GOOD), capabilities=["kind", "brief"])
    assert list(found.by_capability) == ["kind", "brief"]
    assert found.by_capability["kind"]["chosen"] == ["yes", "a"]
    assert found.overall["chosen"] == ["yes", "b"]
    assert found.overall.column_names == ["prompt", "chosen", "rejected"]
    assert len(preferences(write(GOOD), "train[:3]").by_capability["kind"]) == 1


def test_a_category_goes_along_with_what_was_judged_as_a_whole(write):
    rows = [one | {"category": "chat" if not one["capability"] else None} for one in GOOD]
    found = preferences(write(rows), categories=["chat", "facts"])
    assert found.overall["category"] == ["chat", "chat"]
    assert "category" not in found.by_capability["kind"].column_names


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"chosen": "a", "rejected": "b", "capabilty": "x"}], {}, "have no `capability` (they have chosen, rejected, capabilty). "
         "Did you mean 'capabilty'?"),
        ([*GOOD, row("kind", "x", "x")], {}, "Row 6 of {}: `chosen` and `rejected` are the same, which prefers nothing."),
        ([*GOOD, row("kind", "", "x")], {}, "Row 6 of {}: `chosen` is empty. Correct or remove the row."),
        (GOOD, {"capabilities": ["kind", "brie"]}, "Row 3 of {}: `capability` is 'brief', but must be one of 'kind', 'brie'. Did"),
        (GOOD, {"capabilities": ["kind", "brief", "true"]}, "`capability` is 'true', but must be the label of at least one pair"),
        (GOOD[:2], {}, "`capability` is ['kind'], but must be at least two different labels. One capability needs no fusion."),
        ([GOOD[0], GOOD[2]], {}, "were judged for a capability. Add pairs with an empty `capability`"),
        (GOOD, {"categories": ["chat"]}, "have no `category`"),
        ([one | {"category": "chit"} for one in GOOD], {"categories": ["chat"]}, "Row 2 of {}: `category` is 'chit', but must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_refused(rows, settings, message, write):
    path = write(rows)
    with pytest.raises(ValueError, match=re.escape(message.format(path))):
        preferences(path, **settings)
