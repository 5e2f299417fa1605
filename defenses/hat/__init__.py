"""HAT: images beyond the adversarial ones, with a standard network's labels (Rade et al. 2022)."""

from robench.defenses.hat.hat import HAT as HAT
