"""The reward functions that come with the package, by name, and their options.

A function is called as ``name(prompts, responses, references, **options)`` and returns one number for each response; its
options are its keyword parameters, so their types, bounds and defaults are written once.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from tunesmith.rewards.lengths import length, repetition
from tunesmith.rewards.math_answer import math_answer
from tunesmith.rewards.patterns import format_, regex_
from tunesmith.rewards.reference import reference

RewardFunction = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[float]]
_GIVEN = "count_tokens"
"""A keyword parameter that is no option: it is filled in by the program."""


class Shipped(NamedTuple):
    """A function, and whether it compares with the answer that the data give."""

    function: Callable[..., list[float]]
    compares: bool = False


SHIPPED: Mapping[str, Shipped] = {
    "math_answer": Shipped(math_answer, compares=True),
    "format": Shipped(format_),
    "length": Shipped(length),
    "regex": Shipped(regex_),
    "reference": Shipped(reference, compares=True),
    "repetition": Shipped(repetition),
}


def option_problems(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the options of a shipped function."""
    model = _options_of(name)
    try:
        model.model_validate(dict(options))
    except ValidationError as error:
        for problem in error.errors():
            key = str(problem["loc"][0])
            where = f"{{{name}: {{{key}: ...}}}}"
            if problem["type"] == "extra_forbidden":
                known = ", ".join(model.model_fields) or "none"
                yield f"{where}: no such option; {name} takes {known}"
            elif problem["type"] == "missing":
                yield f"{where}: is needed and not given"
            else:
                message = problem["msg"].removeprefix("Value error, ")
                yield f"{where}: {message[0].lower()}{message[1:]}; found {problem['input']!r}"


def ready(name: str, options: Mapping[str, Any], count_tokens: Callable[[str], int]) -> RewardFunction:
    """A shipped function with its options, which ``option_problems`` found to be good.

    Args:
        name: of the function.
        options: of it.
        count_tokens: how many tokens a text has.
    """
    function, model = SHIPPED[name].function, _options_of(name)
    values = model.model_validate(dict(options)).model_dump()
    if _GIVEN in inspect.signature(function).parameters:
        values[_GIVEN] = count_tokens
    return partial(function, **values)


@cache
def _options_of(name: str) -> type[BaseModel]:
    function = SHIPPED[name].function
    types = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key: (types[key], ... if parameter.default is parameter.empty else parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and key != _GIVEN
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False), **fields)
