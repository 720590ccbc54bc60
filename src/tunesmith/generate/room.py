"""How many tokens an answer may have."""

from __future__ import annotations

from tunesmith.config.arguments import GeneratingArguments
from tunesmith.errors import ModelError


def room_for(number: int, known: int, args: GeneratingArguments, longest: int | None, own: int | None) -> int:
    """New tokens of the answers to a prompt, at most.

    Args:
        number: of the prompt, from 0, for the message.
        known: its tokens.
        args: ``max_new_tokens`` or ``max_length``.
        longest: tokens that the model takes, prompt and answer; None where it does not say.
        own: a limit of this prompt.

    Raises:
        ModelError: there is no room, or nothing limits the answer.
    """
    limits = [] if longest is None else [longest - known]
    if args.max_new_tokens is not None:
        limits.append(args.max_new_tokens)
    elif args.max_length is not None:
        limits.append(args.max_length - known)
    if own is not None:
        limits.append(own)
    if known == 0 or not limits or min(limits) <= 0:
        raise ModelError(
            f"prompt {number + 1} of {known} tokens cannot be answered: a prompt has at least one token and leaves room for "
            f"one within max_new_tokens {args.max_new_tokens}, max_length {args.max_length}, the model's {longest}"
            + ("" if own is None else f" and its own limit of {own}")
        )
    return min(limits)
