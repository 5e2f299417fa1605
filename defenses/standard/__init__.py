"""Standard training: cross-entropy on clean images, no defense."""

from robench.defenses.standard.standard import Standard as Standard
