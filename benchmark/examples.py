"""Adversarial examples on disk: kept by an evaluation, verified again, replayed later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from robench.attacks.base import Classifier
from robench.attacks.threat import ThreatModel
from robench.attacks.verify import verify
from robench.benchmark.data import Images
from robench.benchmark.data.streams import Streamed
from robench.benchmark.progress import Reporter
from robench.benchmark.sources import load_network
from robench.benchmark.spec import RunSpec, threat_models
from robench.errors import UsageError, one_line
from robench.files import write_atomic


@dataclass(frozen=True)
class Examples:
    """Confirmed adversarial examples of one network.

    Attributes:
        image: (M,) which test images. x_adv: (M, C, H, W) float.
        threat, data_sha256: what they were made under, and the hash of the whole image set.
    """

    image: Tensor
    x_adv: Tensor
    threat: str
    data_sha256: str

    def save(self, path: Path) -> None:
        tensors = {"image": self.image.contiguous(), "x_adv": self.x_adv.contiguous()}
        facts = {"threat": self.threat, "data_sha256": self.data_sha256}
        write_atomic(path, safetensors.torch.save(tensors, facts))

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Raises UsageError: not there, damaged, or no file of examples."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                found = cls(file.get_tensor("image"), file.get_tensor("x_adv"),
                            facts["threat"], facts["data_sha256"])
        except Exception as error:  # damaged bytes may raise anything in a parser
            raise UsageError(f"{path} holds no adversarial examples ({one_line(error)})") from None
        shapes = found.image.dtype == torch.int64 and found.x_adv.is_floating_point()
        if not (shapes and found.image.ndim == 1 and found.x_adv.ndim == 4
                and len(found.image) == len(found.x_adv)):
            raise UsageError(f"{path} holds no adversarial examples (wrong shapes)")
        return found

    def starts(self, data: Images) -> Tensor:
        """(N, C, H, W) the example of each image, the image itself where there is none.

        Raises UsageError for examples of other images, and of images that are not in memory.
        """
        self._check(data)
        if isinstance(data.x, Streamed):
            raise UsageError("--replay holds all images in memory: take fewer with --limit N, or "
                             "more memory with --memory-limit")
        images = data.x.clone()
        images[self.image] = self.x_adv.to(images)
        return images

    def count(self, model: Classifier, data: Images, device: torch.device) -> tuple[int, int]:
        """(examples that fool the model, examples outside the threat model), in full precision.

        Raises UsageError for examples of other images.
        """
        self._check(data)
        threat, fooled, outside = ThreatModel.parse(self.threat), 0, 0
        for rows in torch.split(torch.arange(len(self.image)), 500):
            image = self.image[rows]
            verdict = verify(model, data.x[image].to(device), self.x_adv[rows].to(device),
                             data.y[image].to(device), threat)
            fooled += int(verdict.fooled.sum())
            outside += int(verdict.outside.sum())
        return fooled, outside

    def _check(self, data: Images) -> None:
        known = bool(((self.image >= 0) & (self.image < len(data))).all())
        if not (known and self.x_adv.shape[1:] == data.x.shape[1:]
                and self.data_sha256 == data.sha256()):
            raise UsageError("the examples are of other images: name their --dataset and --limit")


def verify_file(path: Path, sources: Sequence[str], spec: RunSpec, *, zoo: Path) -> str:
    """A line for each network: how many of the file's examples fool it.

    Raises UsageError, also where `spec` names threat models and that of the file is none of them.
    """
    from robench.benchmark.matrix import Matrix

    examples = Examples.load(path)
    if spec.threats and ThreatModel.parse(examples.threat) not in threat_models(spec):
        raise UsageError(f"{path} holds examples at {examples.threat}, not at "
                         f"{' or '.join(spec.threats)}: leave --threat out")
    matrix = Matrix(spec.model_copy(update={"threats": (examples.threat,)}), Reporter(quiet=True))
    lines = []
    for source in sources:
        network = load_network(source, matrix.dataset, matrix.threat, model=spec.model, zoo=zoo)
        fooled, outside = examples.count(network.net.to(matrix.device), matrix.test, matrix.device)
        lines.append(f"{source}: {fooled} of {len(examples.image)} examples fool it, "
                     f"{outside} are outside {examples.threat}\n")
    return "".join(lines)
