"""``python -m benchmarks [sft|dpo|rm|ppo|rollout] ...``: see ``sft.py``, ``pairs.py``, ``ppo.py``, ``rollout.py``; else SFT."""

from __future__ import annotations

import sys

from benchmarks import pairs, ppo, rollout, sft

NAMES = {"sft": sft.main, "dpo": pairs.dpo, "rm": pairs.rm, "ppo": ppo.main, "rollout": rollout.main}


def main() -> None:
    """Run the benchmark that is named."""
    name, rest = (sys.argv[1], sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in NAMES else ("sft", sys.argv[1:])
    NAMES[name](rest)


if __name__ == "__main__":
    main()
