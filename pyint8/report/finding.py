"""What `pyint8 doctor` finds, one thing at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "slow", "broken", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One thing about this machine.

    Attributes:
        name: What was looked at.
        state: "ok"; "slow", where it holds loads back; "broken", where it keeps them from working; "unknown".
        value: What was found, in words.
        facts: The same as data: bytes, GB/s, versions.
        consequence: What it means for a load; None if nothing.
        mend: What to do about it; None if nothing.
    """

    name: str
    state: State
    value: str
    facts: dict[str, Any] = field(default_factory=dict)
    consequence: str | None = None
    mend: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return asdict(self)
