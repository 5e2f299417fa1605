"""PeerAiD: a peer learns online to defend the student (Jung et al. 2024)."""

from robench.defenses.peeraid.peeraid import PeerAiD as PeerAiD
