"""``tunesmith export``: a finished run in the layout that plain transformers, PEFT and Ollama load.

Everything is written into a folder beside the output and compared with the run first; only what passes is put in place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.config.arguments import ModelArguments
from tunesmith.data.template import ChatTemplate
from tunesmith.errors import ConfigError, TemplateError, VerificationError
from tunesmith.export import formats, gguf, ollama, place
from tunesmith.export.card import Subject, base_licence, write_card
from tunesmith.export.push import check_name
from tunesmith.model.adapter import GENERATION_CONFIG, stop_at
from tunesmith.model.builtin import PREFIX
from tunesmith.model.files import VALUE_HEAD, read_head_header
from tunesmith.model.gguf_restore import GgufType
from tunesmith.model.library import quiet_library
from tunesmith.model.load import load_base_model
from tunesmith.model.merge import base_config, merge_adapter
from tunesmith.model.precision import DTYPES
from tunesmith.model.source import locate
from tunesmith.train.finished import Finished, open_finished, tokenizer_of

Dtype = Literal["bf16", "fp16", "fp32"]

_CPU = torch.device("cpu")
_SHARD = "5GB"
_MARGIN = 100_000_000


@dataclass(frozen=True)
class ExportOptions:
    """How a run is exported.

    Attributes:
        dtype: of the stored weights; ``auto``: that of the base, and of an adapter its own.
        max_shard_size: of one file of weights, like ``5GB``.
        adapter_only: the adapter instead of the merged model.
        ollama: write a Modelfile.
        overwrite: replace an earlier export.
        tolerance: in place of the comparison's own.
        base: see ``open_finished``.
        push: repository that the export will go to; its name is checked beforehand.
        gguf: write a GGUF file, too, with numbers of this type.
        gguf_converter: folder or script of llama.cpp's converter, in place of the one that was fetched.
        trust_remote_code: see ``open_finished``.
    """

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    max_shard_size: str | None = None
    adapter_only: bool = False
    ollama: bool = False
    overwrite: bool = False
    tolerance: float | None = None
    base: str | None = None
    push: str | None = None
    gguf: GgufType | None = None
    gguf_converter: Path | None = None
    trust_remote_code: bool = False


class Findings(Protocol):
    """What a comparison found (``verify.merge.Proof``)."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong; empty if nothing is."""

    def lines(self) -> Iterator[str]:
        """The findings in words."""

    def to_dict(self) -> dict[str, Any]:
        """The findings for machines."""


class ModelFindings(Findings, Protocol):
    """What a comparison of an export with its run found."""

    @property
    def auto_tokenizer(self) -> bool:
        """Whether ``AutoTokenizer`` gives the run's tokens."""


class Comparison(Protocol):
    """Compares an export with its run (``verify.merge.Check``)."""

    def note(self, model: PreTrainedModel) -> None:
        """See the merged model before it is written."""

    def prove(self, folder: Path, dtype: Dtype, tolerance: float | None = None, adapter: bool = False) -> ModelFindings:
        """Reload what was written and compare."""

    def prove_gguf(self, folder: Path, file: Path, kind: GgufType, tolerance: float | None = None) -> Findings:
        """Read a GGUF file back and compare it with the model in ``folder``."""


Compare = Callable[[Finished, PreTrainedTokenizerBase, Path], Comparison]


