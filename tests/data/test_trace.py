"""Strings that remember their origin, the tracing environment, and the limits of the sandbox."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from jinja2 import TemplateError as JinjaError

from tunesmith.data import sandbox
from tunesmith.data.sandbox import PlainTemplate, RenderLimit
from tunesmith.data.trace import TracedStr, as_text, escape, join, trace
from tunesmith.data.tracer import TracedTemplate

TEXT = "Hello <b>\n  you & ME"


def messages(text: str = TEXT) -> list[dict[str, Any]]:
    return [{"role": "user", "content": trace(text, 0)}, {"role": "assistant", "content": trace("the answer\nis", 4)}]


def render(source: str, given: list[dict[str, Any]] | None = None) -> tuple[TracedStr, bool]:
    """The traced rendering, after a look that the plain one is the same."""
    given = messages() if given is None else given
    text, lost = TracedTemplate(source, None, {}).render(given, None, False)
    assert str.__str__(text) == PlainTemplate(source, None, {}).render(given, None, False)
    return text, lost


def covered(text: TracedStr, origin: int) -> str:
    return "".join(str.__getitem__(text, slice(s.start, s.end)) for s in text.spans if s.origin == origin)


def test_random_operations_keep_text_and_origin_of_every_character() -> None:
    rng = random.Random(1)
    letters = {0: "abcdef ", 4: "uvwxyz\n"}  # so that the letter tells the origin
    for _ in range(300):
        pieces = [TracedStr.of("".join(rng.choices(letters[o], k=rng.randint(1, 9))), o) for o in (0, 4, 0)]
        text = join("-", pieces)
        for _ in range(4):
            start, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
            text = rng.choice(
                [
                    lambda t, a=start, b=end: t[a:b],
                    lambda t, a=start: t[a:] + "#" + t[:a],
                    lambda t: t.strip(),
                    lambda t: t.replace("a", "QQ"),
                    lambda t: join("+", t.split()),
                    lambda t: t[::-1],
                    lambda t: join("", t.partition("-")),
                    lambda t: "!" + t.removeprefix("a").removesuffix("z"),
                ]
            )(text)
        for origin, alphabet in letters.items():
            assert set(covered(text, origin)) <= set(alphabet)
        owned = {i for span in text.spans for i in range(span.start, span.end)}
        assert all(str.__str__(text)[i] not in "bcdefuvwxy" for i in set(range(len(text))) - owned)


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | upper",
        "m.content | trim",
        "m.content | string",
        "m.content | indent(2)",
        "m.content | list | join",
        "m.content[::-1]",
        "m.content ~ ''",
        "'%s!' % m.content",
        "'{}'.format(m.content)",
        "m.content.split('\\n') | join('|')",
        "[m.content] | tojson",
        "{'a': {'b': [m.content]}} | tojson",
        "m.content | tojson | safe",
        "m.content | e",
        "'<' + (m.content | safe)",
    ],
)
def test_operations_of_templates_keep_the_trace(expression: str) -> None:
    text, lost = render("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    assert not lost
    for origin, words in ((0, ("hello", "you", "me")), (4, ("the", "answer", "is"))):
        found = covered(text, origin).lower()
        assert all(word in found or word[::-1] in found for word in words), (origin, found)
        assert not any(word in found for word in ("answer", "hello") if (word == "hello") != (origin == 0))


@pytest.mark.parametrize(
    "expression", ["m.content.center(30)", "m.content | wordwrap(5)", "m.content.swapcase()", "m.content | title"]
)
def test_an_operation_that_loses_the_trace_is_noticed(expression: str) -> None:
    _, lost = render("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    assert lost


def test_choosing_and_testing_is_no_loss() -> None:
    source = "{{ messages[0].get('name', 'none') }}{{ messages[0].x | default('d') }}{{ messages[0].content | length }}"
    assert not render(source)[1]


def test_json_of_several_origins_keeps_each() -> None:
    text, lost = render("{{ messages | tojson(sort_keys=true) }}", messages("the answer"))
    assert not lost
    assert covered(text, 0) == "the answer"
    assert covered(text, 4) == "the answer\\nis"


def test_what_python_writes_for_a_mapping_is_of_its_origin() -> None:
    text = as_text(trace({"a": [1, "b"]}, 3))
    assert isinstance(text, TracedStr)
    assert (text.spans[0].start, text.spans[0].end, text.spans[0].origin) == (0, len("{'a': [1, 'b']}"), 3)


def test_escaped_characters_stay_with_their_text() -> None:
    text = escape(join("", [TracedStr.of("a<b", 0), "<"]))
    assert str.__str__(text) == "a&lt;b&lt;"
    assert covered(text, 0) == "a&lt;b"


HUGE = [
    "{{ 'x' * 10**9 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ lipsum(n=1000000) }}",
    "{% set x = 'a' * 8000000 %}{{ x.replace('a', x) }}{{ x | replace('a', x) }}",
    "{% set x = 'a' * 8000000 %}{{ ([x] * 1000) | join(x) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
]
LONG = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
]


@pytest.mark.parametrize("source", HUGE)
def test_a_template_cannot_fill_the_memory(source: str) -> None:
    for template in (PlainTemplate, TracedTemplate):
        with pytest.raises(RenderLimit):
            template(source, None, {}).render(messages(), None, False)


@pytest.mark.parametrize("source", LONG)
def test_a_template_cannot_run_for_long(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    begun = time.monotonic()
    with pytest.raises(RenderLimit, match=r"longer|characters"):
        PlainTemplate(source, None, {}).render(messages(), None, False)
    assert time.monotonic() - begun < 1.5


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__ }}{{ raise_exception('no class') }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ messages.append(1) }}",
        "{{ dict.__subclasses__() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ range(10**9) }}",
    ],
)
def test_the_sandbox_holds_for_both_environments(source: str) -> None:
    for template in (PlainTemplate, TracedTemplate):
        with pytest.raises((JinjaError, OverflowError)):
            template(source, None, {}).render(messages(), None, False)
