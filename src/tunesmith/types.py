"""The data that flows between the rooms: messages, examples, batches, losses.

Shape suffixes used in the package: ``T`` tokens of a flat batch, ``S`` supervised tokens, ``V`` vocabulary,
``B`` rows of a padded batch, ``L`` padded length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

IGNORE_INDEX = -100
"""Label of a token that is not learned."""

Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row comes from, so that any later message can name it.

    Attributes:
        dataset: name in ``dataset_info.json``.
        file: path of the file as the user would open it.
        row: 1-based row number in the file.
        line: 1-based line on which the row begins; 0 where a file has no lines (Parquet, Arrow).
    """

    dataset: str
    file: str
    row: int
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} (row {self.row})" if self.line else f"{self.file} (row {self.row})"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn calls.

    Attributes:
        name: of the function.
        arguments: by name.
        id: ties a tool's answer to its call, where the data give one.
    """

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: what is said; empty beside tool calls alone.
        reasoning: what was thought before, where the data keep it apart; templates see it as ``reasoning_content``.
        tool_calls: functions that an assistant turn calls, in order.
        name: of the speaker, or of the tool that answers.
        tool_call_id: the call that a tool answers.
        weight: factor of an assistant turn's loss; 0: shown, not learned.
    """

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: float = 1.0


Tools = tuple[Mapping[str, Any], ...]
"""Functions that the model may call, as JSON schemas in the form that chat templates expect."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A dialogue; every assistant turn is to be learned, by its weight."""

    messages: tuple[Message, ...]
    source: Source
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two ways to go on, the better one first. Each way is one or more turns, an assistant's first.

    Attributes:
        margin: by how much the better one is better, as the data say; 0 where they do not.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: Source
    tools: Tools = ()
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Feedback:
    """A dialogue whose last assistant turn was found good or bad."""

    messages: tuple[Message, ...]
    desirable: bool
    source: Source
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A dialogue that the model is to go on with, and the answer that the data give (empty: none)."""

    messages: tuple[Message, ...]
    reference: str
    source: Source
    tools: Tools = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text to go on from, for pretraining."""

    text: str
    source: Source


