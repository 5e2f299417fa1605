"""LBGAT: a natural network, trained along, guides the robust one's logits (Cui et al. 2021)."""

from robench.defenses.lbgat.lbgat import LBGAT as LBGAT
