"""ADR: labels softened by a running average of the student itself (Wu et al. 2024)."""

from robench.defenses.adr.adr import ADR as ADR
