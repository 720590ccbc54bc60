from __future__ import annotations

import contextlib
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import CHATML, SHARED
from tunesmith.data.template import ChatTemplate, Encoded, Rendered
from tunesmith.errors import TemplateError
from tunesmith.types import Message, ToolCall

DIALOGUE = [
    Message("system", "rain"),
    Message("user", "the cat 你好"),
    Message("assistant", "  sat on a mat 🙂 "),
    Message("user", "and\n<b>"),
    Message("assistant", "one\n\nred bird"),
]
LOOK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALLS = [
    Message("user", "Weather?"),
    Message("assistant", "", reasoning="Ask.", tool_calls=(ToolCall("look_up", {"place": "Oslo", "days": 3}, "abcdefghi"),)),
    Message("tool", "rain", name="look_up", tool_call_id="abcdefghi"),
    Message("assistant", "It rains."),
]
REPLIES = [Message("user", "a?"), Message("assistant", "A."), Message("user", "b?"), Message("assistant", "B.")]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(tokenizer)


def real(tokenizer: PreTrainedTokenizerBase, name: str, **options: Any) -> ChatTemplate:
    """A template of the shared folder, with the special tokens that it writes."""
    path = SHARED / "templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is absent")
    source = path.read_text(encoding="utf-8")
    tokens = sorted(set(re.findall(r"<[|｜][^|｜<>\s]{1,40}[|｜]>", source)))
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return ChatTemplate(tokenizer, "2026-01-02", source, options)


def pieces(rendered: Rendered) -> list[str]:
    return [rendered.text[turn.start : turn.end] for turn in rendered.turns]


def learned(template: ChatTemplate, encoded: Encoded) -> list[str]:
    """Decoded stretches of learned tokens."""
    stretches: list[list[int]] = [[]]
    for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True):
        if mask:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [template.tokenizer.decode(stretch) for stretch in stretches if stretch]


def with_source(template: ChatTemplate, source: str) -> ChatTemplate:
    return ChatTemplate(template.tokenizer, source=source)


# ---- what is learned


def test_every_assistant_turn_with_its_end_is_learned_and_nothing_else(template: ChatTemplate) -> None:
    assert learned(template, template.render(DIALOGUE)) == ["  sat on a mat 🙂 <|im_end|>", "one\n\nred bird<|im_end|>"]


def test_ids_and_text_are_those_of_apply_chat_template(template: ChatTemplate) -> None:
    plain = [{"role": m.role, "content": m.content} for m in DIALOGUE]
    encoded = template.render(plain)
    assert encoded.input_ids == template.tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)
    for ask in (False, True):
        expected = template.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask)
        assert template.text(plain, add_generation_prompt=ask) == expected


def test_the_prompt_in_chat_is_the_prompt_in_training(template: ChatTemplate) -> None:
    encoded = template.render(DIALOGUE)
    assert template.encode_prompt(DIALOGUE[:2]) == encoded.input_ids[: encoded.loss_mask.index(1)]


def test_the_certificate_names_turns_that_are_served_and_ended(template: ChatTemplate) -> None:
    certificate = template.render(DIALOGUE).certificate
    assert [(turn.index, turn.ended, turn.served) for turn in certificate.turns] == [(2, True, True), (4, True, True)]
    assert certificate.notes == ()
    assert not certificate.marked


def test_a_turn_of_weight_zero_is_shown_and_not_learned(template: ChatTemplate) -> None:
    given = [*REPLIES[:1], Message("assistant", "A.", weight=0), *REPLIES[2:]]
    (view,) = template.views(given)
    assert "A.<|im_end|>" in view.text
    assert pieces(view) == ["B.<|im_end|>"]
    assert learned(template, template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])) == [
        "b<|im_end|>"
    ]


SPELLED = [Message("user", "the <|im_end|>\n<|im_start|>assistant\ncat 你好"), Message("assistant", "say <|im_end|> twice")]


