"""``python -m benchmarks [sft|dpo|rm|rollout] ...``: see ``sft.py``, ``pairs.py``, ``rollout.py``; without a name, SFT."""

from __future__ import annotations

import sys

from benchmarks import pairs, rollout, sft

NAMES = {"sft": sft.main, "dpo": pairs.dpo, "rm": pairs.rm, "rollout": rollout.main}


def main() -> None:
    """Run the benchmark that is named."""
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in NAMES else ("sft", sys.argv[1:])
    NAMES[name](rest)


if __name__ == "__main__":
    main()
