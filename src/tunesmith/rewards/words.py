"""Texts in comparable form, and the words of texts in any language."""

from __future__ import annotations

import re
import unicodedata

_SINGLY = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_SINGLY}]|(?:(?![{_SINGLY}])\w)+(?:['’](?:(?![{_SINGLY}])\w)+)*")
_ENDS = " \t\n.。,，;；:：!！?？\"'“”‘’"


def words_of(text: str) -> list[str]:
    """Words, without punctuation. Chinese characters and kana are one word each.

    Example:
        ``"Don't stop, 你好!"`` -> ``["Don't", "stop", "你", "好"]``
    """
    return _WORD.findall(text)


def plain(text: str) -> str:
    """Compatible characters made one (full-width digits), case and white space levelled, punctuation at both ends off."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_ENDS)
