"""Answers from elsewhere: a server that speaks the OpenAI API, or vLLM in this process; both take the policy's adapter.

They are asked as the local engine is (``batch.py: BatchEngine.answers``). Before each rollout ``sync`` hands over the adapter
as it is then; an engine that does not take it ends the run, because answers of an older policy are answers of another one.
"""

from __future__ import annotations

import importlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import GeneratingArguments
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ModelError
from tunesmith.generate.batch import Answer, Statistics
from tunesmith.generate.room import room_for
from tunesmith.model.endpoint import Endpoint, RefusedError
from tunesmith.model.files import ADAPTER_CONFIG, read_json
from tunesmith.model.origin import check_alone

log = logging.getLogger(__name__)

KEY_VARIABLE = "TUNESMITH_ROLLOUT_KEY"
"""Environment variable with the key that a server asks for; sent as a bearer token, written nowhere."""
_TIMEOUT = 600.0
"""Seconds for all answers to one prompt, waiting in the server's queue included."""
_AT_ONCE = 64
"""Requests under way; the server batches them."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as its highest rank."""

Tokens = np.ndarray | Sequence[int]


class OpenAIEngine:
    """``rollout_engine: api``: asks ``{url}/completions``, one request for each prompt, many at once.

    vLLM gives back the sampled tokens (``return_token_ids``). Of a server that gives text alone the text is tokenised,
    which may be other tokens than those that were sampled; the log says so once.

    Args:
        url: with the version, e.g. ``http://127.0.0.1:8000/v1``.
        tokenizer: of the policy.
        end_ids: tokens that end an answer.
        longest: tokens that the model takes, prompt and answer; None: not said.
        timeout: seconds for all answers to a prompt.
        pause: seconds before a second attempt; see ``Endpoint``.

    Attributes:
        statistics: of all calls.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Sequence[int],
        longest: int | None = None,
        timeout: float = _TIMEOUT,
        pause: float = 1.0,
    ) -> None:
        assert end_ids, "an engine needs an end token"
        self.url = url.rstrip("/")
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self.longest = longest
        self.statistics = Statistics()
        self._tokenizer = tokenizer
        self._server = Endpoint(f"rollout_url: {self.url}", KEY_VARIABLE, timeout, pause=pause)
        self._mark = secrets.token_hex(4)  # no other run's adapter has this name
        self._adapter: str | None = None
        self._said_text = False
        self._lock = threading.Lock()

    def sync(self, folder: Path, version: int) -> None:
        """Answer from now on with the adapter in a folder, under a name of its own; the one before is taken away.

        Args:
            folder: with all of the policy that is not the base, as ``save_finished`` writes it; the server reads it there.
            version: of the policy; another one at each call.

        Raises:
            ModelError: there is no adapter, it fits no base alone, or the server does not take it.
        """
        path, rank = _adapter_in(folder, "api")
        name = f"tunesmith-{version}-{self._mark}"
        if name == self._adapter:
            raise ModelError(f"{self._server.where}: version {version} is there already; each needs a number of its own")
        try:
            self._server.ask(f"{self.url}/load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, "text")
        except RefusedError as error:
            raise ModelError(
                f"{error}. The server does not take the policy's adapter in {path}: start it on the same base model, where it "
                "can read this folder, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and "
                f"--enable-lora --max-lora-rank {_most(rank)}"
            ) from None
        before, self._adapter = self._adapter, name
        if before is not None:
            try:
                self._server.ask(f"{self.url}/unload_lora_adapter", {"lora_name": before}, "text")
            except RefusedError as error:
                log.warning("%s; the adapter %s stays in the server's memory", error, before)

    def answers(
        self,
        prompts: Sequence[Tokens],
        args: GeneratingArguments,
        keys: Sequence[tuple[int, ...]],
        samples: int = 1,
        room: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """Answer each prompt ``samples`` times; args, returns, raises: as ``BatchEngine.answers``.

        Raises:
            ModelError: also where the server fails, refuses, or answers something else.
        """
        asked = _asked(prompts, args, keys, samples, self.longest, room, seed)
        began = time.perf_counter()
        with ThreadPoolExecutor(min(_AT_ONCE, max(len(asked), 1))) as pool:
            jobs = [pool.submit(self._one, ids, how) for ids, how in asked]
            try:
                found = _repeated([job.result() for job in jobs], samples)
            finally:
                for job in jobs:
                    job.cancel()
        _count(self.statistics, asked, found, began)
        return found

    def _one(self, ids: list[int], how: dict[str, Any]) -> list[Answer]:
        """All answers to a prompt."""
        if self._adapter is None:
            raise ModelError(f"{self._server.where}: has no adapter yet; sync comes before answers")
        question = {
            **how,
            "model": self._adapter,
            "prompt": ids,
            "stop_token_ids": list(self.end_ids),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        found = self._server.ask(f"{self.url}/completions", question)
        choices = found.get("choices") if isinstance(found, dict) else None
        by_index = {one.get("index"): one for one in choices if isinstance(one, dict)} if isinstance(choices, list) else {}
        if by_index.keys() != set(range(how["n"])):
            raise ModelError(f"{self._server.where}: expected {how['n']} choices with their index, found {str(found)[:200]!r}")
        return [self._answer(by_index[index], how["max_tokens"]) for index in range(how["n"])]

    def _answer(self, choice: dict[str, Any], most: int) -> Answer:
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise ModelError(f"{self._server.where}: expected finish_reason stop or length, found {reason!r}")
        if ids is None:
            ids = self._tokenised(choice.get("text"))
        if not isinstance(ids, list) or not all(isinstance(one, int) and 0 <= one < len(self._tokenizer) for one in ids):
            raise ModelError(
                f"{self._server.where}: token_ids are none of the policy's; start the server on the same base model"
            )
        if reason == "stop":
            stop = choice.get("stop_reason")
            end = stop if isinstance(stop, int) else self._end
            if not ids or ids[-1] not in (*self.end_ids, end):
                ids = [*ids, end]
        ended = reason == "stop" and len(ids) <= most  # a text may be more tokens than it was
        return Answer(np.array(ids[:most], dtype=np.int32), ended)

    @cached_property
    def _end(self) -> int:
        """The token with which the template ends a turn."""
        ids = self._tokenizer.encode(ChatTemplate(self._tokenizer).turn_ending, add_special_tokens=False)
        return next((one for one in ids if one in self.end_ids), self.end_ids[0])

    def _tokenised(self, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise ModelError(f"{self._server.where}: a choice has neither token_ids nor text")
        with self._lock:
            if not self._said_text:
                log.warning(
                    "%s: gives no token_ids; its texts are tokenised, which may be other tokens than those that it sampled",
                    self.url,
                )
            self._said_text = True
            return list(self._tokenizer.encode(text, add_special_tokens=False))


class VllmEngine:
    """``rollout_engine: vllm``: vLLM in this process, beside the model that is trained.

    Args:
        model: folder of the base model.
        end_ids: tokens that end an answer.
        rank: of the policy's adapter, with those of earlier ones that it is joined with added.
        dtype: name of the dtype of matrix products, ``bfloat16``, ``float16`` or ``float32``.
        longest: tokens of prompt and answer, at most; None: as the model says.
        memory: share of the GPU's memory that vLLM takes; training needs the rest.

    Attributes:
        statistics: of all calls.

    Raises:
        ModelError: the package is missing, or the rank is higher than it takes.
    """

    def __init__(
        self,
        model: str,
        end_ids: Sequence[int],
        rank: int,
        dtype: str = "bfloat16",
        longest: int | None = None,
        memory: float = 0.4,
    ) -> None:
        assert end_ids, "an engine needs an end token"
        self._most_rank = _most(rank)
        self._sampling: Callable[..., Any] = _vllm("vllm").SamplingParams
        self._request: Callable[..., Any] = _vllm("vllm.lora.request").LoRARequest
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self.longest = longest
        self.statistics = Statistics()
        self._llm = _vllm("vllm").LLM(
            model=model, dtype=dtype, enable_lora=True, max_lora_rank=self._most_rank, max_model_len=longest,
            gpu_memory_utilization=memory,
        )  # fmt: skip
        self._adapter: Any = None
        self._versions = 0

    def sync(self, folder: Path, version: int) -> None:
        """Answer from now on with the adapter in a folder, which has to stay until the next call.

        Args:
            folder: with all of the policy that is not the base, as ``save_finished`` writes it.
            version: of the policy.

        Raises:
            ModelError: there is no adapter, it fits no base alone, or its rank is higher than was said.
        """
        path, rank = _adapter_in(folder, "vllm")
        if rank > self._most_rank:
            raise ModelError(f"rollout_engine: vllm was started for adapters of rank {self._most_rank}, and {path} has {rank}")
        self._versions += 1  # what it knows an adapter by
        self._adapter = self._request(f"tunesmith-{version}", self._versions, str(path))

    def answers(
        self,
        prompts: Sequence[Tokens],
        args: GeneratingArguments,
        keys: Sequence[tuple[int, ...]],
        samples: int = 1,
        room: Sequence[int] | None = None,
        seed: int = 0,
    ) -> list[list[Answer]]:
        """Answer each prompt ``samples`` times; args, returns, raises: as ``BatchEngine.answers``."""
        if self._adapter is None:
            raise ModelError("rollout_engine: vllm has no adapter yet; sync comes before answers")
        asked = _asked(prompts, args, keys, samples, self.longest, room, seed)
        began = time.perf_counter()
        how = [self._sampling(**settings, stop_token_ids=list(self.end_ids), detokenize=False) for _, settings in asked]
        rows = [{"prompt_token_ids": ids} for ids, _ in asked]
        outputs = self._llm.generate(rows, how, lora_request=self._adapter, use_tqdm=False) if asked else []
        found = [
            [
                Answer(np.array(one.token_ids, dtype=np.int32), one.finish_reason == "stop")
                for one in sorted(output.outputs, key=lambda one: one.index)
            ]
            for output in outputs
        ]
        found = _repeated(found, samples)
        _count(self.statistics, asked, found, began)
        return found


def _vllm(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(
            f"rollout_engine: vllm needs the package vllm ({error}): pip install 'tunesmith[vllm]', or set it to local"
        ) from None


# ---- what both do


Asked = list[tuple[list[int], dict[str, Any]]]
"""Tokens of each prompt, and how it is to be answered."""


def _asked(
    prompts: Sequence[Tokens],
    args: GeneratingArguments,
    keys: Sequence[tuple[int, ...]],
    samples: int,
    longest: int | None,
    room: Sequence[int] | None,
    seed: int,
) -> Asked:
    """Prompts and settings; all are said, because a server's defaults may be those of ``generation_config.json``."""
    assert len(keys) == len(prompts) and (room is None or len(room) == len(prompts))
    if args.num_beams > 1:
        raise ModelError("num_beams: only rollout_engine: local searches; remove the key")
    settings = {
        "temperature": args.temperature if args.do_sample else 0.0,
        "top_p": args.top_p if args.do_sample else 1.0,
        "top_k": (args.top_k or -1) if args.do_sample else -1,
        "min_p": 0.0,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "n": samples if args.do_sample else 1,
    }
    asked: Asked = []
    for number, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        ids = [int(one) for one in prompt]
        most = room_for(number, len(ids), args, longest, None if room is None else room[number])
        asked.append((ids, {**settings, "seed": _seed(seed, key), "max_tokens": most}))
    return asked


