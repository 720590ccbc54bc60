"""The one loop: steps, optimizers, schedules, checkpoints, logs."""
