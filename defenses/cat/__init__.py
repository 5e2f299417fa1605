"""CAT: two networks, two ways of training, each other's teacher (Liu et al. 2023)."""

from robench.defenses.cat.cat import CAT as CAT
