"""Speed and memory against other trainers, by turns in one run."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