def _seed(seed: int, key: Sequence[int]) -> int:
    """A number for a prompt; vLLM adds that of the sample."""
    return int(np.random.SeedSequence([seed, *key]).generate_state(1, np.uint64)[0] >> 12)


def _repeated(found: list[list[Answer]], samples: int) -> list[list[Answer]]:
    """The only answer where nothing is drawn, as often as was asked for."""
    return [answers * samples if len(answers) == 1 else answers for answers in found]


def _most(rank: int) -> int:
    """The next rank that vLLM can be started with."""
    for known in _RANKS:
        if known >= rank:
            return known
    raise ModelError(f"rollout_engine: vLLM takes adapters of rank {_RANKS[-1]} at most, and the policy's has {rank}")


def _adapter_in(folder: Path, engine: str) -> tuple[Path, int]:
    """Where an adapter is, and its highest rank."""
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(f"rollout_engine: {engine}: {folder} holds no adapter ({ADAPTER_CONFIG}); set finetuning_type: lora")
    check_alone(folder, f"rollout_engine: {engine}")
    config = read_json(folder / ADAPTER_CONFIG)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return folder.resolve(), max((rank for rank in ranks if isinstance(rank, int)), default=0)


def _count(statistics: Statistics, asked: Asked, found: list[list[Answer]], began: float) -> None:
    statistics.seconds += time.perf_counter() - began
    statistics.prompt_tokens += sum(len(ids) for ids, _ in asked)
    statistics.tokens += sum(len(answer.ids) for answers in found for answer in answers)
    statistics.most_rows = max(statistics.most_rows, sum(map(len, found)))
