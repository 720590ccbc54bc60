"""The GGUF file of an export, for llama.cpp and Ollama: what is looked at beforehand, and how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import ModelError
from tunesmith.export import converter
from tunesmith.export.sentencepiece import write_tokenizer_model
from tunesmith.model.files import CONFIG, read_json
from tunesmith.model.gguf_restore import GgufType, check_readable, is_restored_here

FILE = "model.gguf"
_BYTES: dict[GgufType, float] = {"f32": 4, "f16": 2, "bf16": 2, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Conversion:
    """How a GGUF file is written.

    Attributes:
        script: of llama.cpp's converter.
        kind: of the numbers.
        restored: whether it is written back as a Transformers folder to be compared.
    """

    script: Path
    kind: GgufType
    restored: bool

    def bytes_for(self, parameters: int) -> int:
        """Room that a model needs meanwhile."""
        return int(parameters * (_BYTES[self.kind] + (4 if self.restored else 0)))

    def write(self, folder: Path, name: str, trusted: bool) -> Path:
        """Write the file into the folder of the exported model.

        Args:
            folder: weights, configuration, tokenizer.
            name: of the model.
            trusted: whether Python code beside the model may run.

        Raises:
            ModelError: the converter failed, or would run code.
        """
        for file in (CONFIG, "tokenizer_config.json"):
            if not trusted and (folder / file).is_file() and read_json(folder / file).get("auto_map"):
                raise ModelError(
                    f"--gguf: auto_map in {file} names Python code, which the converter would run; see --trust-remote-code"
                )
        made = write_tokenizer_model(folder)
        try:
            converter.convert(self.script, folder, folder / FILE, self.kind, name)
        finally:
            if made is not None:
                made.unlink()
        return folder / FILE


def prepare(kind: GgufType, given: Path | None, model: Path) -> Conversion:
    """Check that a model can be converted, and what was written compared; nothing is written.

    Args:
        kind: of the numbers.
        given: folder or script of the converter, if not the fetched one.
        model: folder with the configuration of the model.

    Raises:
        ConfigError: there is no converter.
        ModelError: GGUF files of this kind of model cannot be read back.
    """
    script = converter.find(given)
    check_readable(read_json(model / CONFIG)["model_type"])
    return Conversion(script, kind, is_restored_here(model))
