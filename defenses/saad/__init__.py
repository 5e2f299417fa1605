"""SAAD: images on which the attack confuses the teacher too weigh more (Lee and Chung 2026)."""

from robench.defenses.saad.saad import SAAD as SAAD
