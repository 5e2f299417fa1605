"""PGD-AT: cross-entropy on PGD examples (Madry et al. 2018)."""

from robench.defenses.pgd_at.pgd_at import PGDAT as PGDAT
