"""The shared attack layer. Images are (N, C, H, W) float tensors in [0, 1]."""

from robench.attacks.ascent import Ascent as Ascent
from robench.attacks.base import ATTACKS as ATTACKS
from robench.attacks.base import Attack as Attack
from robench.attacks.base import Classifier as Classifier
from robench.attacks.base import frozen as frozen
from robench.attacks.base import make_attack as make_attack
from robench.attacks.threat import ThreatModel as ThreatModel
from robench.attacks.verify import Verdict as Verdict
from robench.attacks.verify import verify as verify
