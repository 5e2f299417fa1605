"""IAD: the student trusts its teacher where that is right (Zhu et al. 2022)."""

from robench.defenses.iad.iad import IAD as IAD
from robench.defenses.iad.iad import IAD2 as IAD2
