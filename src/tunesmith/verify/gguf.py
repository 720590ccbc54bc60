"""Proof that a GGUF file answers as the export that it was made from, and has its vocabulary, end and chat template."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.model.gguf_restore import GgufType, is_restored_here, restore, vocabulary
from tunesmith.verify.measure import NEW_TOKENS, PROMPTS, Difference, in_fresh_process, model_at, test_rows

TOLERANCE: dict[GgufType, float] = {"f32": 1e-5, "f16": 2.5e-3, "bf16": 2e-2, "q8_0": 5e-2}
"""Root mean square of the differences of logits, relative to that of the logits."""


@dataclass(frozen=True)
class GgufProof:
    """What the comparison found.

    Attributes:
        kind: of the numbers in the file.
        tolerance: of ``difference.relative``.
        difference: of its logits from those of the export.
        agree: prompts of which the greedy continuations are the same, of ``prompts``.
        problems: what is wrong; empty if nothing is.
    """

    kind: GgufType
    tolerance: float
    difference: Difference
    agree: int
    prompts: int
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """The findings in words."""
        found = self.difference
        yield (
            f"GGUF in {self.kind}, read back: greatest difference {found.max:.2e}, relative {found.relative:.2e}; "
            f"greedy continuations: {self.agree} of {self.prompts} the same over {NEW_TOKENS} tokens"
        )
        yield from self.problems


def asked(folder: Path, file: Path, scratch: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What ``verify/plain.py`` is to compare: the model in ``folder`` with that of the GGUF ``file``.

    Raises:
        ModelError: the file's tensors are not those of the model.
    """
    if is_restored_here(folder):
        restore(file, folder, scratch / "restored")
        export = model_at(str(scratch / "restored"))
    else:
        export = model_at(str(file.parent), {"gguf_file": file.name})
    return {
        "reference": model_at(str(folder)),
        "export": export,
        "rows": test_rows(tokenizer),
        "tokens": len(tokenizer),
        "prompts": len(PROMPTS),
        "new_tokens": NEW_TOKENS,
        "texts": {},
        "merged": None,
        "trained_on": None,
    }


def prove(
    folder: Path, file: Path, kind: GgufType, tokenizer: PreTrainedTokenizerBase, tolerance: float | None = None
) -> GgufProof:
    """Read a GGUF file back in a fresh process and compare it with the model that it was made from.

    Args:
        folder: of the model, in Transformers' layout.
        file: made from it.
        kind: of the numbers in it.
        tokenizer: of the model.
        tolerance: in place of ``TOLERANCE[kind]``.

    Raises:
        ModelError: it cannot be read back.
    """
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as scratch:
        found = in_fresh_process(asked(folder, file, Path(scratch), tokenizer))
    return judge(found, kind, differences(vocabulary(file), tokenizer), tolerance)


def judge(found: dict[str, Any], kind: GgufType, different: list[str], tolerance: float | None = None) -> GgufProof:
    """Hold what ``verify/plain.py`` found, and what differs in the vocabulary, against the tolerances."""
    limit = TOLERANCE[kind] if tolerance is None else tolerance
    difference = Difference(**found["export"])
    problems = [f"the GGUF file: {what}" for what in different]
    if not difference.relative <= limit:
        problems.append(f"the GGUF file differs from the export by {difference.relative:.2e} (tolerance {limit:.1e})")
    if found["missing"]:
        problems.append(f"weights missing from the GGUF file: {found['missing'][:3]}")
    return GgufProof(kind, limit, difference, found["agree"], found["prompts"], tuple(problems))


def differences(told: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What a GGUF file says of the tokenizer (``model.gguf_restore.vocabulary``) that is not so."""
    wrong = []
    tokens = told.get("ggml.tokens", [])
    own = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    other = [i for i, token in enumerate(own) if i >= len(tokens) or _plain(tokens[i]) != _plain(token)]
    if other:
        found = repr(tokens[other[0]]) if other[0] < len(tokens) else "missing"
        wrong.append(f"{len(other)} tokens are others; token {other[0]} is {found}, {own[other[0]]!r} in the tokenizer")
    if told.get("ggml.eos_token_id") != tokenizer.eos_token_id:
        wrong.append(f"it ends at token {told.get('ggml.eos_token_id')}, the tokenizer at {tokenizer.eos_token_id}")
    if (told.get("chat_template") or None) != (tokenizer.chat_template or None):
        wrong.append("its chat template is another")
    return wrong


def _plain(token: str) -> str:
    """A token with a space however it is written."""
    return token.replace("▁", " ").replace("Ġ", " ")
