"""The verbs. Each one loads what it needs when it is called, so that ``--help`` answers at once."""

from __future__ import annotations

import errno
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith import process
from tunesmith.errors import TunesmithError

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune large language models: one YAML, one verb at a time.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

verify = typer.Typer(help="Prove what the package promises.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(verify, name="verify")

Config = Annotated[Path, typer.Argument(help="YAML or JSON file.", show_default=False)]
ReadAs = Literal["conversation", "document", "pair", "feedback", "prompt"]
ReadAsOption = Annotated[
    ReadAs | None, typer.Option("--as", help="What rows are read as; by default what the stage needs.", show_default=False)
]
Base = Annotated[
    str | None, typer.Option(help="Model to merge into, in place of the one that the run names.", show_default=False)
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0, help="fp32: greatest difference of a logit; else (and of a GGUF file): relative difference.", show_default=False
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code beside the model that --base names, or in RUN if it is whole."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value settings that win over the file.", show_default=False)]


@app.callback(invoke_without_command=True)
def options(show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options before the verb."""
    if show_version:
        print(f"tunesmith {version('tunesmith')}")
        raise typer.Exit


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train as a configuration says."""
    from tunesmith.config.load import load_config

    settings, notices = load_config(config, overrides or ())
    from tunesmith.report.plot import plot_loss
    from tunesmith.report.summary import summarize
    from tunesmith.stages.run import run
    from tunesmith.train.progress import ConsoleReporter

    with ConsoleReporter() as reporter:
        for notice in notices:
            reporter.note(f"note: {notice}")
        folder = run(settings, reporter)
        if settings.model.plot_loss:
            plot_loss(folder)
        for line in summarize(folder):
            reporter.note(line)


@app.command()
def pipeline(
    file: Annotated[Path, typer.Argument(help="YAML file with a list of stages.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value for all stages, stage.key=value for one; they win over the file.", show_default=False),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Run this stage alone.", show_default=False)] = None,
    start: Annotated[str | None, typer.Option("--from", help="Run from this stage on.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and check all of it.")] = False,
) -> None:
    """Train several stages, each from the results of earlier ones; finished ones are kept, a stopped one is gone on with."""
    from functools import partial

    from tunesmith.pipeline.run import Call, look, run_pipeline

    call, say = Call(file, tuple(overrides or ()), only, start), partial(print, flush=True)
    if not dry_run:
        run_pipeline(call, say)
    elif look(call, say):
        raise typer.Exit(1)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
    png: Annotated[Path | None, typer.Option(help="Draw the token lengths into this file.")] = None,
    kind: ReadAsOption = None,
) -> None:
    """Find every error in configuration, data and template, without loading weights; exit status 1 if there is one."""
    from tunesmith.check.data_check import check as look
    from tunesmith.check.show import plot_lengths, sentences

    checked = look(config, overrides or (), kind)
    if as_json:
        print(json.dumps(checked.to_dict(), ensure_ascii=False))
    else:
        for line in sentences(checked):
            print(line)
    if png is not None and checked.lengths:
        plot_lengths(checked, png)
    raise typer.Exit(1 if checked.errors else 0)


@app.command()
def preview(
    config: Config,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows to show.")] = 2,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Show this row: its number in the first data set, or NAME:NUMBER; may be given again."),
    ] = None,
    kind: ReadAsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Show rows as the model is trained on them, the learned part marked."""
    from rich.console import Console

    from tunesmith.config.load import load_config

    settings, _ = load_config(config, overrides or ())
    from tunesmith.check.preview import preview as show
    from tunesmith.check.preview import preview_rows

    console = Console(highlight=False, soft_wrap=True)
    if row:
        preview_rows(settings, row, console, as_json, kind)
    else:
        show(settings, rows, console, as_json, kind)


@app.command()
def chat(
    target: Annotated[
        str, typer.Argument(help="Run folder, model folder, hub id or builtin:smollm2-135m.", show_default=False)
    ],
    overrides: Overrides = None,
    prompt: Annotated[str | None, typer.Option(help="Answer this and end.")] = None,
) -> None:
    """Talk to a finished run, or to a model."""
    from tunesmith.serve.chat import answer_once, load_chat, talk

    loaded = load_chat(target, overrides or ())
    if prompt is None:
        talk(loaded)
    else:
        answer_once(loaded, prompt)


@app.command()
def predict(
    target: Annotated[Path, typer.Argument(help="Finished run of stage rm, or its YAML.", show_default=False)],
    file: Annotated[str, typer.Argument(help="Answers or pairs: a path, or a name in dataset_info.json.", show_default=False)],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="JSONL to write; scores-NAME.jsonl in the run if not given.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace it.")] = False,
) -> None:
    """Score a file of answers or pairs with a reward model; the last line printed is the file of scores."""
    from tunesmith.serve.predict import predict as score

    print(score(target, file, overrides or (), output, overwrite, print))


@app.command()
def config(
    schema: Annotated[bool, typer.Option("--schema", help="JSON Schema, so that editors complete the YAML.")] = False,
) -> None:
    """List every key with its type, default and meaning."""
    from tunesmith.config.schema import describe_keys, json_schema

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    current = ""
    for section, key, kind, default, meaning in describe_keys():
        if section != current:
            print(f"\n# {section}")
            current = section
        print(f"{key}  ({kind}; default {default})\n    {meaning}")


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="smollm2-135m, or llama.cpp: the converter of export --gguf.")]) -> None:
    """Fetch a built-in model, or llama.cpp's converter to GGUF; the last line printed is its folder."""
    from tunesmith.export import converter
    from tunesmith.model.builtin import fetch as fetch_model

    print(converter.fetch() if name == converter.NAME else fetch_model(name))


