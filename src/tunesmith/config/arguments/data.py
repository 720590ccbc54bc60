"""Which rows, and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.arguments.base import Arguments, NameList, split_commas


class DatasetAttr(Arguments):
    """One data set: an entry of ``dataset_info.json``, or a path given in its place."""

    dataset_name: str = Field(description="Name under which dataset_info.json lists it, or the path given instead.")
    load_from: Literal["file", "hf_hub", "ms_hub"] = Field("file", description="A local file or folder, or a hub.")
    file_name: str | None = Field(None, min_length=1, description="File or folder inside dataset_dir.")
    inline: bool = Field(False, description="The path was given in the configuration; it may lie anywhere.")
    hub_url: str | None = Field(None, min_length=1, description="Name on the hub (org/name).")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    subset: str | None = Field(None, description="Configuration of a hub set.")
    split: str = Field("train", description="Split of a hub set or of a folder in the hub's layout.")
    folder: str | None = Field(None, description="Folder inside a hub set.")
    dataset_sha1: str | None = Field(None, pattern="^[0-9a-fA-F]{40}$", description="SHA-1 that the file must have.")
    dataset_sha256: str | None = Field(None, pattern="^[0-9a-fA-F]{64}$", description="SHA-256 that the file must have.")
    formatting: Literal["auto", "alpaca", "sharegpt", "openai", "text"] = Field(
        "alpaca", description="Layout of a row; auto: found from the rows."
    )
    ranking: bool = Field(False, description="Rows hold two answers, the better one and the worse one.")
    num_samples: int | None = Field(None, gt=0, description="Draw that many rows (seeded; repeated if there are fewer).")
    source_prefix: str = Field("", description="Text put before the first user turn of every row.")
    prompt_column: str | None = Field("instruction", description="Alpaca: the question. Text: the text.")
    query_column: str | None = Field("input", description="Alpaca: text that follows the question.")
    response_column: str | None = Field("output", description="Alpaca: the answer; with ranking, the two answers.")
    history_column: str | None = Field(None, description="Alpaca: earlier [question, answer] pairs.")
    system_column: str | None = Field(None, description="The system message, if the rows have one.")
    messages_column: str | None = Field("conversations", description="Sharegpt, openai: the list of turns.")
    tools_column: str | None = Field(None, description="Functions that the model may call, as JSON.")
    chosen_column: str | None = Field(None, description="Ranking: the better answer.")
    rejected_column: str | None = Field(None, description="Ranking: the worse answer.")
    margin_column: str | None = Field(None, description="Ranking: by how much the better answer is better, for stage rm.")
    kto_tag_column: str | None = Field(None, description="Whether the answer is good (true) or bad (false).")
    role_tag: str = Field("from", description="Key of a turn's speaker.")
    content_tag: str = Field("value", description="Key of a turn's text.")
    user_tag: str = Field("human", description="Speaker name of the user.")
    assistant_tag: str = Field("gpt", description="Speaker name of the model.")
    observation_tag: str = Field("observation", description="Speaker name of a tool that answers.")
    function_tag: str = Field("function_call", description="Speaker name of the model when it calls a tool.")
    system_tag: str = Field("system", description="Speaker name of a system turn.")


class DataArguments(Arguments):
    """Which rows are trained on, and how they become tokens."""

    dataset: NameList = Field(
        (), description="Names in dataset_info.json, paths of files, or hub sets (hf:org/name), in order, separated by commas."
    )
    eval_dataset: NameList = Field((), description="Names in dataset_info.json to evaluate on.")
    dataset_dir: str = Field("data", description="Folder that holds dataset_info.json and the files it names.")
    template: str = Field(
        "auto",
        min_length=1,
        description="Chat template. auto: the tokenizer's own; or a name that `tunesmith templates` lists; or a .jinja file.",
    )
    template_date: str | None = Field(
        None, pattern=r"^\d{4}-\d{2}-\d{2}$", description="Day that templates take for today; the day the run began if unset."
    )
    default_system: str | None = Field(None, description="System message for rows that have none.")
    enable_thinking: bool | None = Field(
        None,
        description="Given to the chat template as its variable of that name, in training and in chat. false: rows are learned "
        "without their reasoning. Unset: the template's own default.",
    )
    mask_history: bool = Field(False, description="Learn only the last assistant turn of each row; earlier ones are shown.")
    train_on_prompt: bool = Field(
        False, description="Learn all of each row: what system, user and tools say, as well as the assistant's turns."
    )
    cutoff_len: int = Field(2048, gt=1, description="Longest row in tokens (see truncation). In stage pt, tokens of a block.")
    truncation: Literal["keep_end", "keep_start", "split", "drop", "error"] = Field(
        "keep_end",
        description="Rows longer than cutoff_len. keep_end: the oldest turns go, then the head of the question; answers stay "
        "whole. keep_start: the end is cut off. split: several rows. drop: left out. error: the run ends. All are counted.",
    )
    on_bad_row: Literal["auto", "drop", "error"] = Field(
        "auto",
        description="auto: a row that cannot be read, or whose mask cannot be certified, ends the run; an empty or malformed "
        "one is left out and counted. drop: all such rows are left out. error: any of them ends the run.",
    )
    streaming: bool = Field(
        False,
        description="Read, tokenise and mask rows while training asks for them; nothing is stored. For sets larger than memory "
        "or disk. Needs max_steps.",
    )
    buffer_size: int = Field(
        16384,
        gt=0,
        description="streaming: rows that are shuffled, and packed, together. A buffer is full at 16.8 million tokens, too.",
    )
    max_samples: int | None = Field(None, gt=0, description="Use only the first N rows of each data set.")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = Field(
        "concat",
        description="Several sets: one after the other; or mixed until the first (under) or the last (over) is used up.",
    )
    interleave_probs: Annotated[tuple[float, ...], BeforeValidator(split_commas)] = Field(
        (), description="Share of each set when mixed; by turns if unset."
    )
    preprocessing_num_workers: int | None = Field(
        None, ge=0, description="Processes that convert and tokenise rows; by threads of this one if unset."
    )
    overwrite_cache: bool = Field(False, description="Tokenise anew even if the rows have been tokenised before.")
    tokenized_path: str | None = Field(None, description="Where tokenised rows are kept; the user's cache if unset.")
    val_size: float = Field(
        0.0,
        ge=0,
        description="Hold out this share (below 1) or number (1 and up) of rows for evaluation; of a stream, its first rows.",
    )
    dev_ratio: float = Field(0.0, ge=0, lt=1, description="Hold out this share of rows; the same as val_size below 1.")
    source_prefix: str = Field(
        "", description="Text put before the first user turn; one for all sets, or one per set, divided by |."
    )
    identity_name: str | None = Field(None, description="Replaces {{name}} in the data.")
    identity_author: str | None = Field(None, description="Replaces {{author}} in the data.")
    packing: bool = Field(
        False,
        description="Fill each unit of a batch with rows up to cutoff_len tokens (first-fit decreasing). Rows never see "
        "each other; without it a unit is one row.",
    )
    disable_shuffling: bool = Field(False, description="Train in file order instead of a seeded order.")

    @property
    def template_options(self) -> dict[str, Any]:
        """Variables that are handed to the chat template."""
        return {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}


DataTrainingArguments = DataArguments
