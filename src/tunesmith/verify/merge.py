"""Proof that a merged model answers as its base with its adapter does.

The reference is computed by plain transformers and PEFT in a process of its own (``verify/plain.py``), which also reloads what
was written. Differences are those of logits on a few prompts and on rows of random tokens, in float32 arithmetic.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.library import quiet_library
from tunesmith.model.merge import Merged, merge_adapter
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.train.finished import Finished, open_finished, tokenizer_of

Dtype = Literal["bf16", "fp16", "fp32"]

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "fp16": 2.5e-3, "bf16": 2e-2}
"""fp32: greatest difference of a logit, where logits are up to 10; of larger ones 1e-5 of the largest, as float32 resolves no
better. Else: root mean square of the differences relative to that of the logits."""

_PROMPTS = ("Once upon a time, there was", "The capital of France is", "def add(a, b):\n    return", "你好，请介绍一下你自己。")
_RANDOM_ROWS = 4
_ROW_LENGTH = 32
_NEW_TOKENS = 8
_SCRIPT = Path(__file__).with_name("plain.py")


@dataclass(frozen=True)
class Difference:
    """Between two sets of logits: the greatest, and the root mean square relative to that of the logits."""

    max: float
    relative: float


@dataclass(frozen=True)
class Proof:
    """What the comparison found.

    Attributes:
        dtype: in which the weights are stored.
        tolerance: of ``export`` (see ``TOLERANCE``), and of ``merged`` in fp32.
        merged: the merged model before it was written, in float32, against base and adapter; None where nothing was merged.
        export: what was written and reloaded, against base and adapter.
        trained_on: base and adapter against the quantised base and adapter that training saw; None where it was not
            quantised, or cannot be measured.
        largest_logit: of base and adapter.
        agree: prompts of which the greedy continuations are the same, of ``prompts``.
        problems: what is wrong; empty if nothing is.
    """

    dtype: Dtype
    tolerance: float
    merged: Difference | None
    export: Difference
    trained_on: Difference | None
    largest_logit: float
    agree: int
    prompts: int
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The findings in words."""
        if self.merged is not None:
            yield f"merged in fp32: greatest difference of a logit {self.merged.max:.2e}, logits up to {self.largest_logit:.1f}"
        what = "written and reloaded" if self.dtype == "fp32" else f"cast to {self.dtype} and reloaded"
        yield f"{what}: greatest difference {self.export.max:.2e}, relative {self.export.relative:.2e}"
        yield f"greedy continuations: {self.agree} of {self.prompts} prompts the same over {_NEW_TOKENS} tokens"
        if self.trained_on is not None:
            yield (
                f"the run was trained on a quantised base; the unquantised one differs from it by {self.trained_on.max:.2e} "
                f"(relative {self.trained_on.relative:.2e})"
            )
        yield from self.problems


def verify_merge(target: Path, base: str | None = None, tolerance: float | None = None) -> Proof:
    """Merge a run's adapter in a temporary folder and compare; nothing is kept.

    Args:
        target: run folder, or adapter.
        base: see ``open_finished``.
        tolerance: greatest difference of a logit, in place of 1e-4.

    Raises:
        CheckpointError, ModelError: what it consists of cannot be loaded or merged; a run of all weights has nothing to merge.
    """
    quiet_library()
    finished = open_finished(target, base)
    if finished.base is None:
        raise ModelError(f"{target}: holds a whole model; there is nothing to merge")
    tokenizer = tokenizer_of(finished)
    with tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as scratch:
        folder = Path(scratch) / "merged"
        merged: Merged | None = merge_adapter(finished.base, target, tokenizer, finished.weights)
        assert merged is not None
        check = Check(finished, tokenizer, Path(scratch))
        check.note(merged.model)
        merged.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        merged = None  # its memory is for the other process
        return check.prove(folder, "fp32", tolerance)