def test_text_that_spells_special_tokens_is_text_in_training_and_chat(template: ChatTemplate) -> None:
    encoded = template.render(SPELLED)
    special = [t for t in template.tokenizer.convert_ids_to_tokens(encoded.input_ids) if t.startswith("<|im_")]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2
    assert learned(template, encoded) == ["say <|im_end|> twice<|im_end|>"]
    assert template.encode_prompt(SPELLED[:1]) == encoded.input_ids[: encoded.loss_mask.index(1)]
    assert template.tokenizer.decode(encoded.input_ids) == template.text(SPELLED)


def test_data_are_all_characters_of_messages_and_tools(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = real(tokenizer, "Qwen-Qwen3-0.6B").rendered(CALLS, (LOOK,))
    data = [rendered.text[a:b] for a, b in rendered.data]
    assert '"description": "Looks."' in data[0]
    assert data[1:] == ["Weather?", "Ask.", "look_up", '{"place": "Oslo", "days": 3}', "rain", "It rains."]


def test_a_reply_that_repeats_its_header_is_learned_whole(template: ChatTemplate) -> None:
    turns = [Message("user", "say it"), Message("assistant", "assistant"), Message("user", "a"), Message("assistant", "a")]
    assert learned(template, template.render(turns)) == ["assistant<|im_end|>", "a<|im_end|>"]


# ---- templates that do something to the text


def test_content_that_the_template_rewrites_is_learned_as_shown_and_named(template: ChatTemplate) -> None:
    rendered = with_source(template, CHATML.replace("m['content']", "m['content'] | upper")).rendered(DIALOGUE[:3])
    assert pieces(rendered) == ["  SAT ON A MAT 🙂 <|im_end|>"]
    assert "rewrites" in rendered.notes[0]


@pytest.mark.parametrize("change", ["m['content'] | wordwrap(9)", "m['content'].swapcase()", "m['content'].zfill(9)"])
def test_where_the_origin_is_lost_turns_are_found_by_comparing_renderings(template: ChatTemplate, change: str) -> None:
    turns = [
        Message("user", "abcdefghij"),
        Message("assistant", "klmnopqrst"),
        Message("user", "xy"),
        Message("assistant", "z"),
    ]
    rendered = with_source(template, CHATML.replace("m['content']", change)).rendered(turns)
    shown = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", rendered.text, re.DOTALL)
    assert pieces(rendered) == shown
    assert any("comparing renderings" in note for note in rendered.notes)


def test_a_turn_that_the_template_leaves_out_is_refused(template: ChatTemplate) -> None:
    changed = with_source(template, CHATML.replace("for m in messages", "for m in messages[-1:]"))
    with pytest.raises(TemplateError, match="leaves out turn 3"):
        changed.rendered(DIALOGUE)


def test_tool_calls_that_the_template_does_not_show_are_refused(template: ChatTemplate) -> None:
    with pytest.raises(TemplateError, match="does not show tool calls"):
        template.rendered(CALLS[:2], (LOOK,))


def test_turns_mixed_with_others_are_refused(template: ChatTemplate) -> None:
    source = "{{ messages[1].content[:1] }}{{ messages[0].content }}{{ messages[1].content[1:] }}<|im_end|>"
    with pytest.raises(TemplateError, match="mixes the text of other messages into turn 2"):
        with_source(template, source).rendered(REPLIES[:2])


def test_a_template_without_end_of_turn_is_refused(template: ChatTemplate) -> None:
    changed = with_source(template, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(TemplateError, match="never learn to stop"):
        changed.rendered(DIALOGUE)


def test_an_end_that_only_the_last_turn_has_is_learned_where_a_turn_is_last(template: ChatTemplate) -> None:
    source = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<|im_end|>"
    changed = with_source(template, source)
    rendered = changed.rendered(REPLIES)
    assert pieces(rendered)[1] == "B.\n<|im_end|>"
    assert "B" not in pieces(rendered)[0] and "b" not in pieces(rendered)[0]
    assert [pieces(view) for view in changed.views(REPLIES)] == [["A.\n<|im_end|>"], ["B.\n<|im_end|>"]]


def test_a_template_that_prompts_unasked_does_not_teach_the_prompt(template: ChatTemplate) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\\n' }}"
    assert pieces(with_source(template, source).rendered(REPLIES)) == ["A.<|im_end|>", "B.<|im_end|>"]


def test_arguments_are_given_as_text_where_the_template_joins_them(template: ChatTemplate) -> None:
    source = CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls[0].function.arguments + '!' if m.tool_calls else '') +"
    )
    rendered = with_source(template, source).rendered(CALLS[:2])
    assert pieces(rendered) == ['{"place": "Oslo", "days": 3}!<|im_end|>']
    assert any("as JSON text" in note for note in rendered.notes)


