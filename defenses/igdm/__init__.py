"""IGDM: the student's change along the attack matches the teacher's (Lee et al. 2025)."""

from robench.defenses.igdm.igdm import IGDM as IGDM