def export(target: Path, output: Path, options: ExportOptions, compare: Compare, say: Callable[[str], None]) -> Path:
    """Write what a run made into a folder of its own, checked.

    Args:
        target: a finished run, or an adapter in PEFT's layout. Its files, and those of the base, are only read.
        output: folder to make.
        options: how.
        compare: makes the comparison of run and export.
        say: gets what was done and found, line by line.

    Returns:
        ``output``.

    Raises:
        ConfigError: options or output cannot be used.
        CheckpointError, ModelError: run, adapter or base cannot be used.
        VerificationError: the export does not answer as the run does; nothing is put in place.
    """
    quiet_library()
    shard = formats.parse_size(options.max_shard_size or _SHARD)
    finished = open_finished(target, options.base, options.trust_remote_code)
    _check_options(options, finished)
    base_folder = locate(finished.base).path if finished.base is not None else finished.folder
    conversion = gguf.prepare(options.gguf, options.gguf_converter, base_folder) if options.gguf is not None else None
    scratch = place.claim(output, options.overwrite, [target, base_folder])
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, output, finished, options, shard, conversion, compare, say)
        place.put_in_place(scratch, output)
    except OSError as error:
        raise ConfigError(f"--output: {output}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"exported to {output}")
    return output


def _check_options(options: ExportOptions, finished: Finished) -> None:
    if options.push is not None:
        check_name(options.push)
    if options.gguf_converter is not None and options.gguf is None:
        raise ConfigError("--gguf-converter: says how --gguf converts; give it together with --gguf TYPE")
    if options.gguf is not None and read_head_header(finished.folder) is not None:
        raise ConfigError(
            f"--gguf: {finished.folder} has a value head, for which a GGUF file has no place; leave the option out"
        )
    if not options.adapter_only:
        return
    if not finished.is_adapter:
        raise ConfigError(f"--adapter-only: {finished.folder} holds a whole model; leave the option out")
    if finished.weights:
        raise ConfigError(
            f"--adapter-only: {finished.folder} was trained on top of weights that are not in its base "
            f"({', '.join(map(str, finished.weights))}), so it would fit nothing; leave the option out"
        )
    if options.max_shard_size is not None or options.ollama or options.gguf is not None:
        raise ConfigError(
            "--adapter-only: an adapter is one file without a Modelfile; leave out --max-shard-size, --ollama and --gguf"
        )


def _fill(
    scratch: Path,
    output: Path,
    finished: Finished,
    options: ExportOptions,
    shard: int,
    conversion: gguf.Conversion | None,
    compare: Compare,
    say: Callable[[str], None],
) -> None:
    tokenizer = tokenizer_of(finished)
    logits = scratch / ".logits"
    logits.mkdir()
    comparison = compare(finished, tokenizer, logits)
    if options.adapter_only:
        dtype = _write_adapter(scratch, finished, options)
        settings = _generation(finished, tokenizer)
        settings.to_json_file(scratch / GENERATION_CONFIG)
    else:
        dtype, settings = _write_model(scratch, output, finished, tokenizer, options, shard, conversion, comparison, say)
    tokenizer.save_pretrained(scratch)
    if read_head_header(finished.folder) is not None:
        shutil.copyfile(finished.folder / VALUE_HEAD, scratch / VALUE_HEAD)
        say(f"{VALUE_HEAD} goes along: the export is a reward model")
    proof = comparison.prove(scratch, dtype, options.tolerance if conversion is None else None, options.adapter_only)
    shutil.rmtree(logits)
    proofs: dict[str, Findings] = {"proof": proof}
    _judge(output, proof, say)
    if conversion is not None:
        file = conversion.write(scratch, output.resolve().name, finished.trusted)
        proofs["gguf"] = comparison.prove_gguf(scratch, file, conversion.kind, options.tolerance)
        _judge(output, proofs["gguf"], say)
    if options.ollama:
        weights = f"./{gguf.FILE}" if conversion is not None else "."
        text, complete = ollama.modelfile(tokenizer, _ends(settings), _sampling(settings), weights)
        (scratch / ollama.MODELFILE).write_text(text, encoding="utf-8")
        if not complete:
            say("Modelfile: without a template; see the comment in it")
    kind = "adapter" if options.adapter_only else "merged" if finished.is_adapter else "model"
    base = _base_args(finished)
    licence = base_licence(locate(base).path) if base is not None else None
    subject = Subject(
        title=output.resolve().name, kind=kind, base=_name(base), licence=licence, dtype=dtype,
        has_template=bool(tokenizer.chat_template), ollama=options.ollama,
        gguf=gguf.FILE if conversion is not None else None, code=finished.trusted, plain_tokenizer=proof.auto_tokenizer,
        found=tuple(line for each in proofs.values() for line in each.lines()),
    )  # fmt: skip
    write_card(scratch, finished, subject)
    place.write_manifest(
        scratch,
        {
            **{"kind": kind, "run": finished.folder.resolve().name, "base": _name(base), "dtype": dtype},
            **{name: each.to_dict() for name, each in proofs.items()},
        },
    )


def _judge(output: Path, proof: Findings, say: Callable[[str], None]) -> None:
    """Say what was found. Raises VerificationError when something is wrong."""
    for line in proof.lines():
        say(line)
    if proof.problems:
        raise VerificationError(
            f"{output}: not written: {'; '.join(proof.problems)}. A larger difference can be allowed with --tolerance"
        )


def _write_model(
    scratch: Path,
    output: Path,
    finished: Finished,
    tokenizer: PreTrainedTokenizerBase,
    options: ExportOptions,
    shard: int,
    conversion: gguf.Conversion | None,
    comparison: Comparison,
    say: Callable[[str], None],
) -> tuple[Dtype, GenerationConfig]:
    """Merge or load, cast, write; all of the model's memory is free again afterwards, for the comparison."""
    if finished.base is not None:
        if finished.trained_on is not None:
            bits = finished.trained_on.quantization_bit
            say(f"trained on the base in {bits} bits; merged into the base as it is on disk, which differs a little")
        merged = merge_adapter(finished.base, finished.folder, tokenizer, finished.weights)
        model = merged.model
        if merged.untied:
            say("embedding and head are no longer the same: both are written, and tie_word_embeddings is false")
        comparison.note(model)
    else:
        own = ModelArguments(model_name_or_path=str(finished.folder), trust_remote_code=finished.trusted)
        model = load_base_model(own, torch.float32, _CPU)
    wanted = _dtype(finished, options)
    model = formats.cast(model, wanted, finished.folder)
    place.check_space(
        output,
        formats.bytes_of(model) + _MARGIN + (conversion.bytes_for(model.num_parameters()) if conversion is not None else 0),
    )
    stop_at(model, _turn_ends(finished, tokenizer))
    formats.write_model(model, scratch, shard)
    settings = model.generation_config
    assert settings is not None
    return _named(wanted), settings


def _write_adapter(scratch: Path, finished: Finished, options: ExportOptions) -> Dtype:
    formats.write_adapter(finished.folder, scratch, None if options.dtype == "auto" else DTYPES[options.dtype])
    return "fp32" if options.dtype == "auto" else options.dtype


def _base_args(finished: Finished) -> ModelArguments | None:
    if finished.base is not None:
        return finished.base
    return finished.config.model if finished.config is not None else None


def _dtype(finished: Finished, options: ExportOptions) -> torch.dtype:
    """What was asked for; else that of the base on disk, float32 where it does not say."""
    if options.dtype != "auto":
        return DTYPES[options.dtype]
    args = _base_args(finished)
    found = getattr(base_config(args), "dtype", None) if args is not None else None
    return next((dtype for dtype in DTYPES.values() if dtype == found), torch.float32)


def _named(dtype: torch.dtype) -> Dtype:
    names: dict[torch.dtype, Dtype] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names[dtype]


def _name(base: ModelArguments | None) -> str:
    """Of the base, for people: a hub name, or the last part of a path, which says nothing of the machine."""
    if base is None:
        return "unknown"
    name = base.model_name_or_path
    return Path(name).resolve().name if Path(name).is_dir() and not name.startswith(PREFIX) else name


def _turn_ends(finished: Finished, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an assistant turn; none where the template cannot be read, or no turns were learned."""
    pretrained = finished.config is not None and finished.config.finetuning.stage == "pt"
    if pretrained or not tokenizer.chat_template:
        return ()
    try:
        return ChatTemplate(tokenizer).end_ids
    except TemplateError:
        return ()


def _generation(finished: Finished, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How the base generates, stopping at the end of a turn too."""
    assert finished.base is not None
    source = locate(finished.base)
    try:
        settings = GenerationConfig.from_pretrained(source.path, trust_remote_code=source.trusted)
    except OSError:  # a base may have none
        settings = GenerationConfig.from_model_config(base_config(finished.base))
    known = _ends(settings)
    stops = list(dict.fromkeys([*known, *_turn_ends(finished, tokenizer)]))
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops or None
    return settings


def _ends(settings: GenerationConfig) -> list[int]:
    known = settings.eos_token_id
    return [end for end in (known if isinstance(known, list) else [known]) if end is not None]


def _sampling(settings: GenerationConfig) -> dict[str, float]:
    if not settings.do_sample:
        return {}
    values = {name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}
    return {name: value for name, value in values.items() if value is not None}
