"""RSLAD: robust soft labels in the attack and in both loss terms (Zi et al. 2021)."""

from robench.defenses.rslad.rslad import RSLAD as RSLAD
