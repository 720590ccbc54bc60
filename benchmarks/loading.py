"""Time and peak memory of loading a model, against the size of its weights.

``python -m benchmarks.loading [MODEL]`` (default: the built-in model). Each row is a fresh process; what the imports take is
measured first and subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

_CHILD = """
import json, resource, sys, time
from tunesmith.config.arguments import ModelArguments
from tunesmith.model.load import load_pretrained
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
args = ModelArguments(model_name_or_path=sys.argv[1], compute_dtype=sys.argv[2])
import transformers.models.llama.modeling_llama
before, begun = peak(), time.perf_counter()
model, _ = load_pretrained(args)
held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(json.dumps({"seconds": time.perf_counter() - begun, "peak": peak() - before, "held": held}))
"""


def main() -> None:
    """Print one row for each dtype."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="builtin:smollm2-135m", metavar="MODEL")
    name = parser.parse_args().model
    from tunesmith.config.arguments import ModelArguments
    from tunesmith.model.source import locate

    folder = Path(locate(ModelArguments(model_name_or_path=name)).path)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    print(f"{name}: {size:.0f} MiB of weights on disk")
    for dtype in ("bf16", "fp32"):
        command = [sys.executable, "-c", _CHILD, name, dtype]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{dtype}: {found['held']:.0f} MiB of parameters, peak {found['peak']:.0f} MiB above the imports "
            f"({found['peak'] / found['held']:.2f} of the parameters), {found['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
