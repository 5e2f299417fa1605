"""TRADES: clean cross-entropy plus KL between clean and adversarial (Zhang et al. 2019)."""

from robench.defenses.trades.trades import TRADES as TRADES
