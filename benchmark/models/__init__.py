"""The classifiers, one file per architecture. To add one: copy mobilenet.py, add its line here.

Every network takes images (N, C, H, W) in [0, 1] and returns logits (N, K).
"""

from robench.benchmark.models.build import MODELS as MODELS
from robench.benchmark.models.build import NORMALIZE as NORMALIZE
from robench.benchmark.models.build import Normalize as Normalize
from robench.benchmark.models.build import build_model as build_model
from robench.benchmark.models.build import load_factory as load_factory
from robench.benchmark.models.build import source_hash as source_hash
from robench.benchmark.models.mobilenet import mobilenetv2 as mobilenetv2
from robench.benchmark.models.resnet import preactresnet18 as preactresnet18
from robench.benchmark.models.resnet import resnet18 as resnet18
from robench.benchmark.models.resnet import small_resnet as small_resnet
from robench.benchmark.models.smallcnn import smallcnn as smallcnn
from robench.benchmark.models.wideresnet import wrn_28_10 as wrn_28_10
from robench.benchmark.models.wideresnet import wrn_34_10 as wrn_34_10
