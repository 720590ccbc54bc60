"""Answers of the engine against the library's own, one by one; rows join, leave and do not know of each other."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.model.test_attention import MODELS, SIZES, built
from tunesmith.config.arguments import GeneratingArguments
from tunesmith.errors import ModelError
from tunesmith.generate import batch, steps
from tunesmith.generate.batch import BatchEngine
from tunesmith.generate.cache import RowCache
from tunesmith.generate.engine import ChatEngine
from tunesmith.generate.flow import Request
from tunesmith.generate.steps import Steps
from tunesmith.model.attention import SEGMENTS
from tunesmith.model.forward import FlatForward, probe_batch, segments_work
from tunesmith.model.lora_kernel import install_lora_kernel
from tunesmith.model.packed import packed_linears
from tunesmith.types import Message

LENGTHS = (29, 3, 11, 18, 5, 1, 11)
ENDS = (2, 7)
GREEDY = GeneratingArguments(do_sample=False, max_new_tokens=24)
SAMPLED = GeneratingArguments(max_new_tokens=12, temperature=1.5, top_k=0, top_p=0.95, repetition_penalty=1.2)


def prompts_of(vocabulary: int = 64) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(8, vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]


def engine_of(model: PreTrainedModel, slots: int = 4) -> BatchEngine:
    works = model.config._attn_implementation == SEGMENTS or segments_work(model)[0]
    return BatchEngine(FlatForward(model, works), ENDS, torch.float32, slots)


def said(engine: BatchEngine, prompts: list[list[int]], args: GeneratingArguments, **options: int) -> list[list[list[int]]]:
    found = engine.answers(prompts, args, [(number,) for number in range(len(prompts))], **options)
    for answer in (one for row in found for one in row):
        assert answer.ids.dtype == np.int32 and answer.ended == (answer.ids[-1] in ENDS)
        assert not np.isin(answer.ids[:-1], ENDS).any()
    return [[answer.ids.tolist() for answer in row] for row in found]


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], **options: object) -> list[list[list[int]]]:
    found = []
    for ids in prompts:
        given = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), "eos_token_id": list(ENDS), "pad_token_id": 0}
        made = model.generate(torch.tensor([ids]), **given, do_sample=False, max_new_tokens=24, **options)
        found.append([made[0, len(ids) :].tolist()])
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_answers_are_the_librarys(kind: str) -> None:
    """In four slots: rows of all lengths, longer than windows and chunks; what cannot be run in steps says why."""
    model = built(kind).eval()
    expected = one_by_one(model, prompts_of())
    engine = engine_of(model)
    assert (engine.reason != "") == (kind == "chunks")
    assert said(engine, prompts_of(), GREEDY) == expected
    assert engine.statistics.tokens == sum(len(row[0]) for row in expected) > 30
    assert engine.statistics.prompt_tokens == sum(LENGTHS)


def chunks_in_steps() -> PreTrainedModel:
    """As of ``MODELS``, but for what makes it count positions by its cache."""
    torch.manual_seed(0)
    name, changes = MODELS["chunks"]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes, "attn_temperature_tuning": False})
    model: PreTrainedModel = transformers.Llama4ForCausalLM(config)
    model.set_attn_implementation("eager")
    return model.eval()


def test_chunks_in_steps() -> None:
    model = chunks_in_steps()
    expected = one_by_one(model, prompts_of())
    engine = engine_of(model)
    assert engine.reason == "" and said(engine, prompts_of(), GREEDY) == expected


@pytest.mark.parametrize("kind", ["window and bounded scores", "sinks", "values narrower than keys"])
def test_logits_of_steps_are_those_of_training(kind: str) -> None:
    """Prompts of other lengths than the trial's, some with two rows; a row that leaves in between."""
    model = built(kind).eval()
    assert segments_work(model)[0]
    forward, rows = FlatForward(model, True), [np.array(ids) for ids in prompts_of()[:4]]
    known, copies = [20, 2, 1, 9], [1, 2, 1, 1]
    expected = {len(row): whole(forward, row) for row in rows}
    made = Steps(forward, torch.float32)
    cache = RowCache(5, 29)
    with made.running():
        logits_PV = made.prompts(cache, [row[:n] for row, n in zip(rows, known, strict=True)], copies)
        for row, n, found in zip(rows, known, logits_PV, strict=True):
            torch.testing.assert_close(found, expected[len(row)][n - 1], atol=1e-4, rtol=1e-4)
        active = [rows[0], rows[1], rows[1], rows[2], rows[3]]
        seen = 0
        while active:
            for place in reversed(range(len(active))):
                if cache.lengths[place] == len(active[place]):
                    cache.drop(place, wipe=False)
                    active[place] = active[-1]
                    active.pop()
            if active:
                logits_BV = made.next(cache, [int(row[n]) for row, n in zip(active, cache.lengths, strict=True)])
                for row, n, found in zip(active, cache.lengths, logits_BV, strict=True):
                    torch.testing.assert_close(found, expected[len(row)][n - 1], atol=1e-4, rtol=1e-4)
                    seen += 1
    assert seen == 9 + 1 + 1 + 10 + 9


