"""The model card: what a reader of the export needs to know, from the run's own records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config.arguments import RunConfig
from tunesmith.train.finished import Finished
from tunesmith.train.runfiles import DATA_REPORT, LOSS_PLOT, RESULTS, SAMPLES

CARD = "README.md"
_SETTINGS = (
    "stage", "finetuning_type", "peft_method", "lora_rank", "lora_alpha", "lora_target", "lora_dropout", "use_rslora",
    "use_dora", "additional_target", "quantization_bit", "learning_rate", "lr_scheduler_type", "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps", "cutoff_len", "packing", "seed",
)  # fmt: skip
_SHOWN_SAMPLES = 6


@dataclass(frozen=True)
class Subject:
    """What the card is about.

    Attributes:
        title: of the card.
        kind: ``merged``, ``model`` or ``adapter``.
        base: name of the base model.
        licence: of the base, if it says one.
        dtype: in which the weights are stored.
        has_template: whether the tokenizer has a chat template.
        ollama: whether there is a Modelfile.
        gguf: name of the GGUF file, if there is one.
        code: whether Python code beside the model was allowed to run.
        plain_tokenizer: whether ``AutoTokenizer`` gives the tokens that were trained on.
        found: sentences of the proof.
    """

    title: str
    kind: str
    base: str
    licence: str | None
    dtype: str
    has_template: bool
    ollama: bool
    gguf: str | None
    code: bool
    plain_tokenizer: bool
    found: tuple[str, ...]


def base_licence(folder: Path) -> str | None:
    """The licence that a model folder's own card names, if it has one."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return None
    licence = head.get("license") if isinstance(head, dict) else None
    return licence if isinstance(licence, str) else None


def write_card(folder: Path, finished: Finished, subject: Subject) -> None:
    """Write ``README.md``, and the picture of the curves if the run has one."""
    picture = finished.folder / LOSS_PLOT
    if finished.config is not None and picture.is_file():
        (folder / LOSS_PLOT).write_bytes(picture.read_bytes())
    (folder / CARD).write_text("\n".join(_card(folder, finished, subject)) + "\n", encoding="utf-8")


def _card(folder: Path, finished: Finished, subject: Subject) -> Iterator[str]:
    head: dict[str, Any] = {"library_name": "peft" if subject.kind == "adapter" else "transformers"}
    head |= {"pipeline_tag": "text-generation", "tags": ["tunesmith"]}
    if subject.licence:
        head["license"] = subject.licence
    if subject.base.count("/") == 1:
        head["base_model"] = subject.base
    yield from ("---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {subject.title}", "")
    what = {"merged": "with the trained adapter merged in", "model": "with all or some of its weights trained", "adapter": ""}
    if subject.kind == "adapter":
        yield f"An adapter for `{subject.base}`, made with tunesmith."
    else:
        yield f"`{subject.base}` {what[subject.kind]}, made with tunesmith. Weights are stored in {subject.dtype}."
    if not subject.licence:
        yield "The licence is that of the base model, which does not say it in its files."
    yield from ("", "## Use", "", "```python", *_loading(subject), "```", "")
    if subject.ollama:
        yield from ("With Ollama: `ollama create NAME -f Modelfile`.", "")
    if subject.gguf:
        yield from (f"With llama.cpp: `llama-cli -m {subject.gguf}`.", "")
    if finished.config is not None:
        yield from _training(finished.folder, finished.config)
    if (folder / LOSS_PLOT).is_file():
        yield from (f"![loss]({LOSS_PLOT})", "")
    yield from _samples(finished.folder)
    yield from ("## Checked", "", *(f"- {sentence}" for sentence in subject.found))


def _loading(subject: Subject) -> Iterator[str]:
    adapter = subject.kind == "adapter"
    options = ", trust_remote_code=True" if subject.code else ""
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    tokenizer = "AutoTokenizer" if subject.plain_tokenizer else "PreTrainedTokenizerFast"
    yield f"from transformers import {tokenizer}" if adapter else f"from transformers import {loader}, {tokenizer}"
    if adapter:
        yield f"from peft import {loader}"
    yield ""
    yield f'tokenizer = {tokenizer}.from_pretrained("."{options})'
    yield f'model = {loader}.from_pretrained("."{options})'
    if subject.has_template:
        yield 'messages = [{"role": "user", "content": "Hello"}]'
        yield "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)"
        yield 'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")'
    else:
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))"


def _training(run: Path, config: RunConfig) -> Iterator[str]:
    yield from ("## Training", "")
    data, results = _read(run / DATA_REPORT), _read(run / RESULTS)
    sets = ", ".join(f"`{Path(name).name}`" for name in config.data.dataset)
    if data:
        yield (
            f"Data: {sets}: {data['kept']:,} of {data['read']:,} rows, {data['tokens']:,} tokens, of which "
            f"{data['supervised']:,} are learned."
        )
    if results:
        yield f"{results['steps']:,} updates, {results['epochs']:.2f} epochs."
    flat = config.to_flat()
    yield f"Template: {flat['template']}." if flat.get("template") != "auto" else "Template: the model's own."
    yield from ("", "| setting | value |", "|---|---|")
    for key in _SETTINGS:
        value = flat.get(key)
        if value not in (None, [], (), "", False):
            yield f"| `{key}` | {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value} |"
    yield ""


def _samples(run: Path) -> Iterator[str]:
    try:
        rows = [json.loads(line) for line in (run / SAMPLES).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return
    before = {row["prompt"]: row["answer"] for row in rows if row["when"] == "before"}
    after = {row["prompt"]: row["answer"] for row in rows if row["when"] == "after"}
    yield from ("## Answers before and after training", "", "| prompt | before | after |", "|---|---|---|")
    for prompt in list(after)[:_SHOWN_SAMPLES]:
        yield "| " + " | ".join(_cell(text) for text in (prompt, before.get(prompt, ""), after[prompt])) + " |"
    yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _read(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value
