"""The checks by which an evaluation distrusts itself: what each tests, its rule, what to do.

A check measures one number of which more is worse, and flags where it is above the check's limit.
Sources: the checklist of Carlini et al. 2019 (arXiv 1902.06705), the flags of AutoAttack (Croce
and Hein 2020), the indicators of attack failure of Pintor et al. 2022 (arXiv 2106.09947), the
active tests of Zimmermann et al. 2022 (arXiv 2206.13991). The numbers are measured in
`robench.benchmark.checks` (run, eval), `robench.benchmark.trust` (doctor) and
`robench.reports.judge` (from several records). No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["fail", "warn", "report"]  # what a check may say at worst
When = Literal["run", "cheap", "records", "doctor"]
Verdict = Literal["ok", "warn", "fail", "report", "not applicable"]
LUCK = 4  # images on which two runs of an attack may differ by chance
WHERE: dict[When, str] = {
    "run": "run, eval",  # costs nothing: it falls out of what is measured anyway
    "cheap": "run, eval (a few passes)",
    "records": "run, eval, report (from several records)",
    "doctor": "doctor",
}


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        number: in the checklist of 24; 0 for those beyond it.
        tests: what is measured. unit: of that number: "%" and "points" of a share, else "".
        limit: flagged above it. level: of the flag; a `report` is a number without a verdict.
        says: what a flag means; `{}` is the number. cure: what to do.
        unless: checks after whose flag this one would say nothing new.
    """

    id: str
    number: int
    when: When
    tests: str
    unit: Literal["%", "points", ""]
    limit: float
    level: Level
    says: str
    cure: str
    unless: tuple[str, ...] = ()

    def shown(self, value: float) -> str:
        """The number with its unit."""
        if self.unit == "":
            return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
        return f"{100 * value:.1f} %" if self.unit == "%" else f"{100 * value:.1f} points"

    def text(self, value: float) -> str:
        """The flag, "id: what was found. What to do."; the id is what programs look for."""
        return f"{self.id}: {self.says.format(self.shown(value))}. {self.cure}."


@dataclass(frozen=True)
class Finding:
    """What a check found; `value` is None where it could not be made, and `note` says why."""

    check: Check
    value: float | None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        if self.value is None:
            return "not applicable"
        if self.check.level == "report":
            return "report"
        return "ok" if self.value <= self.check.limit else self.check.level  # NaN is flagged

    @property
    def flagged(self) -> bool:
        return self.verdict in ("warn", "fail")


