"""ARD: the teacher's clean logits, distilled on adversarial examples (Goldblum et al. 2020)."""

from robench.defenses.ard.ard import ARD as ARD
