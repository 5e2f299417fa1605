"""Data sets by name: labelled images in [0, 1], in memory or read when they are needed."""

from robench.benchmark.data.images import Augment as Augment
from robench.benchmark.data.images import Dataset as Dataset
from robench.benchmark.data.images import Held as Held
from robench.benchmark.data.images import Images as Images
from robench.benchmark.data.images import check_images as check_images
from robench.benchmark.data.images import hold_out as hold_out
from robench.benchmark.data.registry import DATASETS as DATASETS
from robench.benchmark.data.registry import class_order as class_order
from robench.benchmark.data.registry import load_dataset as load_dataset
