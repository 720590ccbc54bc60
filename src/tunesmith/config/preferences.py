"""Names of the losses of preference pairs, known before torch is imported (``losses/preference.py`` has the functions)."""

from __future__ import annotations

PREFERENCE_LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "kto_pair", "aot", "aot_unpaired", "orpo", "simpo", "cpo", "sft",
)  # fmt: skip
"""What ``pref_loss`` takes."""

REFERENCE_FREE_LOSSES = frozenset({"orpo", "simpo", "cpo", "sft"})
"""Those that look at the model alone."""

SMOOTHED_LOSSES = frozenset({"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "cpo"})
"""Those that heed ``dpo_label_smoothing``."""
