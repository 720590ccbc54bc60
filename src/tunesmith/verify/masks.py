"""``tunesmith verify masks``: random conversations through chat templates, every mask compared with an oracle.

The mask is the one that training uses (``ChatTemplate.views``, ``TextEncoder``). The oracle (``verify/oracle.py``) has
transformers' renderings, its own generation marks, unique words in every text, and the bytes of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.arguments import ModelArguments
from tunesmith.data.named import fitted, read_template, templates
from tunesmith.errors import TemplateError
from tunesmith.model.library import quiet_library
from tunesmith.model.tokenizer import load_tokenizer, read_tokenizer
from tunesmith.verify.conversations import Talker, markup
from tunesmith.verify.examiner import Examiner
from tunesmith.verify.outcome import Judged, TemplateResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPECIAL = re.compile(r"<[|｜][^|｜<>\s'\"{}]{1,40}[|｜]>|<\w+_of_\w+>|</?think>|<\|\w+>|<\w+\|>|\[/?INST\]")


def verify_masks(
    model: str, folder: Path | None, count: int, seed: int, done: Callable[[TemplateResult], None] = lambda result: None
) -> list[TemplateResult]:
    """Check templates with one model's tokenizer; nothing is written.

    Args:
        model: folder, hub id or ``builtin:...``.
        folder: of ``*.jinja`` files; None: the tokenizer's own template, if it has one, and all named ones.
        count: conversations for each template.
        seed: the same one gives the same conversations.
        done: called with each result as it comes.

    Raises:
        ModelError: no such tokenizer.
        TemplateError: no template in the folder.
    """
    quiet_library()
    bare = (Path(model) / "tokenizer.json").is_file()  # no model is needed beside it
    tokenizer = read_tokenizer(model) if bare else load_tokenizer(ModelArguments(model_name_or_path=model))
    results = []
    for name, origin in _origins(tokenizer, folder):
        result = TemplateResult(name)
        try:
            source = read_template(origin) if isinstance(origin, Path) else origin
            result.rows += check_template(deepcopy(tokenizer), source, count, f"{seed}:{name}", isinstance(origin, Path))
        except TemplateError as error:
            result.rows += [Judged("refused", str(error), number=number) for number in range(count)]
        done(result)
        results.append(result)
    return results


def _origins(tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> list[tuple[str, str | Path]]:
    """Names, and files whose text is yet to be fitted to the tokenizer, or texts that need not be."""
    if folder is not None:
        files = sorted(folder.glob("*.jinja"))
        if not files:
            raise TemplateError(f"{folder}: no *.jinja file in this folder")
        return [(file.stem, file) for file in files]
    own: list[tuple[str, str | Path]] = []
    if tokenizer.chat_template:
        own.append(("the model's own", tokenizer.get_chat_template()))
    return own + [(template.name, fitted(template, tokenizer)[0]) for template in templates()]


def check_template(
    tokenizer: PreTrainedTokenizerBase, source: str, count: int, seed: str, add_tokens: bool = False
) -> list[Judged]:
    """Check one template with random conversations.

    Args:
        tokenizer: to render and tokenise with; it is changed if tokens are added.
        source: the template.
        count: conversations.
        seed: of the conversations.
        add_tokens: give the tokenizer what looks like a special token in the template.

    Raises:
        TemplateError: the text is no template.
    """
    if add_tokens:
        known = tokenizer.get_added_vocab()
        tokens = [token for token in sorted(set(_SPECIAL.findall(source))) if token not in known]
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    talker = Talker(seed, markup(source))
    examiner = Examiner(tokenizer, source)
    return [examiner.judge(talker.talk(number), number) for number in range(count)]
