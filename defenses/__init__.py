"""The defenses, one folder each. To add one: copy trades/ and add its line here."""

from robench.defenses.adaad import AdaAD as AdaAD
from robench.defenses.ard import ARD as ARD
from robench.defenses.awp import AWP as AWP
from robench.defenses.base import DEFENSES as DEFENSES
from robench.defenses.base import Defense as Defense
from robench.defenses.base import Losses as Losses
from robench.defenses.base import Moment as Moment
from robench.defenses.base import Nets as Nets
from robench.defenses.base import Remembered as Remembered
from robench.defenses.base import make_defense as make_defense
from robench.defenses.peeraid import PeerAiD as PeerAiD
from robench.defenses.pgd_at import PGDAT as PGDAT
from robench.defenses.rslad import RSLAD as RSLAD
from robench.defenses.standard import Standard as Standard
from robench.defenses.trades import TRADES as TRADES
