"""llama.cpp's own converter to GGUF: found, or fetched by the name of a package that carries it, and run.

It is plain Python over torch and transformers, so nothing is compiled. ``llama-cpp-python``'s source archive has it, with the
``gguf`` modules that belong to it; that archive is fetched once, compared by hash, and only these files are kept of it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from tunesmith.config.paths import cache_root
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.gguf_restore import GgufType
from tunesmith.model.package import download

log = logging.getLogger(__name__)

NAME = "llama.cpp"
SCRIPT = "convert_hf_to_gguf.py"
_PACKAGE, _VERSION = "llama-cpp-python", "0.3.36"
_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_INSIDE = PurePosixPath(f"llama_cpp_python-{_VERSION}/vendor/llama.cpp")
_KEPT = (SCRIPT, "LICENSE", "conversion", "gguf-py/gguf")
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def fetched() -> Path:
    """Where ``fetch`` puts the converter."""
    return cache_root() / "tools" / f"{NAME}-{_VERSION}"


def fetch() -> Path:
    """Folder of the converter; fetched the first time.

    Raises:
        ModelError: no connection, or another file than expected.
    """
    target = fetched()
    if (target / SCRIPT).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as scratch:
        requirement = f"{_PACKAGE}=={_VERSION}"
        log.info("fetching the source of %s (77 MB, once) for the converter in it", requirement)
        instead = "give the folder of a llama.cpp checkout with --gguf-converter"
        archive = download(requirement, Path(scratch), "the converter", instead, _SHA256)
        made = Path(scratch) / "made"
        _extract(archive, made)
        with contextlib.suppress(OSError):  # another process was faster; its result is the same
            made.rename(target)
    if not (target / SCRIPT).is_file():
        raise ModelError(f"{target}: could not be put in place; is the folder writable, is there space?")
    return target


def _extract(archive: Path, target: Path) -> None:
    """The files of the converter, each below ``target``; links and whatever else lies in the archive are passed over."""
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if not member.isfile() or not path.is_relative_to(_INSIDE) or ".." in path.parts:
                continue
            name = path.relative_to(_INSIDE)
            if any(name.is_relative_to(kept) for kept in _KEPT):
                file = members.extractfile(member)
                assert file is not None
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(file.read())


def find(given: Path | None) -> Path:
    """The converter's script, ready to run.

    Args:
        given: the script, or the folder with it; None: what ``fetch`` got.

    Raises:
        ConfigError: it is not there, or a module that it needs is not; says which command brings it.
    """
    folder = given or fetched()
    script = folder if folder.is_file() else folder / SCRIPT
    if given is not None and not script.is_file():
        raise ConfigError(f"--gguf-converter: no {SCRIPT} in {given}; give the folder of a llama.cpp checkout, or the script")
    if not script.is_file():
        raise ConfigError(f"--gguf: llama.cpp's converter has not been fetched; `tunesmith fetch {NAME}` does, once (77 MB)")
    if find_spec("sentencepiece") is None:
        raise ConfigError("--gguf: llama.cpp's converter needs sentencepiece; pip install 'tunesmith[gguf]'")
    return script


def convert(script: Path, model: Path, target: Path, kind: GgufType, name: str) -> None:
    """Write a model folder as a GGUF file, in a process of its own, which asks no hub.

    Args:
        script: from ``find``.
        model: folder in Transformers' layout.
        target: file to write.
        kind: of the numbers in it.
        name: of the model, for its metadata.

    Raises:
        ModelError: the converter failed; with its last words.
    """
    command = [sys.executable, str(script), str(model), "--outfile", str(target), "--outtype", kind, "--model-name", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **_OFFLINE})
    if done.returncode or not target.is_file():
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ModelError(f"--gguf: {script.name} cannot convert the model: {said[-1] if said else f'exit {done.returncode}'}")
