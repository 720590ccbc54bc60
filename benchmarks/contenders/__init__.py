"""Trainers that are compared, each a script for a process of its own: told a step at a time, it answers what that took.

On standard input comes a line for each update that is to be made; the answer is a JSON object on a line of standard output:
``{"seconds", "tokens", "loss"}``, of ours also ``common``, the tokens that rows have as the beginning of another. The first
answer, ``{"ready": ...}``, says that everything is loaded; ``once`` are the seconds of what was computed for ``pairs`` pairs
before the first update. What a trainer prints besides must go to standard error. Arguments: model folder, file of rows (JSON;
alpaca, or pairs in the sharegpt form), the work unit as JSON.

Of PPO a line is a whole iteration: ``seconds`` are also told by part, ``tokens`` are those of answers, ``losses`` has what each
update lost; before the file of rows comes the reward model's adapter.
"""