Row = Conversation | PreferencePair | Feedback | Prompt | Document
"""What ``data/convert.py`` makes of a raw row; nothing after it looks at columns."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: int32 array ``[L]``.
        labels: int32 array ``[L]``, aligned with ``input_ids`` (not shifted), ``IGNORE_INDEX`` where unsupervised.
        source: the row it was made from.
        weights: float32 array ``[L]``, factor of each token's loss; None: all 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: Source
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two tokenised answers to one prompt; each holds the prompt, unsupervised.

    Attributes:
        chosen, rejected: the better and the worse one.
        source: the row they were made from.
        reference: log-probabilities of both answers under a reference model, where a loss needs them.
        common: tokens that both begin with, fewer than the shorter one has.
        margin: by how much the better one is better, as the data say.
    """

    chosen: Example
    rejected: Example
    source: Source
    reference: tuple[float, float] | None = None
    common: int = 0
    margin: float = 0.0

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class FeedbackExample:
    """A tokenised dialogue whose last turn is good or bad.

    Attributes:
        example: the dialogue; its last turn alone is supervised.
        desirable: whether that turn is good.
        source: the row it was made from.
        mismatched: the same prompt with the answer of another row, where a loss asks how far the model has gone.
        reference: log-probabilities of the answer, and of the mismatched one, under a reference model, where a loss needs them.
    """

    example: Example
    desirable: bool
    source: Source
    mismatched: Example | None = None
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.example)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to be answered by the model.

    Attributes:
        input_ids: int32 array ``[L]``, ending where the model is to go on.
        reference: the answer that the data give, as text; empty if they give none.
        source: the row it was made from.
        messages: the turns that the tokens were made of, shortened where they were.
        tools: functions that the model may call.
    """

    input_ids: np.ndarray
    reference: str
    source: Source
    messages: tuple[Message, ...] = ()
    tools: Tools = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class PolicyTargets:
    """What answers of the model's own teach: of each token of each answer, in the order of a batch's targets.

    Attributes:
        row_S: int64 ``[S]``, row of each token in the batch.
        advantages_S: float32 ``[S]``, how much better the token was than expected.
        old_S: float32 ``[S]``, log-probabilities when the answers were collected; None: as they are now.
        reference_S: float32 ``[S]``, log-probabilities under the reference; None: not needed.
        values_S, returns_S: float32 ``[S]``, what was expected when the answers were collected, and what came; None: no
            values are learned.
    """

    row_S: torch.Tensor
    advantages_S: torch.Tensor
    old_S: torch.Tensor | None = None
    reference_S: torch.Tensor | None = None
    values_S: torch.Tensor | None = None
    returns_S: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> PolicyTargets:
        """The same on ``device``."""
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, slots=True)
class Batch:
    """Several examples laid end to end, without padding.

    Attributes:
        input_ids_T: int64 ``[T]``.
        position_ids_T: int64 ``[T]``, restarting at 0 with each example.
        positions_S: int64 ``[S]``, where a supervised token is predicted.
        targets_S: int64 ``[S]``, the tokens to predict there.
        lengths: tokens of each example; sums to ``T``.
        sources: the rows, in the order of ``lengths``.
        weights_S: float32 ``[S]``, factor of each token's loss; None: all 1.
        total_weight: sum of the weights, what a token-level loss is divided by; of pairs and feedback, their number.
        reference_2P: float32 ``[2, P]``, log-probabilities of the better and of the worse answers of ``P`` pairs under a
            reference model, or of the answers and the mismatched ones of ``P`` rows of feedback; None: not needed.
        begins_like: for each row ``(another row, tokens)``: so many first tokens of it, fewer than all, are those of the other
            one, which begins like no further one; 0 tokens where there is none. Empty: there is none for any row.
        margins_P: float32 ``[P]``, of pairs: by how much the better answer is better; None: not said of any.
        desirable_P: bool ``[P]``, of feedback: whether the answer is good.
        mismatched: of feedback: the prompts with the answers of other rows.
        policy: of the model's own answers: what they teach.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    positions_S: torch.Tensor
    targets_S: torch.Tensor
    lengths: tuple[int, ...]
    sources: tuple[Source, ...]
    weights_S: torch.Tensor | None = None
    total_weight: float = 0.0
    reference_2P: torch.Tensor | None = None
    begins_like: tuple[tuple[int, int], ...] = ()
    margins_P: torch.Tensor | None = None
    desirable_P: torch.Tensor | None = None
    mismatched: Batch | None = None
    policy: PolicyTargets | None = None

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch; there are no others."""
        return sum(self.lengths)

    @property
    def num_repeated(self) -> int:
        """Tokens that stand in the batch once more because rows begin alike."""
        return sum(tokens for _, tokens in self.begins_like)

    @property
    def num_targets(self) -> int:
        """Supervised tokens."""
        return self.targets_S.numel()

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on ``device``."""
        return replace(
            self,
            input_ids_T=self.input_ids_T.to(device, non_blocking=True),
            position_ids_T=self.position_ids_T.to(device, non_blocking=True),
            positions_S=self.positions_S.to(device, non_blocking=True),
            targets_S=self.targets_S.to(device, non_blocking=True),
            weights_S=None if self.weights_S is None else self.weights_S.to(device, non_blocking=True),
            reference_2P=None if self.reference_2P is None else self.reference_2P.to(device, non_blocking=True),
            margins_P=None if self.margins_P is None else self.margins_P.to(device, non_blocking=True),
            desirable_P=None if self.desirable_P is None else self.desirable_P.to(device, non_blocking=True),
            mismatched=None if self.mismatched is None else self.mismatched.to(device),
            policy=None if self.policy is None else self.policy.to(device),
        )


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a stage's ``compute_loss`` returns: sums, never means, so that the loop divides once.

    Attributes:
        sum: scalar tensor, the loss summed over what is counted.
        count: what the sum is divided by: the weights of the supervised tokens (their number, unless rows weigh turns).
        metrics: name -> (sum, count) of further quantities to log.
    """

    sum: torch.Tensor
    count: float
    metrics: Mapping[str, tuple[float, int]] = field(default_factory=dict)
