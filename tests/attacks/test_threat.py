"""ThreatModel: projection, ascent, sampling and text."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robench.attacks.noise import StreamNoise, stream_keys
from robench.attacks.threat import NORMS, ThreatModel
from robench.attacks.verify import ABSOLUTE, RELATIVE
from robench.errors import UsageError

SHAPES = [(1, 1, 1, 1), (1, 3, 4, 4), (5, 3, 4, 4), (2, 3, 32, 32)]
# eps for an image of d pixels runs from nothing to more than the whole box.
FRACTIONS = st.one_of(st.just(0.0), st.floats(1e-4, 1.5))


def make_threat(norm: str, fraction: float, d: int) -> ThreatModel:
    largest = {"Linf": 1 / 1.5, "L2": math.sqrt(d), "L1": float(d)}[norm]
    return ThreatModel(norm, fraction * largest)


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Clean images, some pixels of them at 0 or 1, and points all around the box."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=dtype) * 1.4 - 0.2
    scale = 10 ** (torch.rand(shape[0], 1, 1, 1, generator=generator, dtype=dtype) * 4 - 3)
    return x.clamp(0, 1), x + scale * torch.randn(shape, generator=generator, dtype=dtype)


def is_inside(threat: ThreatModel, z: torch.Tensor, x: torch.Tensor) -> bool:
    near = (threat.distance(z, x) <= threat.eps * (1 + RELATIVE) + ABSOLUTE).all()
    return bool(near and (z >= threat.low).all() and (z <= threat.high).all())


cases = given(
    norm=st.sampled_from(NORMS),
    fraction=FRACTIONS,
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@example(norm="L2", fraction=0.01629460526164346, shape=(5, 3, 4, 4), seed=1121167485)
@settings(deadline=None)
@cases
def test_project_is_inside_and_idempotent(dtype, norm, fraction, shape, seed):
    threat = make_threat(norm, fraction, math.prod(shape[1:]))
    x, z = images(shape, seed, dtype)
    once = threat.project(z, x)
    assert once.dtype == dtype and once.shape == x.shape
    assert is_inside(threat, once, x)
    torch.testing.assert_close(threat.project(once, x), once, rtol=0, atol=3e-7)


@settings(deadline=None)
@cases
def test_project_leaves_inside_points_alone(norm, fraction, shape, seed):
    threat = make_threat(norm, fraction, math.prod(shape[1:]))
    x, z = images(shape, seed, torch.float64)
    # Strictly inside: part of the way from x to an allowed point.
    inside = x + 0.99 * (threat.project(z, x) - x)
    torch.testing.assert_close(threat.project(inside, x), inside, rtol=0, atol=1e-12)


@settings(deadline=None)
@cases
def test_project_finds_the_nearest_point(norm, fraction, shape, seed):
    """p = P(z) is nearest in a convex set iff <z - p, u - p> <= 0 for every u in the set."""
    threat = make_threat(norm, fraction, math.prod(shape[1:]))
    x, z = images(shape, seed, torch.float64)
    p = threat.project(z, x)
    generator = torch.Generator().manual_seed(seed)
    corner = (torch.rand(shape, generator=generator, dtype=torch.float64) < 0.5).double()
    rivals = [
        x,
        threat.sample(x, of_rows(x, seed)),
        threat.project(corner, x),
        threat.project(p + 0.1 * torch.randn(shape, generator=generator, dtype=x.dtype), x),
        threat.project(p + 0.1 * (z - p), x),
    ]
    for u in rivals:
        angle = ((z - p) * (u - p)).flatten(1).sum(1)
        scale = 1 + (z - p).flatten(1).norm(dim=1) * (u - p).flatten(1).norm(dim=1)
        assert (angle <= 1e-9 * scale).all()


@pytest.mark.parametrize("norm", NORMS)
def test_project_in_a_case_by_hand(norm):
    x = torch.tensor([0.5, 0.9]).view(1, 1, 1, 2)
    z = torch.tensor([0.9, 1.9]).view(1, 1, 1, 2)
    # Room to the box: 0.5 and 0.1. The second pixel stops at 1; the first takes what is left.
    expected = {
        "Linf": [0.7, 1.0],
        "L2": [0.5 + math.sqrt(0.2**2 - 0.1**2), 1.0],
        "L1": [0.6, 1.0],
    }[norm]
    p = ThreatModel(norm, 0.2).project(z, x)
    torch.testing.assert_close(p.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("norm", NORMS)
def test_zero_eps_allows_the_image_itself_only(norm):
    x, z = images((4, 3, 5, 5), 0, torch.float32)
    threat = ThreatModel(norm, 0.0)
    assert torch.equal(threat.project(z, x), x)
    assert torch.equal(threat.sample(x), x)


def test_rounding_does_not_add_up_in_l1():
    """A thousand pixels move by the same amount, which float32 rounds the same way each time."""
    x, noise = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel("L1", 0.1)
    assert is_inside(threat, threat.project(x + 2e-4 * (noise - 0.5), x), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
@pytest.mark.parametrize("norm", NORMS)
def test_ascent_has_unit_norm_and_climbs(norm, scale):
    gradient = scale * torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    gradient[0] = 0
    direction = ThreatModel(norm, 1.0).ascent(gradient)
    length = ThreatModel(norm, 1.0).distance(direction, torch.zeros_like(direction))
    torch.testing.assert_close(length, torch.tensor([0.0] + [1.0] * 5, dtype=torch.float64))
    assert ((direction * gradient).flatten(1).sum(1)[1:] > 0).all()


def of_rows(x, seed):
    """A stream for each row, also where the images are equal."""
    return StreamNoise(stream_keys(torch.arange(len(x)), seed))


@settings(deadline=None, max_examples=30)
@cases
def test_sample_is_inside(norm, fraction, shape, seed):
    threat = make_threat(norm, fraction, math.prod(shape[1:]))
    x, _ = images(shape, seed, torch.float32)
    first, again = (threat.sample(x, of_rows(x, seed)) for _ in range(2))
    assert is_inside(threat, first, x)
    assert torch.equal(first, again)


@pytest.mark.parametrize("norm", NORMS)
def test_sample_fills_the_ball(norm):
    """Far from the box half of the volume lies beyond the radius eps * 0.5 ** (1 / d)."""
    x = torch.full((4000, 1, 1, 3), 0.5)
    threat = ThreatModel(norm, 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        samples = threat.sample(x), threat.sample(x, of_rows(x, 0))
    for sample in samples:
        beyond = (threat.distance(sample, x) > 0.1 * 0.5 ** (1 / 3)).double().mean()
        assert abs(beyond - 0.5) < 0.04  # five standard deviations


@pytest.mark.parametrize(
    ("text", "norm", "eps", "canonical"),
    [
        ("Linf:8/255", "Linf", 8 / 255, "Linf:8/255"),
        ("linf: 8 / 255", "Linf", 8 / 255, "Linf:8/255"),
        ("Linf:0.2", "Linf", 0.2, "Linf:0.2"),
        ("L2:128/255", "L2", 128 / 255, "L2:128/255"),
        ("l_2:0.5", "L2", 0.5, "L2:0.5"),
        ("L1:12", "L1", 12.0, "L1:12"),
        ("Linf:0", "Linf", 0.0, "Linf:0"),
    ],
)
def test_parse_and_str(text, norm, eps, canonical):
    threat = ThreatModel.parse(text)
    assert threat == ThreatModel(norm, eps)
    assert str(threat) == canonical


@given(eps=st.floats(0, 1e6), norm=st.sampled_from(["L2", "L1"]))
def test_str_is_exact(eps, norm):
    threat = ThreatModel(norm, eps)
    assert ThreatModel.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Linf:8", "write Linf:8/255"),
        ("L3:1", "write NORM:EPS"),
        ("", "write NORM:EPS"),
        ("Linf", "write NORM:EPS"),
        ("Linf:", "is not a number"),
        ("Linf:nan", "is not a number"),
        ("Linf:inf", "is not a number"),
        ("L2:1e999", "is not a finite number"),
        ("L2:1/0", "is not a number"),
        ("L2:-0.5", "must be a finite number >= 0"),
    ],
)
def test_parse_errors_say_what_to_write(text, message):
    with pytest.raises(UsageError, match=message):
        ThreatModel.parse(text)
