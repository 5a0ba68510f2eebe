"""What the tensors of a module of experts are called."""

from __future__ import annotations

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the weights of experts, of which a module has two."""

SCALES = "_SCB"
"""What the name of a weight's scales ends in, beside that of the weight: bitsandbytes' name for them."""
