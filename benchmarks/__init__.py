"""Speed and memory against other trainers, by turns in one run."""
