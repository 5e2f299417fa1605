"""AWP: adversarial weight perturbation (Wu et al. 2020)."""

from robench.defenses.awp.awp import AWP as AWP