class Check:
    """Compares what was made of a finished run with the run itself.

    Args:
        finished: the run or adapter.
        tokenizer: for the prompts.
        scratch: folder for logits.
    """

    def __init__(self, finished: Finished, tokenizer: PreTrainedTokenizerBase, scratch: Path) -> None:
        self.finished = finished
        self.rows = test_rows(tokenizer)
        self.tokens = len(tokenizer)
        self.file = scratch / "logits.safetensors"

    @torch.no_grad()
    def note(self, model: PreTrainedModel) -> None:
        """Keep the logits of the merged model, as they are before it is written."""
        model.eval()
        logits = {str(i): model(input_ids=torch.tensor([row])).logits[0].float() for i, row in enumerate(self.rows)}
        save_file({name: tensor.contiguous() for name, tensor in logits.items()}, self.file)

    def prove(self, folder: Path, dtype: Dtype, tolerance: float | None = None, adapter: bool = False) -> Proof:
        """Reload ``folder`` in a fresh process and compare. ``adapter``: it holds an adapter, and not a whole model.

        Raises:
            ModelError: the process failed.
        """
        found = in_fresh_process(self.asked(folder, adapter))
        return judge(found, dtype, tolerance)

    def asked(self, folder: Path, adapter: bool = False) -> dict[str, Any]:
        """What ``verify/plain.py`` is to compare."""
        reference = self._reference()
        export = {**reference, "adapter": str(folder)} if adapter else _model(str(folder))
        return {
            "reference": reference,
            "export": export,
            "rows": self.rows,
            "tokens": self.tokens,
            "prompts": len(_PROMPTS),
            "new_tokens": _NEW_TOKENS,
            "merged": str(self.file) if self.file.is_file() else None,
            "trained_on": self._trained_on(),
        }

    def _reference(self) -> dict[str, Any]:
        finished = self.finished
        if finished.base is None:
            return _model(str(finished.folder))
        source = locate(finished.base)
        return {
            **_model(str(source.path), {"trust_remote_code": source.trusted}),
            "adapter": str(finished.folder),
            "weights": [str(f) for f in finished.weights],
            "vocabulary": [len(read_tokenizer(source.path)), self.tokens],
        }

    def _trained_on(self) -> dict[str, Any] | None:
        args = self.finished.trained_on
        return None if args is None else {**self._reference(), "quantisation": _bits(args)}


def _model(path: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"path": path, "options": options or {}, "adapter": None, "weights": [], "vocabulary": None, "quantisation": None}


def _bits(args: ModelArguments) -> dict[str, Any]:
    if args.quantization_bit == 8:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": args.quantization_type,
        "bnb_4bit_use_double_quant": args.double_quantization,
        "bnb_4bit_compute_dtype": "float32",
    }


def test_rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few prompts, and of rows drawn at random; the same for the same tokenizer."""
    prompts = [tokenizer(text)["input_ids"][:_ROW_LENGTH] for text in _PROMPTS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(tokenizer), (_RANDOM_ROWS, _ROW_LENGTH), generator=generator)
    return [*prompts, *drawn.tolist()]


test_rows.__test__ = False  # type: ignore[attr-defined]


def in_fresh_process(asked: dict[str, Any]) -> dict[str, Any]:
    """Run ``verify/plain.py``. Raises ModelError with its last words when it fails."""
    command = [sys.executable, "-P", str(_SCRIPT)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{asked['export']['path']}: plain transformers and PEFT cannot compare it: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judge(found: dict[str, Any], dtype: Dtype, tolerance: float | None = None) -> Proof:
    """Hold what ``verify/plain.py`` found against the tolerances."""
    scaled = {**TOLERANCE, "fp32": TOLERANCE["fp32"] * max(1.0, found["largest_logit"] / 10)}
    limits = {**scaled, **({dtype: tolerance} if tolerance is not None else {})}
    merged, export, trained_on = (Difference(**found[k]) if k in found else None for k in ("merged", "export", "trained_on"))
    assert export is not None
    problems = []
    if merged is not None and not merged.max <= limits["fp32"]:
        problems.append(f"the merged model differs from base and adapter by {merged.max:.2e} (tolerance {limits['fp32']:.1e})")
    distance = export.max if dtype == "fp32" else export.relative
    if not distance <= limits[dtype]:
        problems.append(f"what was written differs from base and adapter by {distance:.2e} (tolerance {limits[dtype]:.1e})")
    if found["missing"] or found["unexpected"]:
        problems.append(f"weights missing from the export: {found['missing'][:3]}, unexpected: {found['unexpected'][:3]}")
    return Proof(
        dtype, limits[dtype], merged, export, trained_on, found["largest_logit"], found["agree"], found["prompts"],
        tuple(problems),
    )  # fmt: skip
