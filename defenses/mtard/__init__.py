"""MTARD: a robust and a natural teacher, balanced as the student learns (Zhao et al. 2022)."""

from robench.defenses.mtard.mtard import MTARD as MTARD