def texts(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The flags among them."""
    return tuple(f.check.text(f.value) for f in findings if f.flagged and f.value is not None)


def flag(id: str, value: float) -> tuple[str, ...]:
    """The flag of a check for this number, if it raises one."""
    return texts([Finding(CHECKS[id], value)])


def id_of(text: str) -> str:
    """The id at the beginning of a flag; "" where there is none of ours."""
    found = text.partition(":")[0]
    return found if found in CHECKS else ""


ADAPT = "Trust no number without an attack made for this defense"
_CHECKS = (
    Check("eval-mode", 1, "run", "modules in train mode whose output depends on the mode", "", 0,
          "warn", "{} modules were given in train mode; here they are attacked in eval mode, and "
          "what was measured elsewhere in train mode depends on the batch",
          "Call model.eval() first"),
    Check("probabilities", 2, "run", "outputs in [0, 1] that sum to 1 (1: they do)", "", 0,
          "warn", "the outputs look like softmax probabilities, not logits; gradients vanish and "
          "the robust accuracy is too high", "Return logits"),
    Check("random", 3, "cheap", "difference of logits over five passes, relative to the largest",
          "", 1e-4, "fail",
          "two passes over the same images differ (by {} of the largest logit); a single run of "
          "these attacks overstates the robustness of a randomized model",
          "Attack it with autoattack-rand, or fix its randomness"),
    Check("batch-invariant", 4, "cheap", "difference of an image's logits alone, among others, "
          "repeated and beside noisy copies, relative to the largest", "", 1e-3, "fail",
          "what the network says about an image depends on the rest of the batch (by {} of the "
          "largest logit): it may recognize an attack by its batches",
          "Use statistics of the training, not of the batch", unless=("random",)),
    Check("zero-grad", 5, "cheap", "images whose gradients of cross-entropy and of margin are "
          "both zero or not finite", "%", 0.01, "fail",
          "{} of the images have no gradient at all: attacks by gradients stand still",
          "Replace what has no derivative by a smooth copy in the backward pass (BPDA), and "
          "attack that"),
    Check("saturated", 0, "cheap", "images whose gradient of cross-entropy alone is zero or not "
          "finite", "%", 0.01, "warn",
          "the cross-entropy of {} of the images is saturated and has no gradient: FGSM and PGD "
          "stand still, while losses of the margin do not",
          "Rank by cw, apgd-dlr or autoattack", unless=("zero-grad",)),
    Check("grad-vs-fd", 6, "cheap", "images whose directional derivative differs by more than a "
          "tenth from finite differences in float64", "%", 0.1, "warn",
          "the gradient is wrong at {} of the images: part of the network is hidden from it",
          "Look for detach, no_grad and custom backward passes, and attack without them",
          unless=("random", "zero-grad")),
    Check("dynamic", 7, "cheap", "gradients that a forward pass computes itself", "", 0, "warn",
          "the network computes gradients in its forward pass ({} calls): it defends itself with "
          "an optimization that standard attacks do not see through", ADAPT),
    Check("masking", 8, "run", "images that Square breaks after gradients did not, beyond 4", "%",
          0.002, "warn",
          "Square, which uses no gradients, broke {} of the images and 4 more that the parts "
          "before it did not: gradients may be masked, and an attack made for this model break "
          "more", ADAPT),
    Check("transfer<=whitebox", 9, "doctor", "images that fall to the examples of an undefended "
          "network and not to the attack", "%", 0.01, "warn",
          "examples of an undefended network break {} of the images that the attack does not: it "
          "is weaker than it should be", ADAPT),
    Check("noise", 10, "doctor", "images that fall to 100 draws each of uniform, normal and "
          "corner noise and not to the attack", "%", 0.01, "warn",
          "random noise breaks {} of the images that the attack does not: its gradients do not "
          "help it", ADAPT),
    Check("iter>=single", 11, "records", "robust accuracy under PGD above that under FGSM, "
          "beyond 4 images", "points", 0.005, "warn",
          "one step breaks more than many (by {} and 4 images): the loss is shattered, or the many "
          "steps are badly set",
          "Attack with more and smaller steps and with restarts, or with autoattack"),
    Check("monotone-eps", 12, "records", "robust accuracy under PGD gained by a larger eps, "
          "beyond 4 images", "points", 0.01, "warn",
          "a larger eps leaves more images standing (by {} and 4 images): the attack fails where "
          "it has more room", "Attack with more steps and restarts, or with autoattack"),
    Check("eps->100%", 13, "doctor", "robust accuracy where every image is allowed to be grey, in "
          "parts of chance", "", 0.5, "fail",
          "{} of the accuracy of chance is left where no network can be robust: the attack does "
          "not work on this one", ADAPT),
    Check("steps-converged", 14, "doctor", "images that fall to twice the steps and five restarts "
          "only", "%", 0.02, "warn",
          "twice the steps and five restarts break {} more: the attack has not converged",
          "Attack longer; take the number of the longest attack"),
    Check("loss-plateau", 15, "doctor", "images whose margin still grows by more than 5 % of its "
          "range in the last 10 of 50 steps", "%", 0.25, "warn",
          "the loss of {} of the images is still growing when PGD ends", "Attack longer"),
    Check("unstable", 16, "cheap", "mean change of the margin within 1/255, relative to its mean "
          "size", "%", 0.05, "warn",
          "noise below one level of 8 bits changes the margin by {} on average: the loss is too "
          "rough for gradients to show the way",
          "Attack an average over noise (BPDA, EOT), and look at the gap to autoattack",
          unless=("random", "batch-invariant")),
    Check("silent-success", 17, "doctor", "images of which the attack saw an example and did not "
          "return it", "%", 0, "fail",
          "the attack met adversarial examples of {} of the images and did not return them",
          "Count any misclassified iterate, as robench's own attacks do"),
    Check("outside", 18, "run", "claimed examples outside ball or box in float32", "", 0, "fail",
          "{} claimed examples were outside the threat model and were not counted",
          "Let the attack project onto ball and box"),
    Check("eight-bit", 0, "doctor", "examples that no longer fool, or leave the ball, once rounded "
          "to 8 bits", "%", 0, "report",
          "{} of the examples do not survive rounding to 8 bits", "Nothing: it is for "
          "information"),
    Check("seed-spread", 19, "records", "difference of robust accuracy between seeds of the "
          "attack, beyond 4 images", "points", 0.01, "warn",
          "seeds of the attack differ by {} and 4 images: it depends on luck",
          "Attack with restarts, and report all seeds"),
    Check("active-test", 20, "doctor", "planted adversarial examples that the attack does not "
          "find (lower end of the 95 % interval)", "%", 0.05, "fail",
          "the attack misses at least {} of the adversarial examples that were planted for it: it "
          "would miss others, too", ADAPT),
    Check("overfit-gap", 21, "doctor", "robust accuracy (PGD) on training images above that on "
          "test images", "points", 0, "report",
          "{} of robust accuracy are lost from training to test images", "Stop earlier"),
    Check("catastrophic-overfitting", 22, "records", "share of the right images that stand FGSM "
          "where fewer than 5 % stand PGD", "%", 0.5, "warn",
          "{} of the images withstand one step and next to none withstands several: training "
          "overfitted to its attack", "Train with more steps, or stop before the collapse"),
    Check("adaptive-hook", 23, "records", "flags that call for an attack made for the defense, "
          "without one (1: so)", "", 0, "warn",
          "the flags beside this one call for an attack made for this defense, and there is none",
          "Register one with `adaptive` among its options; the worst case counts it"),
    Check("uncertainty", 24, "run", "half of the 95 % interval of robust accuracy", "points", 0,
          "report", "the sampling error is {}", "Attack more images"),
    Check("eps-unit", 0, "run", "eps beyond what is usual: above 1 if it reaches uniform grey, or "
          "is below half a level of 8 bits (Linf), 0.1 (L2) or 1 (L1)", "", 1, "warn",
          "eps is {} times beyond what is usual for these images and this norm: is it in another "
          "unit?", "Write eps for pixels in [0, 1], such as Linf:8/255 or L2:0.5"),
    Check("transfer-only", 0, "records", "accuracy of a peer or teacher on the student's examples "
          "above that on its own", "points", 0.2, "fail",
          "this network withstands the student's examples by {} more than its own: robustness to "
          "transferred examples is no robustness", "Read its Rob_f(x_f*) alone"),
)
CHECKS = {check.id: check for check in _CHECKS}


def beyond_luck(images: int, n: int) -> float:
    """The share of n images by which two runs of an attack differ, without LUCK of them."""
    return max(images - LUCK, 0) / n
