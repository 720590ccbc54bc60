"""Engines elsewhere, against a server and a module that stand in for vLLM's."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import tunesmith
from tunesmith.config.arguments import GeneratingArguments
from tunesmith.config.load import load_config
from tunesmith.errors import ConfigError, ModelError
from tunesmith.generate.remote import OpenAIEngine, VllmEngine
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.train.runlog import read_log

END = 2
ARGS = GeneratingArguments(temperature=0.8, top_p=1.0, top_k=0, max_new_tokens=6)


def says(prompt: list[int], seed: int, index: int, most: int) -> tuple[list[int], str]:
    """What both stand-ins answer: the prompt backwards, a token of the seed, the end token, up to the limit."""
    whole = [*prompt[::-1], 3 + (seed + index) % 50, END]
    return (whole, "stop") if len(whole) <= most else (whole[:most], "length")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"r": 8, "rank_pattern": {"x": 12}}))
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return read_tokenizer(tiny_model)


class Server(BaseHTTPRequestHandler):
    """Knows adapters by name, answers completions with them; can be told to refuse, to fail, or to give text alone."""

    adapters: dict[str, str]
    loaded: list[str]
    asked: list[tuple[str, dict[str, Any], str | None]]
    refuses: dict[str, int]
    change: Callable[[dict[str, Any]], Any] | None
    says: Callable[[list[int], int, int, int], tuple[list[int], str]]
    tokenizer: PreTrainedTokenizerBase

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        verb = self.path.removeprefix("/v1/")
        self.asked.append((verb, body, self.headers.get("Authorization")))
        status, answer = self.refuses.get(verb, 200), self._answer(verb, body)
        if verb == "completions" and body["model"] not in self.adapters:
            status = 404
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, verb: str, body: dict[str, Any]) -> Any:
        if verb == "load_lora_adapter":
            self.adapters[body["lora_name"]] = body["lora_path"]
            weights = Path(body["lora_path"], "adapter_model.safetensors")
            self.loaded.append(hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "")
            return "Success: added"
        if verb == "unload_lora_adapter":
            self.adapters.pop(body["lora_name"], None)
            return "Success: removed"
        choices = []
        for index in reversed(range(body["n"])):
            ids, reason = self.says(body["prompt"], body["seed"], index, body["max_tokens"])
            choices.append({"index": index, "token_ids": ids, "finish_reason": reason, "stop_reason": END, "text": "-"})
        answer = {"choices": choices}
        return self.change(answer) if self.change else answer

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("TUNESMITH_ROLLOUT_KEY", raising=False)
    handler: Any = type(
        "Handler",
        (Server,),
        {"adapters": {}, "loaded": [], "asked": [], "refuses": {}, "change": None, "says": staticmethod(says)},
    )
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", handler
    running.shutdown()
    thread.join()
    running.server_close()


def engine(server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase) -> OpenAIEngine:
    return OpenAIEngine(server[0] + "/", tokenizer, [END, 0], longest=20, pause=0.001)


def test_a_server_answers(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_ROLLOUT_KEY", "s3cret")
    made = engine(server, tokenizer)
    made.sync(adapter, 1)
    found = made.answers(
        [np.array([4, 5], dtype=np.int32), [3, 4, 5, 6, 7, 8, 9]], ARGS, [(0, 1), (0, 2)], samples=3, room=[6, 5]
    )
    assert [len(answers) for answers in found] == [3, 3]
    assert all(a.ids[:2].tolist() == [5, 4] and a.ids[-1] == END and a.ended and a.ids.dtype == np.int32 for a in found[0])
    assert len({int(a.ids[2]) for a in found[0]}) == 3  # each sample its own numbers
    assert [(a.ids.tolist(), a.ended) for a in found[1]] == [([9, 8, 7, 6, 5], False)] * 3
    asked = {tuple(body["prompt"]): body for verb, body, _ in server[1].asked if verb == "completions"}
    body = asked[4, 5]
    assert (body["max_tokens"], body["n"], body["top_k"], body["top_p"], body["temperature"]) == (6, 3, -1, 1.0, 0.8)
    assert (body["min_p"], body["repetition_penalty"], body["stop_token_ids"]) == (0.0, 1.0, [END, 0])
    assert body["return_token_ids"] and not body["skip_special_tokens"]
    assert {key for _, _, key in server[1].asked} == {"Bearer s3cret"}
    assert made.statistics.tokens == 27
    alone = made.answers([[4, 5]], ARGS, [(0, 1)], samples=3)  # the same key: the same answers, in any company
    assert [a.ids.tolist() for a in alone[0]] == [a.ids.tolist() for a in found[0]]
    greedy = made.answers([[4, 5]], GeneratingArguments(do_sample=False, max_new_tokens=3), [(0, 1)], samples=2)
    assert [len(a.ids) for a in greedy[0]] == [3, 3]
    assert (server[1].asked[-1][1]["n"], server[1].asked[-1][1]["temperature"]) == (1, 0.0)
    assert made.answers([], ARGS, []) == []


def test_each_version_is_loaded_and_the_last_one_taken_away(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> None:
    made, other = engine(server, tokenizer), engine(server, tokenizer)
    with pytest.raises(ModelError, match="has no adapter yet; sync comes before answers"):
        made.answers([[4]], ARGS, [(0,)])
    other.sync(adapter, 1)  # another run at the same server
    for version in (1, 2):
        made.sync(adapter, version)
        mine = [name for name in server[1].adapters if name != other._adapter]
        assert mine == [made._adapter]
        assert mine[0].startswith(f"tunesmith-{version}-")
        assert server[1].adapters[mine[0]] == str(adapter.resolve())
        made.answers([[4]], ARGS, [(0,)])
        assert server[1].asked[-1][1]["model"] == mine[0]
    with pytest.raises(ModelError, match="version 2 is there already"):
        made.sync(adapter, 2)


@pytest.mark.parametrize("status", [400, 404])
def test_a_server_that_takes_no_adapter_ends_the_run(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path, status: int
) -> None:
    made = engine(server, tokenizer)
    made.sync(adapter, 1)
    server[1].refuses = {"load_lora_adapter": status}
    words = rf"status {status} .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora --max-lora-rank 16"
    with pytest.raises(ModelError, match=words):
        made.sync(adapter, 2)
    above = {"needs": [{"folder": "runs/sft", "sha256": "0"}], "contains": []}  # as checkpoints are, not finished runs
    (adapter / "origin.json").write_text(json.dumps(above))
    with pytest.raises(ModelError, match="was trained on top of runs/sft and fits no base without"):
        made.sync(adapter, 3)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter \(adapter_config\.json\); set finetuning_type: lora"):
        made.sync(adapter, 3)


def test_a_server_that_gives_text_alone(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = tokenizer.encode("the cat", add_special_tokens=False)

    def change(answer: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"index": i, "text": "the cat", "finish_reason": "stop"} for i in range(len(answer["choices"]))]}

    server[1].change = staticmethod(change)
    made = engine(server, tokenizer)
    made.sync(adapter, 1)
    ((one, two),) = made.answers([[4]], GeneratingArguments(max_new_tokens=len(said) + 1), [(0,)], samples=2)
    assert (one.ids.tolist(), one.ended) == (two.ids.tolist(), two.ended) == ([*said, END], True)
    ((cut,),) = made.answers([[4]], GeneratingArguments(max_new_tokens=len(said)), [(0,)])
    assert (cut.ids.tolist(), cut.ended) == (said, False)
    assert caplog.text.count("gives no token_ids") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda answer: {"error": "x"}, "expected 1 choices with their index, found"),
        (lambda answer: {"choices": []}, "expected 1 choices"),
        (lambda answer: "<html>", "expected JSON, found '<html>'"),
        (lambda answer: {"choices": [{**answer["choices"][0], "finish_reason": "abort"}]}, "finish_reason stop or length, found 'abort'"),
        (lambda answer: {"choices": [{**answer["choices"][0], "token_ids": [10**6]}]}, "none of the policy's"),
        (lambda answer: {"choices": [{"index": 0, "finish_reason": "stop"}]}, "neither token_ids nor text"),
    ],
)  # fmt: skip
def test_what_a_server_may_not_say(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path, change: Any, words: str
) -> None:
    server[1].change = staticmethod(change)
    made = engine(server, tokenizer)
    made.sync(adapter, 1)
    with pytest.raises(ModelError, match=words):
        made.answers([[4]], ARGS, [(0,)])


def test_failures_that_may_pass_are_tried_again(
    server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> None:
    made = engine(server, tokenizer)
    made.sync(adapter, 1)
    server[1].refuses = {"completions": 503}
    with pytest.raises(ModelError, match=r"rollout_url: .* status 503 .*tried 4 times"):
        made.answers([[4]], ARGS, [(0,)])
    assert [verb for verb, _, _ in server[1].asked].count("completions") == 4
    with pytest.raises(ModelError, match="prompt 1 of 20 tokens cannot be answered"):
        made.answers([[4] * 20], ARGS, [(0,)])
    with pytest.raises(ModelError, match="num_beams: only rollout_engine: local searches"):
        made.answers([[4]], GeneratingArguments(num_beams=2), [(0,)])


def test_a_policy_learns_from_a_servers_answers(
    server: tuple[str, Any], settings: dict[str, Any], write_config: Any, tmp_path: Path
) -> None:
    server[1].says = staticmethod(
        lambda prompt, seed, index, most: ([3 + (seed + index) % 200] * (1 + index % 3) + [END], "stop")
    )
    given = {
        **settings, "stage": "grpo", "reward_functions": "length", "reward_options": {"length": {"target": 3, "unit": "tokens"}},
        "num_generations": 4, "max_new_tokens": 8, "rollout_engine": "api", "rollout_url": server[0], "max_steps": 3,
    }  # fmt: skip
    tunesmith("train", write_config(given))
    assert len(server[1].loaded) == 3  # one for each rollout, of which each taught something
    assert len(set(server[1].loaded)) == 3
    assert len(server[1].adapters) == 1
    log = [entry for entry in read_log(Path(given["output_dir"])) if "loss" in entry]
    assert [entry["policy_kl"] for entry in log] == [0.0] * 3  # the ratio of the first pass is 1, whoever sampled
    server[1].refuses = {"load_lora_adapter": 404}
    done = tunesmith("train", write_config({**given, "output_dir": str(tmp_path / "other")}), check=False)
    assert done.returncode
    assert "does not take the policy's adapter" in done.stderr


# ---- vLLM in this process


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Modules with vLLM's classes, called as 0.33 has them."""
    seen: dict[str, Any] = {"generated": []}

    class SamplingParams:
        def __init__(
            self, n: int = 1, *, presence_penalty: float, frequency_penalty: float, repetition_penalty: float, temperature: float, top_p: float, top_k: int, min_p: float, seed: int,
            stop_token_ids: list[int], max_tokens: int, detokenize: bool,
        ) -> None:  # fmt: skip
            self.__dict__.update({name: value for name, value in locals().items() if name != "self"})

    class LoRARequest:
        def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
            assert lora_int_id > 0
            self.lora_name, self.lora_int_id, self.lora_path = lora_name, lora_int_id, lora_path

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen["made"] = {"model": model, **options}

        def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
            seen["generated"].append((prompts, sampling_params, lora_request))
            outputs = []
            for prompt, how in zip(prompts, sampling_params, strict=True):
                said = [says(prompt["prompt_token_ids"], how.seed, index, how.max_tokens) for index in range(how.n)]
                outputs.append(SimpleNamespace(outputs=[
                    SimpleNamespace(index=i, token_ids=tuple(ids), finish_reason=reason, stop_reason=None)
                    for i, (ids, reason) in enumerate(said)
                ]))  # fmt: skip
            return outputs

    package, request = ModuleType("vllm"), ModuleType("vllm.lora.request")
    package.__dict__.update(SamplingParams=SamplingParams, LLM=LLM)
    request.__dict__.update(LoRARequest=LoRARequest)
    for name, module in (("vllm", package), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_vllm_answers_as_a_server_does(
    vllm: dict[str, Any], server: tuple[str, Any], tokenizer: PreTrainedTokenizerBase, adapter: Path
) -> None:
    made, remote = VllmEngine("base", [END], rank=12, longest=20), engine(server, tokenizer)
    assert vllm["made"] == {"model": "base", "dtype": "bfloat16", "enable_lora": True, "max_lora_rank": 16, "max_model_len": 20,
                            "gpu_memory_utilization": 0.4}  # fmt: skip
    with pytest.raises(ModelError, match="has no adapter yet"):
        made.answers([[4]], ARGS, [(0,)])
    for version in (1, 2):
        made.sync(adapter, version)
        remote.sync(adapter, version)
        prompts, keys = [[4, 5], [3, 4, 5, 6, 7, 8, 9]], [(version, 0), (version, 1)]
        ours, theirs = (one.answers(prompts, ARGS, keys, samples=2, seed=7) for one in (made, remote))
        assert [[(a.ids.tolist(), a.ended) for a in row] for row in ours] == [
            [(a.ids.tolist(), a.ended) for a in row] for row in theirs
        ]
        assert [row[0].ended for row in ours] == [True, False]
        request = vllm["generated"][-1][2]
        assert (request.lora_name, request.lora_int_id, request.lora_path) == (f"tunesmith-{version}", version, str(adapter))
    assert made.statistics.tokens == remote.statistics.tokens > 0
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 24}))
    with pytest.raises(ModelError, match=r"was started for adapters of rank 16, and .* has 24"):
        made.sync(adapter, 3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"finetuning_type": "full"},
            "rollout_engine: vllm is given an adapter before each rollout; set finetuning_type: lora",
        ),
        ({"use_dora": True}, "use_dora: vLLM takes plain LoRA only"),
        ({"quantization_bit": 4}, "rollout_engine: vllm runs the base as it is, and here it is quantised"),
        ({"rollout_engine": "api"}, "rollout_url: belongs to rollout_engine: api"),
    ],
)
def test_policies_that_cannot_be_handed_over(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    given = {"model_name_or_path": "m", "stage": "grpo", "dataset": "rows", "output_dir": "x", "reward_functions": "format",
             "per_device_train_batch_size": 8, "rollout_engine": "vllm", **values}  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "c.yaml")


def test_vllm_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"needs the package vllm .*pip install 'tunesmith\[vllm\]'"):
        VllmEngine("base", [END], rank=8)
    with pytest.raises(ModelError, match="adapters of rank 512 at most, and the policy's has 1024"):
        VllmEngine("base", [END], rank=1024)
