"""AdaAD: the attack maximizes the gap between teacher and student (Huang et al. 2023)."""

from robench.defenses.adaad.adaad import AdaAD as AdaAD
