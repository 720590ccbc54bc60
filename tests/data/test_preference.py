from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.preference import convert_feedback, convert_pair, convert_prompt
from tunesmith.data.problem import RowProblem
from tunesmith.data.sniff import settle
from tunesmith.errors import DataError
from tunesmith.types import Message, PreferencePair, Source

SOURCE = Source("d", "d.jsonl", 7, 7)
Q, A, B = Message("user", "q"), Message("assistant", "good"), Message("assistant", "bad")


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


USER, GOOD, BAD = turn("user", "q"), turn("assistant", "good"), turn("assistant", "bad")
EARLIER = [turn("user", "before"), turn("assistant", "then")]
PAIRS: list[dict[str, Any]] = [
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"instruction": "q", "output": ["good", "bad"]},
    {"conversations": [said("human", "q")], "chosen": said("gpt", "good"), "rejected": said("gpt", "bad")},
    {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    {"messages": [USER], "chosen": "good", "rejected": "bad"},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [said("human", "q"), said("gpt", "good")], "rejected": [said("human", "q"), said("gpt", "bad")]},
]


def found(row: dict[str, Any], target: Any) -> DatasetAttr:
    return settle(DatasetAttr(dataset_name="d", file_name="d.jsonl", formatting="auto"), [row], target)[0]


def pair(row: dict[str, Any], **values: Any) -> PreferencePair:
    return convert_pair(row, found(row, "pair").model_copy(update=values), SOURCE)


@pytest.mark.parametrize("row", PAIRS)
def test_every_style_of_pair_is_found_and_read(row: dict[str, Any]) -> None:
    assert pair(row) == PreferencePair((Q,), (A,), (B,), SOURCE)


def test_a_common_beginning_is_the_prompt() -> None:
    made = pair({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]})
    assert [m.content for m in made.prompt] == ["before", "then", "q"]
    same = pair({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, GOOD]})
    assert same.chosen == same.rejected == (A,)
    later = pair({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]})
    assert (len(later.prompt), len(later.chosen), len(later.rejected)) == (1, 3, 1)


def test_settings_reach_both_answers() -> None:
    row = {"prompt": "who", "chosen": "{{name}}", "rejected": "{{name}}?"}
    made = convert_pair(row, found(row, "pair").model_copy(update={"source_prefix": "> "}), SOURCE, "be kind", {"name": "Mel"})
    assert [m.content for m in (*made.prompt, *made.chosen, *made.rejected)] == ["be kind", "> who", "Mel", "Mel?"]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": ""}, "empty-answer"),
        ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "not-text"),
        ({"prompt": "q", "chosen": "good"}, "missing-column"),
        ({"prompt": " ", "chosen": "good", "rejected": "bad"}, "empty-prompt"),
        ({"messages": [USER], "chosen": USER, "rejected": BAD}, "bad-answer"),
        ({"messages": [USER], "chosen": GOOD, "rejected": [BAD, USER]}, "bad-answer"),
        ({"chosen": [USER, GOOD], "rejected": [turn("user", "other"), BAD]}, "no-common-prompt"),
        ({"chosen": [USER], "rejected": [USER]}, "no-common-prompt"),
        ({"messages": [USER], "chosen": {**GOOD, "loss": 0}, "rejected": BAD}, "no-answer"),
        ({"messages": [USER], "chosen": [GOOD, USER, {**GOOD, "loss": 0.5}], "rejected": BAD}, "weight"),
    ],
)
def test_pairs_that_are_none(row: dict[str, Any], code: str) -> None:
    attr = found({**row, "rejected": row.get("rejected", "bad")}, "pair")
    with pytest.raises(RowProblem) as caught:
        convert_pair(row, attr, SOURCE)
    assert caught.value.code == code
    assert "the the" not in caught.value.message


def test_two_answers_in_one_column() -> None:
    attr = DatasetAttr(dataset_name="d", ranking=True)
    for value, words in ((["a"], "a list of 1"), ("a", "is text"), (["a", "b", "c"], "a list of 3")):
        with pytest.raises(RowProblem, match=words):
            convert_pair({"instruction": "q", "output": value}, attr, SOURCE)


