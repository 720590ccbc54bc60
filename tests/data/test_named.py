from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import CHATML
from tunesmith import ChatTemplate, get_template, template_names
from tunesmith.data.named import fitted, use_template
from tunesmith.errors import TemplateError

TALK = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
SYSTEM = {"role": "system", "content": "s"}
ORIGINALS = ["vanilla", "default", "alpaca", "vicuna", "belle", "linly", "billa", "ziya", "aquila", "intern", "baichuan"]


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    """With a token that begins texts, which it puts before plain text; its end token is written ``<|im_end|>``."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def raw(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[dict[str, str]], ask: bool = False) -> str:
    tokenizer.add_special_tokens({"extra_special_tokens": list(get_template(name).special)})
    source, _ = fitted(get_template(name), tokenizer)
    return str(tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=ask))


def shown(tokenizer: PreTrainedTokenizerBase, name: str, messages: list[dict[str, str]], ask: bool = False) -> str:
    """With the tokens spelt as B and E, so that a text can be read."""
    text = raw(tokenizer, name, messages, ask)
    return text.replace(tokenizer.bos_token, "B").replace(tokenizer.eos_token, "E")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("default", "s\nHuman: q1\nAssistant: a1E\nHuman: q2\nAssistant: a2E"),
        ("alpaca", "s\n\n### Instruction:\nq1\n\n### Response:\na1E\n\n### Instruction:\nq2\n\n### Response:\na2E"),
        ("vicuna", "s USER: q1 ASSISTANT: a1EUSER: q2 ASSISTANT: a2E"),
        ("belle", "s\n\nHuman: q1\n\nBelle: a1E\n\nHuman: q2\n\nBelle: a2E"),
        ("linly", "s\nUser: q1\nBot: a1E\nUser: q2\nBot: a2E"),
        ("billa", "s\nHuman: q1\nAssistant: a1E\nHuman: q2\nAssistant: a2E"),
        ("ziya", "s\n<human>:q1\n<bot>:a1E\n<human>:q2\n<bot>:a2E"),
        ("aquila", "s###Human: q1###Assistant: a1E###Human: q2###Assistant: a2E"),
        ("intern", "s\n<|User|>:q1<eoh>\n<|Bot|>:a1<eoa>\n<|User|>:q2<eoh>\n<|Bot|>:a2<eoa>"),
        ("baichuan", "s<reserved_102>q1<reserved_103>a1E<reserved_102>q2<reserved_103>a2E"),
        ("llama2", "B[INST] <<SYS>>\ns\n<</SYS>>\n\nq1 [/INST] a1 EB[INST] q2 [/INST] a2 E"),
        ("mistral", "B[INST] s\n\nq1 [/INST] a1E[INST] q2 [/INST] a2E"),
        ("glm4", "[gMASK]<sop><|system|>\ns<|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>\na2<|user|>"),
        ("gemma", "B<start_of_turn>user\ns\n\nq1<end_of_turn>\n<start_of_turn>model\na1<end_of_turn>\n"
         "<start_of_turn>user\nq2<end_of_turn>\n<start_of_turn>model\na2<end_of_turn>\n"),
        ("zephyr", "<|system|>\nsE\n<|user|>\nq1E\n<|assistant|>\na1E\n<|user|>\nq2E\n<|assistant|>\na2E\n"),
        ("openchat", "BGPT4 Correct System: s<|end_of_turn|>GPT4 Correct User: q1<|end_of_turn|>GPT4 Correct Assistant: a1"
         "<|end_of_turn|>GPT4 Correct User: q2<|end_of_turn|>GPT4 Correct Assistant: a2<|end_of_turn|>"),
    ],
)  # fmt: skip
def test_published_forms(tokenizer: PreTrainedTokenizerBase, name: str, text: str) -> None:
    assert shown(tokenizer, name, [SYSTEM, *TALK]) == text
    prompt = shown(tokenizer, name, [SYSTEM, *TALK[:3]], ask=True)
    assert text.startswith(prompt) and text[len(prompt) :].strip().startswith("a2")


def test_the_early_forms_have_their_first_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    assert set(ORIGINALS) < set(template_names())
    assert shown(tokenizer, "alpaca", TALK[:2]).startswith("Below is an instruction that describes a task.")
    assert shown(tokenizer, "vicuna", TALK[:2]).startswith("A chat between a curious user and an artificial")
    assert shown(tokenizer, "vanilla", TALK) == "q2a2E"  # no history


def test_entries_say_what_the_templates_do(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in template_names():
        template = get_template(name)
        text, bare = raw(tokenizer, name, [SYSTEM, *TALK]), raw(tokenizer, name, TALK)
        everything = text + bare + raw(tokenizer, name, TALK[:3], ask=True)
        assert all(token in everything for token in template.special), name
        assert template.system in bare or name == "vanilla", name
        end = template.end or tokenizer.eos_token
        rest = text.partition("a2")[2].strip()
        assert rest.startswith(end) and rest.removeprefix(end).strip() in ("", tokenizer.eos_token), name
        assert template.description and template.family, name
        with pytest.raises(Exception, match="this template knows"):
            raw(tokenizer, name, [*TALK, {"role": "critic", "content": "c"}])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("qwen3", "Qwen-Qwen3-0.6B"),
        ("llama3.1", "meta-llama-Llama-3.1-8B-Instruct"),
        ("kimi-k2", "Kimi-K2-Instruct"),
        ("hermes", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use"),
    ],
)
def test_as_the_family_renders(tokenizer: PreTrainedTokenizerBase, shared: Path, name: str, published: str) -> None:
    own = (shared / "templates" / f"{published}.jinja").read_text(encoding="utf-8")
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "雨"}}}
    called = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "r"}, TALK[1]]
    talks = [([SYSTEM, *TALK], None), (TALK[:2], None)]
    if name == "hermes":  # another sentence introduces the tools, and the family's file wants tools always
        talks = []
        start = "<|im_start|>user"
        for messages in ([SYSTEM, *called[:2]], [SYSTEM, *TALK]):
            texts = [tokenizer.apply_chat_template(messages, [tool], chat_template=s, tokenize=False)
                     for s in (own, get_template(name).source)]  # fmt: skip
            assert texts[0].split(start)[1:] == texts[1].split(start)[1:]
    elif name != "kimi-k2":
        talks += [([SYSTEM, *called], [tool]), (called[:2], [tool])]
    for messages, tools in talks:
        texts = [tokenizer.apply_chat_template(messages, tools, chat_template=s, tokenize=False)
                 for s in (own, get_template(name).source)]  # fmt: skip
        assert texts[0] == texts[1]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(TemplateError, match=r"did you mean 'alpaca'.*tunesmith templates"):
        get_template("alpca")


def test_a_reply_ends_with_one_token_that_the_tokenizer_has(tokenizer: PreTrainedTokenizerBase) -> None:
    notes = use_template(tokenizer, "gemma")
    count = len(tokenizer.encode("<end_of_turn>", add_special_tokens=False))
    assert notes[0].endswith(f"'<end_of_turn>' is {count} ordinary tokens in this tokenizer") and count > 1
    assert notes[1].endswith("replies end with '<end_of_turn><|im_end|>'")
    template = ChatTemplate(tokenizer)
    encoded = template.render(TALK)
    assert encoded.text.count("<end_of_turn><|im_end|>") == 2
    assert tokenizer.eos_token_id in template.end_ids
    learned = [token for token, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True) if mask]
    assert learned.count(tokenizer.eos_token_id) == 2
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="has none; set eos_token"):
        use_template(tokenizer, "alpaca")


def test_bos_is_written_where_the_tokenizer_writes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    assert fitted(get_template("ziya"), tokenizer)[0].startswith("{%- set begin_of_text = '' -%}")
    special = [("<|endoftext|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    assert shown(tokenizer, "ziya", TALK[:2]) == "B<human>:q1\n<bot>:a1E"


def test_the_difference_from_the_models_own_is_told(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert use_template(tokenizer, "auto") == ()
    assert use_template(tokenizer, "chatml")[-1] == "template 'chatml' renders as the model's own"
    monkeypatch.chdir(tmp_path)
    mine = Path("mine.jinja")
    mine.write_text(CHATML.replace("m['content'] +", "m['content'] + '!' +"), encoding="utf-8")
    (note,) = use_template(tokenizer, str(mine))
    assert "differs from the model's own: 'ser\\nHello.!<|im_end|>" in note and "(character 24, one turn)" in note
    assert tokenizer.chat_template == mine.read_text(encoding="utf-8")
    tokenizer.chat_template = None
    assert "the model has none of its own" in use_template(tokenizer, "alpaca")[-1]


def test_a_file_that_is_no_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    with pytest.raises(TemplateError, match="no such file"):
        use_template(tokenizer, str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"not UTF-8 \(byte 0\)"):
        use_template(tokenizer, str(file))
    file.write_text("{% for", encoding="utf-8")
    with pytest.raises(TemplateError, match="cannot be read"):
        use_template(tokenizer, str(file))
    file.write_text("x" * ((1 << 20) + 1), encoding="utf-8")
    with pytest.raises(TemplateError, match="at most 1,048,576"):
        use_template(tokenizer, str(file))


def test_a_file_whose_replies_end_with_no_single_token_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML, encoding="utf-8")
    assert len(use_template(tokenizer, str(file))) == 1
    file.write_text(CHATML.replace("<|im_end|>", "<|turn_end|>").replace("<|im_start|>", "<|turn|>"), encoding="utf-8")
    note, _ = use_template(tokenizer, str(file))
    assert "followed by '<|turn_end|>\\n<|turn|>user\\n', in which is no single token" in note
    assert "write eos_token ('<|im_end|>') behind replies" in note
