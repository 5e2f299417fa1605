"""IKL: the KL of TRADES taken apart and put together again (Cui et al. 2024)."""

from robench.defenses.ikl.ikl import IKL as IKL
