"""``python -m benchmarks [sft|dpo|rm] ...``: see ``sft.py`` and ``pairs.py``; without a name, SFT against the bare loop."""

from __future__ import annotations

import sys

from benchmarks import pairs, sft

NAMES = {"sft": sft.main, "dpo": pairs.dpo, "rm": pairs.rm}


def main() -> None:
    """Run the benchmark that is named."""
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in NAMES else ("sft", sys.argv[1:])
    NAMES[name](rest)


if __name__ == "__main__":
    main()
