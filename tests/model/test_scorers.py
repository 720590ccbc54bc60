"""Reward functions and servers: what they are given, and every way in which they can fail."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.reward import Scorer, load_reward_model
from tunesmith.model.scorers import EndpointScorer
from tunesmith.types import Conversation, Message, Source


def answered(*pairs: tuple[str, str]) -> list[Conversation]:
    return [
        Conversation((Message("user", prompt), Message("assistant", answer)), Source("rows", "rows.jsonl", i, i))
        for i, (prompt, answer) in enumerate(pairs, 1)
    ]


TWO = answered(("2 + 2?", "4"), ("你好", "世界 and more"))


def scorer(named: str, kind: Any = "function", **values: Any) -> Scorer:
    return load_reward_model(ModelArguments(model_name_or_path="m", reward_model=named, reward_model_type=kind, **values))


# ---- functions


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def written(body: str) -> str:
        (tmp_path / "score.py").write_text(body, encoding="utf-8")
        return f"{tmp_path / 'score.py'}:reward"

    return written


def test_a_function_scores(write: Callable[[str], str]) -> None:
    made = scorer(write("import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: int = 1\n"
                        "def reward(prompts, responses):\n  return [len(p) + len(r) / 10 for p, r in zip(prompts, responses)]\n"))  # fmt: skip
    scores = made.scores(TWO)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor([6.1, 3.1]))
    assert made.scores([]).shape == (0,)


def test_a_file_that_has_changed_is_run_again(write: Callable[[str], str]) -> None:
    for value in (1, 22):
        assert (
            scorer(write(f"def reward(prompts, responses):\n  return [{value}, {value}]\n")).scores(TWO).tolist() == [value] * 2
        )


def test_what_it_is_given(write: Callable[[str], str], tmp_path: Path) -> None:
    note = tmp_path / "given"
    made = scorer(
        write(
            f"import pathlib\ndef reward(*given):\n  pathlib.Path({str(note)!r}).write_text(repr(given), 'utf-8')\n  return [1]\n"
        )
    )
    turns = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Yes?"), Message("user", "2 + 2?"))
    made.scores([Conversation((*turns, Message("assistant", " 4\n")), Source("rows", "rows.jsonl", 1, 1))])
    assert note.read_text(encoding="utf-8") == repr((["Be brief.\n\nHi\n\nYes?\n\n2 + 2?"], [" 4\n"]))
    with pytest.raises(ModelError, match=r"\(row 3\): ends with a turn by the user; expected the assistant's answer"):
        made.scores([Conversation(turns, Source("rows", "rows.jsonl", 3, 3))])


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "expected a list of 2 numbers, found a NoneType"),
        ("(x for x in (1.0, 2.0))", "found a generator"),
        ("[1.0]", "expected 2 numbers, one for each answer in order, found 1"),
        ("[1.0, '2']", r"score 1 \(of rows.jsonl:2 \(row 2\)\): expected a number, found a str \('2'\)"),
        ("[1.0, None]", "found a NoneType"),
        ("[float('nan'), 1.0]", r"score 0 \(of rows.jsonl:1 \(row 1\)\): expected a finite number .* found nan"),
        ("[1.0, float('inf')]", "score 1 .* found inf"),
        ("[1.0, 1e39]", r"score 1 .* \(of float32\), found 1e\+39"),
        ("[1.0, 10 ** 400]", "score 1 .* finite"),
    ],
)
def test_what_it_may_return(write: Callable[[str], str], returned: str, words: str) -> None:
    with pytest.raises(ModelError, match=rf"^reward_model: .*score\.py:reward: .*{words}"):
        scorer(write(f"def reward(prompts, responses):\n  return {returned}\n")).scores(TWO)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "  return [1 / (r == '4') for r in responses]\n",
            r"raised at rows\.jsonl:2 \(row 2\): ZeroDivisionError: .* \(line 2\)",
        ),
        ("  raise SystemExit(0)\n", r"raised at rows\.jsonl:1 \(row 1\): SystemExit: 0 \(line 2\)"),
        ("  return [1.0] if len(prompts) == 1 else {}[0]\n", "raised for 2 rows, though for none alone: KeyError"),
    ],
)
def test_a_function_that_raises(write: Callable[[str], str], body: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        scorer(write(f"def reward(prompts, responses):\n{body}")).scores(TWO)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def score(prompts, responses): ...\n", "the file has no function 'reward'; it has score"),
        ("reward = 3\n", "the file has no function 'reward'; it has none"),
        ("import nowhere_to_be_found\n", r"cannot be imported: ModuleNotFoundError: .* \(line 1\)"),
        ("def reward(:\n", "cannot be imported: SyntaxError"),
        ("raise SystemExit\n", "cannot be imported: SystemExit"),
    ],
)
def test_a_file_that_has_none(write: Callable[[str], str], body: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        scorer(write(body))


# ---- how it is named


@pytest.mark.parametrize(
    ("kind", "named", "words"),
    [
        ("function", "score.py", r"does not say which function of the file; expected score\.py:name"),
        ("function", "score.py:", "does not say which function"),
        ("function", "score.py:a.b", "does not say which function"),
        ("function", "nowhere.py:reward", r"no such file: nowhere\.py"),
        ("function", "runs/rm", r"looks like reward_model_type: lora; with function, expected path/to/file\.py:name"),
        ("lora", "score.py:reward", "looks like reward_model_type: function; with lora, expected the folder of an adapter"),
        ("full", "http://127.0.0.1/x", "looks like reward_model_type: api; with full, expected"),
        ("api", "runs/rm", "looks like reward_model_type: lora; with api, expected an address"),
        ("api", "file:///etc/passwd", "is no address; expected an address, http"),
        ("api", "http://", "is no address"),
        ("api", "http://h:port/", "is no address"),
        ("api", "http://h/a b", "is no address"),
        (
            "api",
            "https://me:secret@h/",
            "holds a name or password, which would be saved with the run; set TUNESMITH_REWARD_KEY",
        ),
    ],
)
def test_names_that_cannot_be(kind: str, named: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^reward_model: .*{words}"):
        scorer(named, kind)


def test_keys_that_do_not_go_together(write: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match="reward_timeout: has no meaning with reward_model_type: function, only with api"):
        scorer(write("def reward(p, r): ..."), reward_timeout=3)
    with pytest.raises(ConfigError, match="reward_model: is needed with reward_model_type: api"):
        load_reward_model(ModelArguments(model_name_or_path="m", reward_model_type="api"))


# ---- servers


class Server(BaseHTTPRequestHandler):
    """Gives the answers that it was told, in order, the last one for ever; notes what it was asked."""

    answers: list[tuple[int, bytes, dict[str, str]]]
    asked: list[dict[str, Any]]
    wait: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
        status, data, headers = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if status == 0:
            self.wait.wait(5)
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        return


Serve = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("TUNESMITH_REWARD_KEY", raising=False)
    wait, running = threading.Event(), []

    def start(*answers: tuple[int, Any] | tuple[int, Any, dict[str, str]]) -> tuple[str, list[dict[str, Any]]]:
        told = [
            (one[0], one[1] if isinstance(one[1], bytes) else json.dumps(one[1]).encode(), one[2] if len(one) > 2 else {})
            for one in answers
        ]
        asked: list[dict[str, Any]] = []
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (Server,), {"answers": told, "asked": asked, "wait": wait})
        )
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/score", asked

    yield start
    wait.set()
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


GOOD = (200, {"scores": [0.5, -2]})


def test_a_server_scores(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    address, asked = serve(GOOD)
    made = scorer(address, "api")
    assert made.scores(TWO).tolist() == [0.5, -2.0]
    assert asked == [
        {"path": "/score", "key": None, "body": {"prompts": ["2 + 2?", "你好"], "responses": ["4", "世界 and more"]}}
    ]
    monkeypatch.setenv("TUNESMITH_REWARD_KEY", "s3cret")
    made.scores(TWO)
    assert asked[1]["key"] == "Bearer s3cret"
    assert made.scores([]).shape == (0,)
    assert len(asked) == 2


def test_references_are_sent_where_there_are_any(serve: Serve) -> None:
    address, asked = serve(GOOD)
    made = EndpointScorer(address, 5)
    made.scores(TWO, ["", ""])
    made.scores(TWO, ["4", ""])
    assert "references" not in asked[0]["body"]
    assert asked[1]["body"]["references"] == ["4", ""]


def test_what_passes_is_tried_again(serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_REWARD_KEY", "s3cret")
    address, asked = serve((503, b"s3cret is busy"), (429, b"", {"Retry-After": "0"}), GOOD)
    with caplog.at_level(logging.WARNING):
        assert EndpointScorer(address, 5, pause=0.001).scores(TWO).tolist() == [0.5, -2.0]
    assert len(asked) == 3
    assert "status 503 (Service Unavailable): '*** is busy'; trying again in 0.001 s" in caplog.text
    assert "s3cret" not in caplog.text


def test_a_pause_that_is_no_number_is_not_heeded(serve: Serve) -> None:
    address, asked = serve((429, b"", {"Retry-After": "\xb2"}), GOOD)  # a superscript is a digit too
    assert EndpointScorer(address, 5, pause=0.001).scores(TWO).tolist() == [0.5, -2.0]
    assert len(asked) == 2


def test_what_goes_on_ends_the_run(serve: Serve) -> None:
    address, asked = serve((500, b"out of memory"))
    with pytest.raises(ModelError, match=r"status 500 .*'out of memory'; tried 4 times"):
        EndpointScorer(address, 5, pause=0.001).scores(TWO)
    assert len(asked) == 4
    silent, _ = serve((0, b""))
    with pytest.raises(ModelError, match=r"no answer within 0\.05 s \(reward_timeout\); tried 4 times"):
        EndpointScorer(silent, 0.05, pause=0.001).scores(TWO)
    with pytest.raises(ModelError, match=r"no answer: .*refused.*; tried 4 times"):
        EndpointScorer("http://127.0.0.1:9/", 1, pause=0.001).scores(TWO)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, b"who?"), r"status 401 .*'who\?'; the server wants a key: set the environment variable TUNESMITH_REWARD_KEY"),
        ((404, b""), "status 404"),
        ((302, b"", {"Location": "http://127.0.0.1:9/elsewhere"}), "status 302 .*; give the address that it redirects to"),
        ((307, b"", {"Location": "/elsewhere"}), "status 307 .*; give the address that it redirects to"),
        ((200, b"<html>"), "expected JSON, found '<html>'"),
        ((200, [1, 2]), r'expected \{"scores": \[...\]\}, found .\[1, 2\]'),
        ((200, {"scores": [1]}), "expected 2 numbers, one for each answer in order, found 1"),
        ((200, {"scores": [1, "2"]}), r"score 1 \(of rows\.jsonl:2 \(row 2\)\): expected a number, found a str"),
        ((200, b'{"scores": [1, NaN]}'), "score 1 .* finite number .* found nan"),
    ],
)
def test_what_cannot_pass_ends_at_once(serve: Serve, answer: Any, words: str) -> None:
    address, asked = serve(answer)
    with pytest.raises(ModelError, match=rf"^reward_model: {address}: .*{words}"):
        EndpointScorer(address, 5, pause=0.001).scores(TWO)
    assert len(asked) == 1


def test_a_key_that_cannot_be_sent_is_not_shown(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    address, asked = serve(GOOD)
    monkeypatch.setenv("TUNESMITH_REWARD_KEY", "s3cret\nX-Other: 1")
    with pytest.raises(ModelError, match="TUNESMITH_REWARD_KEY: holds characters that no key has") as caught:
        scorer(address, "api").scores(TWO)
    assert "s3cret" not in str(caught.value)
    assert not asked
