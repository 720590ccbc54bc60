"""Modelfiles: what the Go template writes is what the chat template writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import make_tokenizer
from tunesmith.data.named import fitted, templates
from tunesmith.export.ollama import modelfile, pieces_of

CONVERSATION = [
    {"role": "user", "content": "hi\n there"},
    {"role": "assistant", "content": "{{ .Content }} {x}"},
    {"role": "user", "content": "你好"},
]


def go(template: str, messages: list[dict[str, str]]) -> str:
    """A reader of the part of Go's templates that is used: text, if, else if, range, end, .Content."""
    tokens = re.split(r"\{\{ (.*?) \}\}", template)

    def block(at: int, message: dict[str, str], live: bool) -> tuple[str, int]:
        """What stands from token ``at`` to the ``end`` or ``else`` that closes it; and where that is."""
        out = ""
        while at < len(tokens):
            if at % 2 == 0:
                out += tokens[at] if live else ""
                at += 1
            elif tokens[at] == ".Content":
                out += message["content"] if live else ""
                at += 1
            elif tokens[at] == "range .Messages":
                parts = [block(at + 1, each, live) for each in messages]
                out += "".join(text for text, _ in parts)
                at = parts[0][1] + 1
            elif tokens[at].startswith("if "):
                done, test = False, tokens[at]
                while True:
                    holds = live and not done and true(test.removeprefix("if "), message)
                    text, at = block(at + 1, message, holds)
                    out, done = out + text, done or holds
                    if tokens[at] == "end":
                        break
                    test = tokens[at].removeprefix("else ")
                at += 1
            else:
                assert tokens[at] == "end" or tokens[at].startswith("else if "), tokens[at]
                return out, at
        return out, at

    def true(test: str, message: dict[str, str]) -> bool:
        if test == "not .System":
            return all(m["role"] != "system" for m in messages)
        found = re.fullmatch(r'eq \.Role "(\w+)"', test)
        assert found, test
        return message["role"] == found[1]

    return block(0, {}, True)[0]


def test_chatml_in_go(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text, complete = modelfile(tokenizer, [tokenizer.eos_token_id], {"temperature": 0.7})
    assert complete
    assert text == (
        'FROM .\n\nTEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n\nPARAMETER stop "<|im_end|>"\nPARAMETER temperature 0.7\n'
    )


def test_named_templates_in_go(tmp_path: Path) -> None:
    """Every named template is either said in Go, and then writes the same prompts, or left out."""
    tokenizer: Any = make_tokenizer(tmp_path)
    said = []
    for template in templates():
        tokenizer.chat_template = fitted(template, tokenizer)[0]
        pieces = pieces_of(tokenizer)
        if pieces is None:
            continue
        said.append(template.name)
        for messages in (CONVERSATION[:1], CONVERSATION, [{"role": "system", "content": "be\nkind"}, *CONVERSATION]):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert go(pieces.go(), messages) == expected, template.name
    assert {"chatml", "smollm2", "zephyr", "phi4"} <= set(said)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}{{ messages | length }}",
        "{% for m in messages %}{% if loop.last %}LAST{% endif %}{{ m['role'] + ':' + m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}",
        "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}",
    ],
    ids=["counts", "last", "changes", "refuses"],
)
def test_what_go_cannot_say_is_left_out(tmp_path: Path, template: str) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = template
    text, complete = modelfile(tokenizer, [], {})
    assert not complete
    assert "TEMPLATE" not in text
    assert "cannot be said" in text