@pytest.mark.parametrize("verdict", [True, False, 1, 0, "true", "False", "1", "0"])
def test_feedback(verdict: Any) -> None:
    for row in ({"messages": [USER, GOOD], "label": verdict}, {"prompt": "q", "completion": "good", "label": verdict},
                {"prompt": [USER], "completion": [GOOD], "label": verdict}):  # fmt: skip
        made = convert_feedback(row, found(row, "feedback"), SOURCE)
        assert (made.messages, made.desirable) == ((Q, A), verdict in (True, "true", "1"))


@pytest.mark.parametrize("verdict", ["yes", None, 2, 0.5, []])
def test_verdicts_that_are_none(verdict: Any) -> None:
    attr = found({"messages": [USER, GOOD], "label": True}, "feedback")
    with pytest.raises(RowProblem, match="expected true or false"):
        convert_feedback({"messages": [USER, GOOD], "label": verdict}, attr, SOURCE)
    with pytest.raises(RowProblem, match=r"has the weight 0\.5, expected 1"):
        convert_feedback({"messages": [USER, {**GOOD, "loss": 0.5}], "label": True}, attr, SOURCE)
    with pytest.raises(RowProblem, match="by the user"):
        convert_feedback({"messages": [USER, GOOD, USER], "label": True}, attr, SOURCE)


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"instruction": "q"}, ""),
        ({"instruction": "q", "output": "good"}, "good"),
        ({"prompt": "q", "completion": ""}, ""),
        ({"messages": [USER]}, ""),
        ({"messages": [USER, GOOD]}, "good"),
        ({"prompt": [USER]}, ""),
        ({"prompt": [USER], "completion": [GOOD]}, "good"),
    ],
)
def test_prompts(row: dict[str, Any], reference: str) -> None:
    made = convert_prompt(row, found(row, "prompt"), SOURCE)
    assert (made.messages, made.reference) == ((Q,), reference)


def test_pairs_serve_as_prompts() -> None:
    row = PAIRS[3]
    made = convert_prompt(row, found(row, "pair"), SOURCE)
    assert (made.messages, made.reference) == ((Q,), "good")
    with pytest.raises(RowProblem, match="no turn by the user"):
        convert_prompt({"messages": [GOOD]}, found({"messages": [GOOD]}, "prompt"), SOURCE)


@pytest.mark.parametrize(
    ("values", "target", "words"),
    [
        ({}, "pair", "ranking: true"),
        ({}, "feedback", "kto_tag"),
        ({"ranking": True, "chosen_column": "chosen", "rejected_column": "rejected"}, "conversation", "preference pairs"),
        ({"kto_tag_column": "label"}, "conversation", "bad answers too"),
    ],
)
def test_rows_for_another_stage_are_refused(values: dict[str, Any], target: Any, words: str) -> None:
    row = {"instruction": "q", "output": "a", "chosen": "good", "rejected": "bad", "label": True}
    with pytest.raises(DataError, match=words):
        settle(DatasetAttr(dataset_name="d", **values), [row], target)


@pytest.mark.parametrize(
    ("row", "target", "words"),
    [
        (PAIRS[1], "conversation", "preference pairs"),
        ({"messages": [USER, GOOD]}, "pair", "dialogues, which stage sft takes"),
        ({"text": "t"}, "feedback", "plain text"),
        ({"messages": [USER, GOOD]}, "document", "dialogues"),
    ],
)
def test_undeclared_rows_for_another_stage_are_named(row: dict[str, Any], target: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        found(row, target)


def test_a_wrong_declaration_of_pairs_names_the_entry_that_fits() -> None:
    declared = DatasetAttr(dataset_name="d", ranking=True, chosen_column="good", rejected_column="bad")
    with pytest.raises(DataError, match=r'"messages": "conversations", .*"ranking": true'):
        settle(declared, [PAIRS[3]], "pair")
