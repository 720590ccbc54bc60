"""The numbers of a GGUF file put back under the names and into the order in which Transformers stores them.

Transformers reads most kinds of GGUF files itself. Of the two here it does not: it knows no ``gguf`` kind ``gemma``, and takes
a mixture of experts of the kind ``llama`` for a plain Llama. llama.cpp stores rows of query and key projections of ``llama`` in
pairs that rotate together, norms of ``gemma`` with 1 added, and experts stacked; all three are undone.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal

from tunesmith.errors import ModelError
from tunesmith.model.files import CONFIG, read_json

GgufType = Literal["f32", "f16", "bf16", "q8_0"]
"""Of the numbers in a GGUF file, as the converter writes them."""

_OURS = ("gemma", "mixtral")
_OTHER_NAMES = {"gemma3_text": "gemma3", "gemma4_text": "gemma4", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
_NO_MODELS = {"general", "tokenizer"}


def is_restored_here(folder: Path) -> bool:
    """Whether a model folder is of a kind whose GGUF files ``restore`` reads, and not transformers."""
    return read_json(folder / CONFIG).get("model_type") in _OURS


def check_readable(model_type: str) -> None:
    """Raise ModelError when GGUF files of a kind of model cannot be read back, and so not be compared."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {*GGUF_SUPPORTED_ARCHITECTURES, *_OURS} - _NO_MODELS
    if _OTHER_NAMES.get(model_type, model_type) not in known:
        raise ModelError(
            f"--gguf: what is written is compared before it is kept; GGUF files of the kind {model_type} cannot be read back "
            f"(they can of: {', '.join(sorted(known))}). Export without --gguf, and run llama.cpp's convert_hf_to_gguf.py on it"
        )


def restore(gguf: Path, folder: Path, target: Path) -> None:
    """Write a Transformers folder with the numbers of a GGUF file, in float32.

    Args:
        gguf: made from the model in ``folder``.
        folder: whose configuration, names and shapes are taken; none of its numbers.
        target: folder to make.

    Raises:
        ModelError: a tensor is missing, or has another shape.
    """
    import torch
    from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
    from safetensors import safe_open
    from safetensors.torch import save_file

    reader = GGUFReader(gguf)
    kind = reader.fields["general.architecture"].contents()
    config = read_json(folder / CONFIG)
    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == kind)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    target.mkdir()
    for name in (CONFIG, "model.safetensors.index.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, target)
    for path in sorted(folder.glob("*.safetensors")):
        restored = {}
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                expert = re.search(r"\.experts\.(\d+)\.", key)
                plain = key if expert is None else key.replace(expert[0], ".experts.", 1)
                found = tensors.get(names.get_name(plain, (".weight", ".bias")))
                if found is None and key == "lm_head.weight":  # llama.cpp takes the embedding then
                    found = tensors["token_embd.weight"]
                shape = file.get_slice(key).get_shape()
                if found is None:
                    raise ModelError(f"{gguf.name}: has no tensor for {key}")
                values = torch.from_numpy(dequantize(found.data, found.tensor_type).copy()).float()
                values = values[int(expert[1])] if expert is not None else values
                if list(values.shape) != shape:
                    raise ModelError(f"{gguf.name}: {found.name} has shape {list(values.shape)}, {key} has {shape}")
                restored[key] = _undone(values, key, kind, config).contiguous()
        save_file(restored, target / path.name, metadata={"format": "pt"})


def _undone(values: Any, key: str, kind: str, config: dict[str, Any]) -> Any:
    if kind == "gemma" and key.endswith("norm.weight"):
        return values - 1
    if kind == "llama" and (projection := re.search(r"\.(q|k)_proj\.", key)):
        heads = config["num_attention_heads" if projection[1] == "q" else "num_key_value_heads"]
        paired = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return paired.swapaxes(1, 2).reshape(values.shape)
    return values


def vocabulary(gguf: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer: values by the name after ``tokenizer.``; its tokens among them."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    wanted = ("ggml.model", "ggml.tokens", "ggml.eos_token_id", "ggml.add_space_prefix", "chat_template")
    return {name: reader.fields[key].contents() for name in wanted if (key := f"tokenizer.{name}") in reader.fields}
