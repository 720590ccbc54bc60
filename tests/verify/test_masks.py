from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import CHATML, SHARED, tunesmith
from tunesmith.data.named import fitted, templates
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.tokenize import TextEncoder, Tokens
from tunesmith.verify.examiner import MARKS_NO_END, MARKS_PROMPT, _runs, _Wrong
from tunesmith.verify.masks import check_template, verify_masks
from tunesmith.verify.outcome import totals

PROMPT = "{{ '<|im_start|>assistant\n' }}"
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m['content'] }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|><|im_end|>' + m['content'] + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|><|im_start|>' }}{% endif %}"
)
"""The prompt for a reply opens a thought, and the text closes one where nothing was thought: neither begins the other."""
HEADER_MARKED = MARKED.replace(PROMPT + "{% generation %}", "{% generation %}" + PROMPT, 1)
END_NOT_MARKED = MARKED.replace("{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}")


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.mark.parametrize(
    ("source", "difference"), [(CHATML, ()), (MARKED, ()), (HEADER_MARKED, (MARKS_PROMPT,)), (END_NOT_MARKED, (MARKS_NO_END,))]
)
def test_right_masks_are_certified(tokenizer: PreTrainedTokenizerBase, source: str, difference: tuple[str, ...]) -> None:
    judged = check_template(tokenizer, source, 8, "a")
    certified = [row for row in judged if row.outcome == "certified"]
    assert len(certified) >= 5
    assert all(row.turns == row.exact > 0 for row in certified)
    assert {row.differences for row in certified} == {difference}
    assert {row.outcome for row in judged} <= {"certified", "refused"}  # tool calls, which these do not show


def test_every_named_template_is_certified(tokenizer: PreTrainedTokenizerBase) -> None:
    for template in templates():
        judged = check_template(tokenizer, fitted(template, tokenizer)[0], 2, template.name)
        assert [row.outcome for row in judged] == ["certified"] * 2, (template.name, judged)
        assert all(row.exact == row.turns for row in judged), template.name


# ---- the verifier can fail


def _encode_shifted(shift: Callable[[tuple[int, int]], tuple[int, int]]) -> Callable[..., list[Tokens]]:
    right = TextEncoder.encode

    def encode(self: TextEncoder, texts: Sequence[Any]) -> list[Tokens]:
        return [made._replace(spans=tuple(shift(span) for span in made.spans)) for made in right(self, texts)]

    return encode


def _views_changed(change: Callable[[Rendered], Rendered]) -> Callable[..., list[Rendered]]:
    right = ChatTemplate.views
    return lambda self, messages, tools=(): [change(view) for view in right(self, messages, tools)]


def _without_last(view: Rendered) -> Rendered:
    return replace(view, turns=view.turns[:-1])


def _with_question(view: Rendered) -> Rendered:
    first = view.turns[0]
    return replace(view, turns=(replace(first, start=view.text.index("<|im_start|>user")), *view.turns[1:]))


def _other_text(view: Rendered) -> Rendered:
    return replace(view, text=view.text + "\n")


@pytest.mark.parametrize(
    ("owner", "name", "broken", "reason"),
    [
        (TextEncoder, "encode", _encode_shifted(lambda span: (span[0] - 1, span[1])), "begins at character"),
        (TextEncoder, "encode", _encode_shifted(lambda span: (span[0] + 1, span[1])), ""),
        (TextEncoder, "encode", _encode_shifted(lambda span: (span[0], span[1] - 1)), "ends with"),
        (ChatTemplate, "views", _views_changed(_without_last), "is not learned"),
        (ChatTemplate, "views", _views_changed(_with_question), "messages"),
        (ChatTemplate, "views", _views_changed(_other_text), "not what transformers renders"),
    ],
)
def test_wrong_masks_are_found(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any, reason: str
) -> None:
    monkeypatch.setattr(owner, name, broken)
    judged = [row for row in check_template(tokenizer, CHATML, 5, "b") if row.outcome != "refused"]
    assert {row.outcome for row in judged} == {"wrong"}
    assert all(reason in row.reason for row in judged)


def test_the_first_token_is_missed_where_the_text_leaves_the_prompt_within_one(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = {row.outcome for row in check_template(tokenizer, THINKS, 5, "b")}
    assert outcomes == {"certified", "refused"}
    monkeypatch.setattr(TextEncoder, "encode", _encode_shifted(lambda span: (span[0] + 1, span[1])))
    assert {row.outcome for row in check_template(tokenizer, THINKS, 5, "b")} == {"wrong", "refused"}


def test_a_token_without_a_character_is_missed() -> None:
    with pytest.raises(_Wrong, match="the first is not learned"):
        _runs([0, 3, 3, 5], [False, False, True])
    assert _runs([0, 3, 3, 5], [False, True, True]) == [(3, 5)]


def test_the_command_counts_and_ends_with_1_when_wrong(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    arguments = ("verify", "masks", "--model", tiny_model, "--templates", tmp_path, "--conversations", 4, "--seed", 1)
    told = tunesmith(*arguments).stdout
    assert "chatml" in told and "1 templates: 3 conversations certified, 1 refused, 0 wrong" in told
    assert "does not show tool calls" in told
    monkeypatch.setattr(ChatTemplate, "views", _views_changed(_without_last))
    done = tunesmith(*arguments, "--json", check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert found["totals"]["wrong"] == len(found["templates"][0]["wrong_rows"]) == 3
    assert tunesmith("verify", "masks", "--model", tiny_model, "--templates", tmp_path / "none", check=False).returncode == 2


def test_files_that_are_no_templates_are_refused_one_by_one(tiny_model: Path, tmp_path: Path) -> None:
    files = {"latin": b"{{ '\xe9' }}", "deep": b"{{" + b"(" * 3000 + b"1" + b")" * 3000 + b"}}", "broken": b"{{ m }",
             "long": b"a" * (1 << 20) + b"a"}  # fmt: skip
    for name, source in files.items():
        (tmp_path / f"{name}.jinja").write_bytes(source)
    (tmp_path / "folder.jinja").mkdir()
    arguments = ("verify", "masks", "--model", tiny_model, "--templates", tmp_path, "--conversations", 2)
    done = tunesmith(*arguments, check=False)
    assert done.returncode == 1  # nothing was proved
    reasons = ("is nested too deeply", "is not UTF-8 (byte 4)", "unexpected '}'", "a template has at most", "no such file")
    assert all(reason in done.stdout for reason in reasons), done.stdout
    (tmp_path / "good.jinja").write_text(CHATML, encoding="utf-8")
    done = tunesmith(*arguments, check=False)
    assert done.returncode == 0 and "6 templates: 2 conversations certified, 10 refused, 0 wrong" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_mask_of_real_templates_is_wrong() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data folder {SHARED}, which is absent")
    results = verify_masks("builtin:smollm2-135m", SHARED / "templates", 8, 0)
    results += verify_masks("builtin:smollm2-135m", None, 4, 0)
    results += verify_masks(str(SHARED / "models" / "stories260K"), None, 4, 0)
    total = totals(results)
    assert total["wrong"] == 0, [(result.name, result.reason("wrong")) for result in results if result.count("wrong")]
    assert total["certified"] > 3 * total["refused"] > 0
