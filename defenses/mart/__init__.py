"""MART: misclassified images weigh more, in a boosted cross-entropy and a KL (Wang et al. 2020)."""

from robench.defenses.mart.mart import MART as MART
