"""KD & SWA, called AKD2: a robust and a natural teacher on attacked images (Chen et al. 2021)."""

from robench.defenses.akd2.akd2 import AKD2 as AKD2