def test_content_is_given_as_parts_where_the_template_reads_parts(template: ChatTemplate) -> None:
    source = CHATML.replace("m['content'] +", "m['content'][0]['text'] +")
    assert pieces(with_source(template, source).rendered(REPLIES)) == ["A.<|im_end|>", "B.<|im_end|>"]


def test_options_reach_the_template(template: ChatTemplate) -> None:
    source = CHATML + "{% if add_generation_prompt and not enable_thinking %}<think></think>{% endif %}"
    asked = [Message("user", "a")]
    assert (
        ChatTemplate(template.tokenizer, source=source, options={"enable_thinking": True})
        .text(asked, add_generation_prompt=True)
        .endswith("assistant\n")
    )
    off = ChatTemplate(template.tokenizer, source=source, options={"enable_thinking": False})
    assert off.text(asked, add_generation_prompt=True).endswith("<think></think>")


# ---- marks


def test_generation_marks_are_followed_to_the_letter(template: ChatTemplate) -> None:
    source = (
        "{% for m in messages %}{{ m['role'] }}:{% generation %}{{ m['content'] }}!{% endgeneration %}<|im_end|>{% endfor %}"
    )
    rendered = with_source(template, source).rendered(DIALOGUE[1:3])
    assert pieces(rendered) == ["the cat 你好!", "  sat on a mat 🙂 !"]
    assert len(rendered.marked) == 2


