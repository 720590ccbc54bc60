"""``python -m tunesmith``."""

from tunesmith.cli import start

start()