@app.command("templates")
def show_templates(name: Annotated[str | None, typer.Argument(help="One of them.", show_default=False)] = None) -> None:
    """List the chat templates that `template` takes by name; with a name, print that one."""
    from tunesmith.data.named import get_template, templates

    if name is not None:
        print(get_template(name).source, end="")
        return
    known = templates()
    width = max(len(template.name) for template in known)
    for template in known:
        print(f"{template.name:{width}}  {template.description}")


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Draw a run's curves anew; the last line printed is the picture's path."""
    from tunesmith.report.plot import plot_loss

    print(plot_loss(run))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Finished run, or folder of an adapter.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder to make.", show_default=False)],
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"], typer.Option(help="Of the stored weights; auto: that of the base.")
    ] = "auto",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Largest file of weights, 5GB if not given.", show_default=False)
    ] = None,
    adapter_only: Annotated[bool, typer.Option("--adapter-only", help="The adapter, not merged.")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="Write a Modelfile, too.")] = False,
    gguf: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option(help="Write model.gguf, too, with numbers of this type, for llama.cpp and Ollama.", show_default=False),
    ] = None,
    gguf_converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp checkout to convert with, in place of `tunesmith fetch llama.cpp`.", show_default=False),
    ] = None,
    push: Annotated[str | None, typer.Option(help="Upload it to this repository (ORG/NAME).", show_default=False)] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: make a new repository public.")] = False,
    base: Base = None,
    tolerance: Tolerance = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run's result merged (or as an adapter) for other programs, and compare it with the run before it is kept."""
    from tunesmith.errors import ConfigError
    from tunesmith.export.export import ExportOptions
    from tunesmith.export.export import export as write
    from tunesmith.export.push import push as upload
    from tunesmith.verify.merge import Check

    if public and push is None:
        raise ConfigError("--public: says how --push makes a repository; give it together with --push ORG/NAME")
    options = ExportOptions(
        dtype, max_shard_size, adapter_only, ollama, overwrite, tolerance, base, push, gguf, gguf_converter, trust_remote_code
    )
    folder = write(run, output, options, Check, print)
    if push is not None:
        print(f"uploaded to {upload(folder, push, private=not public)}")


@verify.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Finished run, or folder of an adapter.", show_default=False)],
    base: Base = None,
    tolerance: Tolerance = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Merge a run's adapter, keep nothing, and compare the merged model with base and adapter; exit status 1 if they differ."""
    from tunesmith.verify.merge import verify_merge

    proof = verify_merge(run, base, tolerance, trust_remote_code)
    print(json.dumps(proof.to_dict()) if as_json else "\n".join(proof.lines()))
    raise typer.Exit(1 if proof.problems else 0)


@verify.command()
def masks(
    model: Annotated[str, typer.Option(help="Whose tokenizer: folder, hub id or builtin:smollm2-135m.")],
    templates: Annotated[Path | None, typer.Option(help="Folder of *.jinja files; else the model's own and all named.")] = None,
    conversations: Annotated[int, typer.Option(min=1, help="How many for each template.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the conversations.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for machines.")] = False,
) -> None:
    """Check what is learned of random conversations against transformers alone.

    Exit status 1 if anything is wrong, or nothing could be certified.
    """
    from tunesmith.verify.masks import verify_masks
    from tunesmith.verify.outcome import HEADING, TemplateResult, lines, summary, totals

    def show(result: TemplateResult) -> None:
        if not as_json:
            print("\n".join(lines(result)), flush=True)

    if not as_json:
        print(HEADING)
    results = verify_masks(model, templates, conversations, seed, show)
    total = totals(results)
    if as_json:
        print(json.dumps({"templates": [result.to_dict() for result in results], "totals": total}, ensure_ascii=False))
    else:
        print("\n".join(summary(results)))
    raise typer.Exit(1 if total["wrong"] or not total["certified"] else 0)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point: errors that a user can cure are one message and an exit status, not a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks when imported, and of each product that it rounds
    logger = logging.getLogger("tunesmith")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
    try:
        app()
    except TunesmithError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        what = error.filename or "a file"
        print(f"error: {what} cannot be written: {error.strerror}; make room, and go on from there", file=sys.stderr)
        sys.exit(TunesmithError.exit_code)


def start() -> None:
    """The program: what trains is started with an allocator that suits it."""
    if sys.argv[1:2] == ["train"]:
        process.prepare(sys.orig_argv)
    main()