def whole(forward: FlatForward, row: np.ndarray) -> torch.Tensor:
    """Logits ``[L, V]`` of the training forward."""
    ids = torch.from_numpy(row)
    batch = probe_batch(forward.model)
    places = torch.arange(len(ids))
    with torch.no_grad():
        return forward.logits(type(batch)(ids, places, places, ids, (len(ids),), ()))


@pytest.fixture
def tiny(tiny_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_a_row_says_the_same_in_any_company(tiny: PreTrainedModel) -> None:
    """Three slots, three samples of each prompt, of which the first two join alone; a prompt is computed once."""
    prompts, engine = prompts_of(300), engine_of(tiny, slots=7)
    together = said(engine, prompts, SAMPLED, samples=3, seed=5)
    assert engine.statistics.prompt_tokens == sum(LENGTHS) and engine.statistics.most_rows <= 7
    assert len({tuple(ids) for row in together for ids in row}) > 15
    for number, ids in enumerate(prompts):
        alone = engine_of(tiny, slots=2).answers([ids], SAMPLED, [(number,)], samples=3, seed=5)
        assert [answer.ids.tolist() for answer in alone[0]] == together[number]
    assert said(engine, prompts, SAMPLED, samples=3, seed=6) != together


def test_the_librarys_generate_draws_the_same(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a model that is not run in steps: the same tokens, limits of rows heeded, the same counts."""
    prompts, room = prompts_of(300), [1, 9, 3, 12, 4, 5, 6]
    engine = engine_of(tiny)
    expected = said(engine, prompts, SAMPLED, samples=2, room=room)  # type: ignore[arg-type]
    assert [max(map(len, row)) for row in expected] == room
    monkeypatch.setattr(steps, "adds_nothing", lambda _: False)
    other = engine_of(tiny)
    assert other.reason == "it does more than its layers do"
    assert said(other, prompts, SAMPLED, samples=2, room=room) == expected  # type: ignore[arg-type]
    assert other.statistics.tokens == engine.statistics.tokens
    with pytest.raises(ModelError, match="more than its layers"):
        other.flow(20)


def test_limits(tiny: PreTrainedModel) -> None:
    engine, never = engine_of(tiny), GeneratingArguments(do_sample=False, max_new_tokens=None, max_length=20)
    engine.end_ids = (10**6,)
    lengths = [len(row[0].ids) for row in engine.answers([[5] * 3, [6] * 19], never, [(0,), (1,)])]
    assert lengths == [17, 1]
    assert len(engine.answers([[5] * 508], GREEDY, [(0,)])[0][0].ids) == 4  # of 512 that the model takes
    for prompt, room in (([6] * 20, None), ([], None), ([6], [0])):
        with pytest.raises(ModelError, match=f"prompt 1 of {len(prompt)} tokens"):
            engine.answers([prompt], never, [(0,)], room=room)
    assert engine.answers([], never, []) == []


def test_beams_are_the_librarys(tiny: PreTrainedModel) -> None:
    args = GeneratingArguments(do_sample=False, num_beams=3, length_penalty=0.5, max_new_tokens=24)
    prompts = prompts_of(300)[:3]
    expected = one_by_one(tiny, prompts, num_beams=3, length_penalty=0.5)
    found = said(engine_of(tiny), prompts, args, samples=2)
    assert found == [[cut(answer[0])] * 2 for answer in expected]


def cut(ids: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(ids) if token in ENDS]
    return ids[: ends[0] + 1] if ends else ids


def test_requests_come_and_go(tiny: PreTrainedModel) -> None:
    """Rows join while others speak, in slots that were used before; a request that is cancelled says nothing more."""
    prompts, engine = prompts_of(300), engine_of(tiny, slots=3)
    alone = said(engine, prompts, GREEDY)
    flow, heard, whole_answers = engine.flow(60), dict[int, list[int]](), {}
    flow.add(Request(np.array(prompts[0]), GREEDY, ((0,),), 24))
    flow.add(Request(np.array(prompts[1]), GREEDY, ((0,), (1,)), 24))
    with Steps(engine.forward, torch.float32).running():
        for step in range(200):
            if step == 2:
                for number in (2, 3, 4):
                    flow.add(Request(np.array(prompts[number]), GREEDY, ((0,),), 24))
            if step == 5:
                flow.cancel(0)  # speaks
                flow.cancel(4)  # waits
            for token in flow.step():
                assert step < 5 or token.request not in (0, 4)
                if token.sample == 0:
                    heard.setdefault(token.request, []).append(token.token)
                if token.answer is not None:
                    whole_answers[token.request, token.sample] = token.answer.ids.tolist()
            if step > 5 and not flow.busy:
                break
    assert heard[0] == alone[0][0][:5]
    assert whole_answers == {(1, 0): alone[1][0], (1, 1): alone[1][0], (2, 0): alone[2][0], (3, 0): alone[3][0]}
    assert all(heard[number] == alone[number][0] for number in (1, 2, 3))


@pytest.mark.parametrize("args", [GREEDY, SAMPLED])
def test_a_damaged_row_harms_no_other(
    tiny: PreTrainedModel, args: GeneratingArguments, caplog: pytest.LogCaptureFixture
) -> None:
    """A token whose embedding is no number, in one prompt; its slots are used again by others."""
    prompts = prompts_of(300)
    expected = said(engine_of(tiny, slots=2), prompts, args)
    with torch.no_grad():
        tiny.get_input_embeddings().weight[301] = float("nan")
    engine = engine_of(tiny, slots=2)
    broken = [[301, *prompts[0]], *prompts[:3], [301, 9], *prompts[3:]]
    keys = [(50,), (0,), (1,), (2,), (51,), (3,), (4,), (5,), (6,)]
    with caplog.at_level(logging.WARNING):
        found = [[answer.ids.tolist() for answer in row] for row in engine.answers(broken, args, keys)]
    assert [row for place, row in enumerate(found) if place not in (0, 4)] == expected
    assert engine.statistics.repaired == len(found[0][0]) + len(found[4][0])
    assert caplog.text.count("no numbers") == 1


def test_chat_goes_on(tiny: PreTrainedModel, tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad():
        tiny.lm_head.weight[9] = float("nan")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    engine = ChatEngine(tiny, tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            engine.answer([Message("user", "the cat")], GeneratingArguments(max_new_tokens=4))
    assert engine.repairs.repaired >= 2 and caplog.text.count("no numbers") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_training_comes_back(tiny_model: Path, dtype: torch.dtype) -> None:
    """Its adapter takes part; mode, random numbers, forwards of layers and gradients are as before."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    assert segments_work(base)[0]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    forward, prompts = FlatForward(model, True), prompts_of(300)
    install_lora_kernel(forward, dtype)
    model.train()
    state, forwards = torch.get_rng_state(), [module.__dict__.get("forward") for module in model.modules()]
    engine = BatchEngine(forward, ENDS, dtype)
    plain = engine.answers(prompts, GREEDY, [(0,)] * len(prompts))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    adapted = engine.answers(prompts, GREEDY, [(0,)] * len(prompts))
    assert [row[0].ids.tolist() for row in plain] != [row[0].ids.tolist() for row in adapted]
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert forwards == [module.__dict__.get("forward") for module in model.modules()]
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_packed_layers_give_what_layers_give(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, adapted, adapter switched off, and no packing for other dtypes or without memory."""
    from tunesmith.model import packed

    if not packed._arranges():
        pytest.skip("needs a processor that multiplies bf16 (avx512_bf16 or amx_bf16) and oneDNN")
    monkeypatch.setattr(packed, "_SMALL", 0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert segments_work(base)[0]
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    forward = FlatForward(model, True)
    batch = probe_batch(base)

    def compared(layers: int) -> float:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected = forward.logits(batch).float()
            with packed_linears(model, torch.bfloat16) as count:
                found = forward.logits(batch).float()
        assert count == layers
        return ((found - expected).norm() / expected.norm()).item()

    adapted = sum(hasattr(module, "lora_A") for module in model.modules())
    assert 0 < compared(adapted + 1) < 2e-2  # and the head
    with model.disable_adapter():
        inner = sum(type(module) is torch.nn.Linear for module in model.modules())
        assert compared(inner) < 2e-2
    with packed_linears(model, torch.float32) as count:
        assert count == 0
    monkeypatch.setattr(packed, "available_memory", lambda _: 1000)
    assert compared(0) == 0


def test_fewer_rows_where_memory_is_short(tiny: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny, slots=4)
    expected = said(engine, prompts_of(300), GREEDY)
    per_token = 2 * 2 * 16 * (4 + 4)  # two layers, two heads of 16, keys and values in float32
    monkeypatch.setattr(batch, "available_memory", lambda _: 2 * 2 * per_token * 53)
    engine.statistics.most_rows = 0
    assert said(engine, prompts_of(300), GREEDY) == expected
    assert engine.statistics.most_rows == 2


def test_rotations_that_depend_on_the_longest_row_are_left_to_the_library() -> None:
    """Rows of one length at a time there, so none sees another's scale; below the limit steps are the same."""
    torch.manual_seed(0)
    scales = {"short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 4.0, 8.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **scales}
    config = transformers.Phi3Config(**SIZES, rope_parameters=rope, original_max_position_embeddings=24)
    model = transformers.Phi3ForCausalLM(config).eval()
    short = GeneratingArguments(do_sample=False, max_new_tokens=4)
    prompts = [ids for ids in prompts_of() if len(ids) < 20]
    expected = one_by_one(model, prompts)
    engine = engine_of(model)
    assert engine.reason == ""
    for args, most, tokens in ((GREEDY, 2, 24), (short, 4, 4)):
        engine.statistics.most_rows = 0
        assert said(engine, prompts, args) == [[ids[0][:tokens]] for ids in expected]
        assert engine.statistics.most_rows == most


def test_steps_in_16_bits_are_as_near_to_training_as_rounding_allows(tiny_model: Path) -> None:
    """On CPUs that multiply bf16 they are bit-equal; scores rounded to 16 bits would be ten times further away."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    assert segments_work(model)[0]
    forward, row = FlatForward(model, True), np.array(prompts_of(300)[0])
    made, cache, found = Steps(forward, torch.bfloat16), RowCache(2, len(row)), []
    with made.running():
        found.append(made.prompts(cache, [row[:5], row[:9]], [1, 1])[0])
        for token in row[5:]:
            found.append(made.next(cache, [int(token), 7])[0])
        expected = whole(forward, row)[4:].float()
    difference = (torch.stack(found).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert difference.mean() < 5e-4