def test_marks_removed_the_derived_turns_are_the_marked_ones(template: ChatTemplate) -> None:
    marked = CHATML.replace(
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert "generation %}" in marked
    plain = re.sub(r"\{% (end)?generation %\}", "", marked)
    one, other = (with_source(template, source).rendered(DIALOGUE) for source in (marked, plain))
    assert one.text == other.text
    assert pieces(one) == pieces(other) == ["  sat on a mat 🙂 <|im_end|>", "one\n\nred bird<|im_end|>"]


def test_marks_that_leave_out_a_turn_are_refused(template: ChatTemplate) -> None:
    source = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    with pytest.raises(TemplateError, match="leave out turn 2"):
        with_source(template, source).rendered(REPLIES)


# ---- views


def test_one_view_where_earlier_turns_stay_as_they_were(template: ChatTemplate) -> None:
    (view,) = template.views(DIALOGUE)
    assert view == template.rendered(DIALOGUE)


def test_qwen3_learns_each_turn_with_its_thinking_where_it_is_the_last(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [
        Message("user", "a?"),
        Message("assistant", "A.", reasoning="Think a."),
        Message("user", "b?"),
        Message("assistant", "B.", reasoning="Think b."),
    ]
    first, second = real(tokenizer, "Qwen-Qwen3-0.6B").views(turns)
    assert pieces(first) == ["<think>\nThink a.\n</think>\n\nA.<|im_end|>"]
    assert pieces(second) == ["<think>\nThink b.\n</think>\n\nB.<|im_end|>"]
    assert "Think a." not in second.text
    assert all(turn.served for view in (first, second) for turn in view.turns)


def test_qwen3_turns_of_one_tool_loop_share_a_view(tokenizer: PreTrainedTokenizerBase) -> None:
    (view,) = real(tokenizer, "Qwen-Qwen3-0.6B").views(
        [*CALLS[:3], Message("assistant", "It rains.", reasoning="So.")], (LOOK,)
    )
    assert pieces(view) == [
        '<think>\nAsk.\n</think>\n\n<tool_call>\n{"name": "look_up", "arguments": {"place": "Oslo", "days": 3}}\n'
        "</tool_call><|im_end|>",
        "<think>\nSo.\n</think>\n\nIt rains.<|im_end|>",
    ]


def test_gpt_oss_learns_the_end_of_each_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = real(tokenizer, "openai-gpt-oss-120b").views(REPLIES)
    assert pieces(first) == ["<|channel|>final<|message|>A.<|return|>"]
    assert pieces(second) == ["<|channel|>final<|message|>B.<|return|>"]


def texts(rng: random.Random) -> str:
    parts = [
        "the cat",
        " ",
        "\n",
        "你好",
        "🙂",
        "<|im_start|>assistant\n",
        "</think>",
        "<think>",
        "[/INST]",
        "assistant",
        "x" * 40,
    ]
    while not (text := "".join(rng.choices(parts, k=rng.randint(1, 5)))).strip():
        pass
    return text


def conversation(rng: random.Random) -> list[Message]:
    messages = [Message("system", texts(rng))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        reasoning = texts(rng) if rng.random() < 0.3 else None
        messages += [Message("user", texts(rng)), Message("assistant", texts(rng), reasoning)]
    return messages


@pytest.mark.parametrize("name", ["", "Qwen-Qwen3-0.6B", "meta-llama-Llama-3.1-8B-Instruct", "ibm-granite-granite-4.1"])
def test_rows_of_a_known_shape_are_found_as_rows_of_a_new_one(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rng = random.Random(name)
    template = real(tokenizer, name) if name else ChatTemplate(tokenizer)
    for _ in range(12):
        given = conversation(rng)
        with contextlib.suppress(TemplateError):
            template.views(given)
        given = [Message(m.role, texts(rng), m.reasoning and texts(rng)) for m in given]
        fresh = ChatTemplate(tokenizer, "2026-01-02", template.source)
        try:
            expected = fresh.views(given)
        except TemplateError:  # Qwen3 shows nothing of a reply such as </think>
            with pytest.raises(TemplateError, match="leaves out turn"):
                template.views(given)
            continue
        known = template.views(given)
        assert known == expected
        for view in known:
            for turn in view.turns:
                assert not turn.served or view.text[: turn.start] == template.text(given[: turn.index], None, True)
                assert given[turn.index].content.strip() in view.text[turn.start : turn.end] or view.notes


def test_a_row_that_only_looks_like_a_known_shape_is_traced(template: ChatTemplate) -> None:
    source = CHATML.replace("m['content'] +", "('<think></think>' if 'deep' in m['content'] else '') + m['content'] +")
    changed = with_source(template, source)
    changed.views(REPLIES)
    (view,) = changed.views([*REPLIES[:3], Message("assistant", "deep")])
    assert pieces(view) == ["A.<|im_end|>", "<think></think>deep<|im_end|>"]


def test_a_prompt_that_depends_on_the_row_is_noticed(template: ChatTemplate) -> None:
    source = CHATML + "{% if add_generation_prompt and 'deep' in messages[-1].content %}<think>{% endif %}"
    changed = with_source(template, source)
    assert changed.views(REPLIES[:2])[0].turns[0].served
    (view,) = changed.views([Message("user", "deep"), REPLIES[1]])
    assert not view.turns[0].served
    assert any("not what serving prompts" in note for note in view.notes)


@pytest.mark.slow
def test_time_grows_with_the_length_of_a_conversation(template: ChatTemplate) -> None:
    def seconds(turns: int) -> float:
        given = REPLIES[:2] * turns
        best = float("inf")
        for _ in range(3):
            fresh = ChatTemplate(template.tokenizer)
            fresh.views(REPLIES)
            begun = time.perf_counter()
            assert len(fresh.views(given)[0].turns) == turns
            best = min(best, time.perf_counter() - begun)
        return best

    assert seconds(400) < 3 * seconds(200)


@pytest.mark.slow
def test_rows_of_a_known_shape_are_fast(template: ChatTemplate) -> None:
    template.views(REPLIES[:2])
    begun = time.perf_counter()
    for number in range(5000):
        template.views([Message("user", f"What is {number}?"), Message("assistant", f"It is {number}.")])
    assert 5000 / (time.perf_counter() - begun) > 5000  # rows a second; several times that on an idle core


# ---- refusals


def test_what_the_template_refuses_is_said(template: ChatTemplate) -> None:
    changed = with_source(template, "{{ raise_exception('only user and assistant') }}")
    with pytest.raises(TemplateError, match="only user and assistant"):
        changed.text(DIALOGUE)


def test_a_template_without_end_cannot_run_forever(template: ChatTemplate) -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(TemplateError, match="characters"):
        with_source(template, source).text(DIALOGUE)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "robot", "content": "x"}, "role 'robot'"),
        ({"role": "user", "content": 3}, "content is a int"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "part of type 'image_url'"),
        ({"role": "user", "content": "x", "audio": "y"}, "key 'audio'"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "no JSON"),
        ({"role": "assistant", "content": "x", "weight": -1}, "weight is -1"),
    ],
)
def test_a_mapping_that_is_no_message_is_named(template: ChatTemplate, message: dict[str, Any], reason: str) -> None:
    with pytest.raises(TemplateError, match=f"message 2.*{re.escape(reason)}"):
        template.render([{"role": "user", "content": "hi"}, message])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ (messages | attr('__class__')).mro() }}",
    ],
)
def test_m5_templates_run_in_a_sandbox(
    template: ChatTemplate, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    changed = with_source(template, attack)
    for render in (changed.text, changed.rendered):
        try:
            result = render(DIALOGUE)
            text = result if isinstance(result, str) else result.text
        except TemplateError:
            text = ""
        assert "type" not in text
        assert "os" not in text
    assert not (tmp_path / "CANARY").exists()


def test_no_template_is_an_error(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        ChatTemplate(tokenizer)


# ---- real templates: file -> the text that ends a turn

ENDINGS = {
    "Bielik-11B-v3.0-Instruct": "<|im_end|>",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "<｜end▁of▁sentence｜>",
    "ibm-granite-granite-4.1": "<|end_of_text|>",
    "Kimi-K3": "<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>",
    "meta-llama-Llama-3.3-70B-Instruct": "<|eot_id|>",
    "Qwen-Qwen3-0.6B": "<|im_end|>",
    "Qwen-QwQ-32B": "<|im_end|>",
    "upstage-Solar-Open-100B": "<|end|>",
}


@pytest.mark.parametrize("name", sorted(ENDINGS))
def test_real_templates_are_learned_turn_by_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    turns = [
        Message("user", "Hello there"),
        Message("assistant", "Sure. 🙂"),
        Message("user", "more?"),
        Message("assistant", "final"),
    ]
    found = pieces(real(tokenizer, name).rendered(turns))
    assert len(found) == 2
    for piece, content in zip(found, ("Sure. 🙂", "final"), strict=True):
        assert piece.endswith(content + ENDINGS[name])
        assert "more?" not in piece
        assert "Hello" not in piece


TOOL_TURNS = {
    "meta-llama-Llama-3.1-8B-Instruct": '{"name": "look_up", "parameters": {"place": "Oslo", "days": 3}}<|eot_id|>',
    "deepseek-ai-DeepSeek-V3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look_up<｜tool▁sep｜>"
    '{"place": "Oslo", "days": 3}<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
    "ibm-granite-granite-4.1": '<tool_call>\n{"name": "look_up", "arguments": {"place": "Oslo", "days": 3}}\n'
    "</tool_call><|end_of_text|>",
    "openai-gpt-oss-120b": ' to=functions.look_up<|channel|>commentary json<|message|>{"place": "Oslo", "days": 3}<|call|>',
}


@pytest.mark.parametrize("name", sorted(TOOL_TURNS))
def test_a_tool_call_is_learned_as_the_template_writes_it(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = real(tokenizer, name)
    call = Message("assistant", "", tool_calls=CALLS[1].tool_calls)
    (view,) = template.views([CALLS[0], call, *CALLS[2:]], (LOOK,))
    assert pieces(view)[0] == TOOL_TURNS[name]
    assert "It rains." in pieces(view)[1]
    assert "rain<" not in "".join(pieces(view))
    assert all(turn.served and turn.ended for turn in view.turns)


def test_end_ids_hold_what_ends_an_answer_and_a_call(tokenizer: PreTrainedTokenizerBase) -> None:
    template = real(tokenizer, "openai-gpt-oss-120b")
    assert {"<|return|>", "<|call|>"} <= set(tokenizer.convert_ids_to_tokens(list(template.end_ids)))


def test_a_turn_of_which_the_template_shows_nothing_is_refused(template: ChatTemplate) -> None:
    """What a template cuts away up to a mark may be all that was said; an empty reply is not to be learned."""
    cutting = with_source(template, CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +"))
    assert pieces(cutting.rendered([Message("user", "a"), Message("assistant", "b</think>c")])) == ["c<|im_end|>"]
    with pytest.raises(TemplateError, match="leaves out turn 2"):
        cutting.views([Message("user", "a"), Message("assistant", "b</think> ")])


def test_marks_around_nothing_belong_to_the_turn_between(template: ChatTemplate) -> None:
    """A marked range without text, of a turn that is not to be learned, is not learned as part of another."""
    marked = with_source(
        template,
        "{% for m in messages %}<|im_start|>{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
    )
    talk = [
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d</think>", weight=0.0),
    ]
    assert pieces(marked.rendered(talk)) == ["b<|im_end|>"]
    with pytest.raises(TemplateError, match="marks leave out turn 4"):
        marked.rendered([*talk[:3], Message("assistant", "d</think>")])


def test_a_turn_between_checked_ones_is_opened_as_its_sample_or_checked(template: ChatTemplate) -> None:
    """The template opens replies with a mark unless they hold one; the prompt for a reply always does."""
    template.tokenizer.add_special_tokens({"extra_special_tokens": ["<think>"]})
    thinking = with_source(
        template,
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ '<think></think>' if m['role'] == 'assistant' and '</think>' not in m['content'] }}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    )
    said = ["x</think>y", *[f"b{n}" for n in range(11)]]
    talk = [m for text in said for m in (Message("user", "a"), Message("assistant", text))]
    assert pieces(thinking.rendered(talk))[1:] == [f"</think>{text}<|im_end|>" for text in said[1:]]


def test_what_opens_a_call_or_a_thought_is_the_turns(template: ChatTemplate) -> None:
    """A template that writes no header before a call or a thought: their own opening is learned."""
    source = (
        "{% for m in messages %}{% if m['tool_calls'] %}[CALL]{{ m['tool_calls'][0]['function']['name'] }}<|im_end|>"
        "{% elif m['role'] == 'user' %}U:{{ m['content'] }}{% else %}A:{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}"
    )
    calling = with_source(template, source)
    assert pieces(calling.rendered(CALLS[:2], (LOOK,))) == ["[CALL]look_up<|im_end|>"]
    thinking = with_source(template, source.replace("m['tool_calls']", "m['thinking']").replace("[0]['function']['name']", ""))
    thought = [CALLS[0], Message("assistant", "b", reasoning="why")]
    assert pieces(thinking.rendered(thought)) == ["[CALL]why<|im_end|>"]
