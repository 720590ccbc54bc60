"""Proof that a merged model answers as its base with its adapter does.

The reference is computed by plain transformers and PEFT in a process of its own (``verify/plain.py``), which also reloads what
was written. Differences are those of logits on a few prompts and on rows of random tokens, in float32 arithmetic.
"""

from __future__ import annotations

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
from tunesmith.model.gguf_restore import GgufType
from tunesmith.model.library import quiet_library
from tunesmith.model.merge import Merged, merge_adapter
from tunesmith.model.source import locate
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.train.finished import Finished, open_finished, tokenizer_of
from tunesmith.verify import gguf
from tunesmith.verify.measure import NEW_TOKENS, PROMPTS, TEXTS, Difference, in_fresh_process, model_at, test_rows

Dtype = Literal["bf16", "fp16", "fp32"]

TOLERANCE: dict[Dtype, float] = {"fp32": 1e-4, "fp16": 2.5e-3, "bf16": 2e-2}
"""fp32: greatest difference of a logit, where logits are up to 10; of larger ones 1e-5 of the largest, as float32 resolves no
better. Else: root mean square of the differences relative to that of the logits."""


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
        auto_tokenizer: whether ``AutoTokenizer`` gives the run's tokens.
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
    auto_tokenizer: bool
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
        yield f"greedy continuations: {self.agree} of {self.prompts} prompts the same over {NEW_TOKENS} tokens"
        if self.trained_on is not None:
            yield (
                f"the run was trained on a quantised base; the unquantised one differs from it by {self.trained_on.max:.2e} "
                f"(relative {self.trained_on.relative:.2e})"
            )
        if not self.auto_tokenizer:
            yield (
                "plain AutoTokenizer gives other tokens: it takes the class of the model's kind, whatever the folder says. "
                "PreTrainedTokenizerFast.from_pretrained gives those that were trained on"
            )
        yield from self.problems


def verify_merge(
    target: Path, base: str | None = None, tolerance: float | None = None, trust_remote_code: bool = False
) -> Proof:
    """Merge a run's adapter in a temporary folder and compare; nothing is kept.

    Args:
        target: run folder, or adapter.
        base: see ``open_finished``.
        tolerance: greatest difference of a logit, in place of 1e-4.
        trust_remote_code: see ``open_finished``.

    Raises:
        CheckpointError, ModelError: what it consists of cannot be loaded or merged; a run of all weights has nothing to merge.
    """
    quiet_library()
    finished = open_finished(target, base, trust_remote_code)
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
        self.tokenizer = tokenizer
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

    def prove_gguf(self, folder: Path, file: Path, kind: GgufType, tolerance: float | None = None) -> gguf.GgufProof:
        """Read a GGUF file back in a fresh process and compare it with the exported model in ``folder``.

        Raises:
            ModelError: it cannot be read back.
        """
        return gguf.prove(folder, file, kind, self.tokenizer, tolerance)

    def asked(self, folder: Path, adapter: bool = False) -> dict[str, Any]:
        """What ``verify/plain.py`` is to compare."""
        reference = self._reference()
        export = {**reference, "adapter": str(folder)} if adapter else model_at(str(folder), reference["options"])
        return {
            "reference": reference,
            "export": export,
            "rows": self.rows,
            "tokens": self.tokens,
            "prompts": len(PROMPTS),
            "new_tokens": NEW_TOKENS,
            "texts": {text: self.tokenizer(text)["input_ids"] for text in TEXTS},
            "merged": str(self.file) if self.file.is_file() else None,
            "trained_on": self._trained_on(),
        }

    def _reference(self) -> dict[str, Any]:
        finished = self.finished
        if finished.base is None:
            return model_at(str(finished.folder), {"trust_remote_code": finished.trusted})
        source = locate(finished.base)
        return {
            **model_at(str(source.path), {"trust_remote_code": source.trusted}),
            "adapter": str(finished.folder),
            "weights": [str(f) for f in finished.weights],
            "vocabulary": [len(read_tokenizer(source.path, source.trusted)), self.tokens],
        }

    def _trained_on(self) -> dict[str, Any] | None:
        args = self.finished.trained_on
        return None if args is None else {**self._reference(), "quantisation": _bits(args)}


def _bits(args: ModelArguments) -> dict[str, Any]:
    if args.quantization_bit == 8:
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": args.quantization_type,
        "bnb_4bit_use_double_quant": args.double_quantization,
        "bnb_4bit_compute_dtype": "float32",
    }


def judge(found: dict[str, Any], dtype: Dtype, tolerance: float | None = None) -> Proof:
    """Hold what ``verify/plain.py`` found against the tolerances."""
    scaled = {**TOLERANCE, "fp32": TOLERANCE["fp32"] * max(1.0, found["largest_logit"] / 10)}
    limits = {**scaled, **({dtype: tolerance} if tolerance is not None else {})}
    merged, export, trained_on = (Difference(**found[k]) if k in found else None for k in ("merged", "export", "trained_on"))
    assert export is not None
    problems = []
    if found["tokenizer"] == "neither":
        problems.append("the tokenizer that was written gives other tokens than the run's")
    if merged is not None and not merged.max <= limits["fp32"]:
        problems.append(f"the merged model differs from base and adapter by {merged.max:.2e} (tolerance {limits['fp32']:.1e})")
    distance = export.max if dtype == "fp32" else export.relative
    if not distance <= limits[dtype]:
        problems.append(f"what was written differs from base and adapter by {distance:.2e} (tolerance {limits[dtype]:.1e})")
    if found["missing"] or found["unexpected"]:
        problems.append(f"weights missing from the export: {found['missing'][:3]}, unexpected: {found['unexpected'][:3]}")
    return Proof(
        dtype, limits[dtype], merged, export, trained_on, found["largest_logit"], found["agree"], found["prompts"],
        found["tokenizer"] == "auto", tuple(problems),
    )  # fmt: skip
