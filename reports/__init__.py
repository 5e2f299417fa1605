"""What the measurements say: tables, figures and a page. Never imports torch."""

from robench.reports.base import REPORTS as REPORTS
from robench.reports.base import Report as Report
from robench.reports.base import render as render
from robench.reports.base import summary as summary
from robench.reports.record import Corruptions as Corruptions
from robench.reports.record import Crossing as Crossing
from robench.reports.record import Epoch as Epoch
from robench.reports.record import Gallery as Gallery
from robench.reports.record import Landscape as Landscape
from robench.reports.record import Record as Record
from robench.reports.record import Steps as Steps
from robench.reports.record import Transfer as Transfer
from robench.reports.store import Results as Results
from robench.reports.store import load as load
from robench.reports.store import save as save
