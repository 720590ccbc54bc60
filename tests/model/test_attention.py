"""Rows end to end against the library's eager attention on padded rows, longer than the windows, in models of many kinds."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tunesmith.model import attention, attention_routes
from tunesmith.model.attention import SEGMENTS, NotSegmentable
from tunesmith.model.attention_kernel import Variant, attend
from tunesmith.model.attention_routes import Segments, compute
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.types import Batch

LENGTHS = (29, 3, 11, 18)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
LATER = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "window in all layers": ("Mistral", {"sliding_window": 7}),
    "window and experts": ("Mixtral", {"sliding_window": 7, **EXPERTS}),
    "window in later layers": ("Qwen2", LATER),
    "window that layers are not told of": ("Qwen2Moe", {**LATER, "num_experts": 4, "num_experts_per_tok": 2}),
    "fused projections": ("Phi3", {"sliding_window": 7}),
    "window and bounded scores": ("Gemma2", {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "five local layers for a global one": ("Gemma3Text", {"sliding_window": 7, "num_hidden_layers": 6}),
    "three local layers for a global one": ("Cohere2", {"sliding_window": 7}),
    "sinks": ("GptOss", {"sliding_window": 7, **EXPERTS}),
    "a scale of its own": ("Granite", {"attention_multiplier": 0.3}),
    "chunks": ("Llama4Text", {"attention_chunk_size": 7, "intermediate_size_mlp": 48, "num_local_experts": 2}),
    "values narrower than keys": ("DeepseekV3", {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 6, "n_group": 1,
        "n_routed_experts": 4, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_key_value_heads": 4,
    }),
}  # fmt: skip


def built(kind: str, seed: int = 0) -> PreTrainedModel:
    name, changes = MODELS[kind]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    model.set_attn_implementation("eager")
    return model.train()


def batch() -> Batch:
    total = sum(LENGTHS)
    ids = torch.randint(3, 64, (total,), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.cat([torch.arange(n) for n in LENGTHS]), torch.arange(total), ids, LENGTHS, ())


def outcome(model: PreTrainedModel, segments: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and every gradient."""
    logits = FlatForward(model, segments).logits(batch())
    (logits.log_softmax(-1) * torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_gradients_are_those_of_padded_rows(kind: str) -> None:
    model = built(kind)
    expected, theirs = outcome(model, segments=False)
    assert segments_work(model) == (True, "")
    found, mine = outcome(model, segments=True)
    assert gap(found, expected) < 1e-5
    assert mine.keys() == theirs.keys()
    assert {name: gap(mine[name], theirs[name]) for name in theirs if gap(mine[name], theirs[name]) > 1e-5} == {}


@pytest.mark.parametrize("kind", ["window in all layers", "window that layers are not told of", "chunks"])
def test_rows_of_the_tests_are_longer_than_models_look_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(kind)
    assert segments_work(model) == (True, "")
    near = outcome(model, segments=True)[0]

    def far(query: Any, key: Any, value: Any, segments: Segments, scale: float, *_: Any, say: bool) -> torch.Tensor:
        whole = Segments(segments.boundaries, segments.boundaries.tolist())
        return compute(query, key, value, whole, scale, Variant(), None, say)

    monkeypatch.setattr(attention, "compute", far)
    assert gap(outcome(model, segments=True)[0], near) > 1e-2


def call(**changes: Any) -> torch.Tensor:
    """The attention function on one row of 6 tokens."""
    given = {"attention_mask": None, "cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32), **changes}
    q, k, v = (torch.ones(1, 2, 6, 4) for _ in range(3))
    return attention.segment_attention(torch.nn.Identity(), q, k, v, given.pop("attention_mask"), **given)[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 4}, "told to look back 4"),
        ({"sliding_window": 4, "attention_mask": torch.tensor([5, 0])}, "its mask says 5"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "a mask of its own"),
        ({"is_causal": False}, "later tokens"),
        ({"position_bias": torch.ones(1, 2, 6, 6)}, "position_bias"),
        ({"cu_seq_lens_q": None}, "boundaries do not reach"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert call().shape == (1, 6, 2, 4)
    with pytest.raises(NotSegmentable, match=reason):
        call(**changes)


def test_masks_of_another_kind_are_refused() -> None:
    config = LlamaConfig(sliding_window=4, attention_chunk_size=4)
    for mask in ({"use_vmap": True}, {"local_size": 4, "config": config}, {"local_size": 3, "config": config}):
        with pytest.raises(NotSegmentable, match="mask"):
            attention._reach(**mask)


def test_layers_of_another_kind_are_padded_with_a_reason() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.layer_types = ["linear_attention", "full_attention"]
    before = model.config._attn_implementation
    assert segments_work(model) == (False, "layers of another kind: linear_attention")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_saw_each_other_would_be_noticed(
    tiny_model: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)

    def one_row(query: Any, key: Any, value: Any, segments: Segments, *rest: Any, say: bool) -> torch.Tensor:
        return compute(query, key, value, Segments(segments.boundaries, (0, query.shape[2])), *rest, say)

    monkeypatch.setattr(attention, "compute", one_row)
    works, reason = segments_work(model)
    assert not works and "other logits" in reason
    monkeypatch.undo()
    assert segments_work(model) == (True, "")
    assert model.config._attn_implementation == SEGMENTS


def test_an_error_confined_to_one_token_is_noticed_in_16_bits(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of the mean would pass."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    logits = FlatForward.logits

    def strayed(by: float) -> None:
        def one(self: FlatForward, batch: Batch) -> torch.Tensor:
            made = logits(self, batch).float()
            if self.segments:
                made[4] *= 1 + by
            return made

        monkeypatch.setattr(FlatForward, "logits", one)

    strayed(0.5)
    works, reason = segments_work(model)
    assert not works and "at most" in reason
    assert float(reason.partition("difference ")[2].split()[0]) < 5e-2  # the mean alone would let it pass
    strayed(0.1)
    assert segments_work(model) == (True, "")


@pytest.mark.parametrize("seed", range(3))
def test_a_token_that_rounding_sends_to_other_experts_is_no_error(seed: int) -> None:
    """In 16 bits, between any two attentions; with the second seed it is one of the first batch."""
    assert segments_work(built("window and experts", seed).bfloat16()) == (True, "")


# ---- which kernel


def drawn(dtype: torch.dtype = torch.float32, heads: int = 4, keys: int = 2) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(1, sum(LENGTHS), n, 8, generator=draw).to(dtype) for n in (heads, keys, keys)]
    return [t.transpose(1, 2).requires_grad_() for t in made]


def rows() -> Segments:
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return Segments(boundaries, tuple(boundaries.tolist()))


@pytest.mark.parametrize("tile", [8, 20, 1024])
@pytest.mark.parametrize("window", [None, 1, 7, 28])
def test_a_mask_of_blocks_gives_the_same(tile: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of several rows, of parts of a row, and of rows that are as long as a mask; each is made once for all layers."""
    q, k, v = drawn()
    expected = attend(q, k, v, rows().edges, 0.4, Variant(window))
    monkeypatch.setattr(attention_routes, "route", lambda *_: "masked")
    monkeypatch.setattr(attention_routes, "_TILE", tile)
    segments, made = rows(), []
    mask = attention_routes._mask
    monkeypatch.setattr(attention_routes, "_mask", lambda *args: (made.append(args), mask(*args))[1])
    found = compute(q, k, v, segments, 0.4, Variant(window), None, say=False)
    compute(q, k, v, segments, 0.4, Variant(window), None, say=False)
    assert len(made) == len(set(made)) and all(end - begin <= tile for *_, begin, end, _ in made)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    draw = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(found, (q, k, v), draw), torch.autograd.grad(expected, (q, k, v), draw), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


class OnCuda(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


PLAIN, CAPPED, DROPPED, NEAR = Variant(), Variant(cap=5.0), Variant(dropout=0.1), Variant(7)


@pytest.mark.parametrize(
    ("variant", "dtype", "width", "capability", "flash", "sinks", "expected"),
    [
        (PLAIN, torch.bfloat16, 64, (9, 0), False, False, "varlen"),
        (NEAR, torch.float16, 128, (8, 0), True, False, "varlen"),
        (CAPPED, torch.bfloat16, 64, (9, 0), True, False, "flash"),
        (DROPPED, torch.bfloat16, 64, (9, 0), True, False, "flash"),
        (CAPPED, torch.bfloat16, 64, (9, 0), False, False, "own"),
        (DROPPED, torch.bfloat16, 64, (9, 0), False, False, "masked"),
        (PLAIN, torch.float32, 64, (9, 0), True, False, "masked"),
        (PLAIN, torch.float16, 64, (7, 5), True, False, "masked"),
        (PLAIN, torch.bfloat16, 320, (9, 0), True, False, "masked"),
        (PLAIN, torch.bfloat16, 64, (9, 0), True, True, "own"),
    ],
)
def test_the_fastest_kernel_that_can(
    variant: Variant, dtype: torch.dtype, width: int, capability: tuple[int, int], flash: bool, sinks: bool, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention_routes, "_capability", lambda _: capability)
    monkeypatch.setattr(attention_routes, "find_spec", lambda _: flash or None)
    q = torch.empty(1, 2, 3, width, dtype=dtype)
    on_gpu = q.as_subclass(OnCuda)
    given = torch.zeros(2) if sinks else None
    assert attention_routes.route(on_gpu, on_gpu, variant, given) == expected
    assert attention_routes.route(q, q, variant, given) == "own"


def by_hand(
    q_Thd: torch.Tensor, k_Tkd: torch.Tensor, v_Tkd: torch.Tensor, bounds: Any, scale: float, before: int
) -> torch.Tensor:
    """What a variable-length kernel gives, with its own way to count a window."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q_Thd, k_Tkd, v_Tkd))
    return attend(q, k, v, bounds.tolist(), scale, Variant(None if before < 0 else before + 1))[0]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("grouped", [True, False])
def test_torchs_kernel_is_asked_as_it_wants(window: int | None, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its signature, with and without grouped heads; it runs on GPUs only."""
    signature, asked = inspect.signature(attention_routes.varlen_attn), []

    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs).arguments
        asked.append(given)
        assert given["cu_seq_q"] is given["cu_seq_k"] and given["cu_seq_q"].dtype == torch.int32
        assert given["max_q"] == given["max_k"] == max(LENGTHS)
        assert given["window_size"][1] == 0
        assert given.get("enable_gqa", False) or given["query"].shape[1] == given["key"].shape[1]
        return by_hand(given["query"], given["key"], given["value"], given["cu_seq_q"], given["scale"], given["window_size"][0])

    takes = frozenset(signature.parameters) - (set() if grouped else {"enable_gqa"})
    monkeypatch.setattr(attention_routes, "varlen_attn", stand_in)
    monkeypatch.setattr(attention_routes, "_varlen_takes", lambda: takes)
    monkeypatch.setattr(attention_routes, "route", lambda *_: "varlen")
    q, k, v = drawn()
    found = compute(q, k, v, rows(), 0.4, Variant(window), None, say=False)
    torch.testing.assert_close(found, attend(q, k, v, rows().edges, 0.4, Variant(window)))
    assert ("enable_gqa" in asked[0]) == grouped


def test_flash_attn_is_asked_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
        dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        assert causal and dropout_p == 0.25 and softcap == 5.0 and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        return by_hand(q, k, v, cu_seqlens_q, softmax_scale or 0.0, window_size[0])

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_routes, "route", lambda *_: "flash")
    q, k, v = drawn()
    found = compute(q, k, v, rows(), 0.4, Variant(7, 5.0, 0.25), None, say=False)
    torch.testing.assert_close(found, attend(q, k, v, rows().edges, 0.4, Variant(7)))


def test_which_kernel_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    attention_routes._say.cache_clear()
    with caplog.at_level("INFO", "tunesmith"):
        for _ in range(2):
            compute(*drawn(), rows(), 0.4, PLAIN, None, say=True)
    assert [record.message for record in caplog.records] == [
        "attention: rows end to end, by blocks of matrix products (cpu, float32)"
    ]
