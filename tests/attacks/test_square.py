"""Square Attack: its start, its proposals, its search, and the reference with the same draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from robench.attacks import ThreatModel, make_attack, verify
from robench.attacks.noise import quick_uniform
from robench.attacks.pool import Images, Units, new_units
from robench.attacks.square import Square, pattern
from robench.errors import UsageError
from robench.testing import check_attack

NORMS = ("Linf", "L2", "L1")


def units_of(attack, x, y=None, ids=None, seed=0):
    n = len(x)
    y = torch.zeros(n, dtype=torch.int64) if y is None else y
    ids = torch.arange(n) if ids is None else ids
    images = Images(x, y, torch.ones(n, 9, dtype=torch.int64), ids)
    return new_units(attack, images, [(i, 0) for i in range(n)], seed)


class Net:
    """A function as the steppers see it; keeps the images that it was asked about. A batch of 0
    leaves no room to look ahead."""

    def __init__(self, function, batch=0):
        self.function, self.batch, self.seen = function, batch, []

    def logits(self, x):
        self.seen.append(x.clone())
        return self.function(x)

    def near(self, change, proposals):
        everything = slice(None)
        x, known = proposals.images(everything), proposals.known(everything)
        for row, (r, c, s) in enumerate(zip(change.top, change.left, change.size, strict=True)):
            some, size = torch.tensor([row]), int(s)
            assert (proposals.images(some)[0] == x[row]).all()
            assert (proposals.known(some)[0] == known[row]).all()
            assert (proposals.squares(some, size)[0] == x[row, :, r : r + s, c : c + s]).all()
            changed = (x[row] != known[row]).any(0)
            changed[r : r + s, c : c + s] = False
            assert not changed.any()
        return self.logits(x)


def conv_net(c, classes=5, dtype=torch.float64):
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(c, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, classes),
    ).to(dtype).requires_grad_(False)


def advance(attack, net, units, steps):
    """`steps` steps as the pool takes them; yields what each looked at."""
    for _ in range(steps):
        step = attack.step(net, units)
        units.step += 1
        yield step


def worse(x):
    """Every image is further from class 1 than any other: nothing is ever accepted but once."""
    return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], 1).to(x)


# The draws


def test_uniform_is_splitmix64():
    """Against the words that the authors' C program prints for seed 1234567."""
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423,
             4593380528125082431, 16408922859458223821, 0]
    got = quick_uniform(torch.tensor([1234567]), torch.tensor([0]), 5)[0]
    assert (got * 2**53).long().tolist() == [word >> 11 for word in words[:5]]
    later = quick_uniform(torch.tensor([1234567]), torch.tensor([1]), 2)[0]
    assert torch.equal(later, got[2:4])


@pytest.mark.parametrize("norm", NORMS)
def test_places_are_uniform_up_to_the_last_row_and_column(norm):
    """Gray images: what a proposal changes shows where its square lies."""
    n, h, w, query = 4000, 6, 5, 3000
    attack = Square(ThreatModel(norm, 0.1), p_init=0.3)
    side = attack.size(query, h, w)
    assert side == (1 if norm == "Linf" else 3)
    units = units_of(attack, torch.full((n, 1, h, w), 0.5, dtype=torch.float64))
    units.state["x_adv"] = units.x.clone()
    units.step += query + 1
    proposal = attack.step(Net(worse), units).candidate
    changed = ((proposal - units.x).abs() > 1e-9)[:, 0]
    assert (changed.sum((1, 2)) == side * side).all()
    place = changed.flatten(1).int().argmax(1)  # the upper left corner
    places = [r * w + c for r in range(h - side + 1) for c in range(w - side + 1)]
    counts = torch.bincount(place, minlength=h * w)[places]
    assert counts.sum() == n
    assert stats.chisquare(counts).pvalue > 1e-3


# The start and the proposals


def test_linf_starts_with_stripes():
    x = 0.2 + 0.6 * torch.rand(50, 3, 9, 8)
    attack = Square(ThreatModel("Linf", 0.1))
    delta = attack.begin(units_of(attack, x))["x_adv"] - x
    torch.testing.assert_close(delta.abs(), torch.full_like(x, 0.1))
    signs = delta.sign()
    assert (signs == signs[:, :, :1]).all()
    ups = int((signs[:, :, 0] > 0).sum())
    assert stats.binomtest(ups, 50 * 3 * 8).pvalue > 1e-3


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_l2_and_l1_start_with_a_grid_of_patterns(norm):
    x = torch.full((20, 2, 10, 11), 0.5, dtype=torch.float64)
    eps = 1e-3 if norm == "L2" else 200.0  # in L1 large enough for nothing to be cut off
    attack = Square(ThreatModel(norm, eps, low=-9.0, high=9.0))
    delta = attack.begin(units_of(attack, x))["x_adv"] - x
    assert (delta[..., 10] == 0).all()
    tiles = delta[..., :10].unfold(2, 2, 2).unfold(3, 2, 2).flatten(2, 3)  # 5 x 5 of 2 x 2
    eta = pattern(2, norm)
    likeness = (tiles * eta).sum((-1, -2)), (tiles * eta.mT).sum((-1, -2))
    length = tiles.square().sum((-1, -2)).sqrt() * eta.norm()
    along = likeness[0].abs() > likeness[1].abs()
    torch.testing.assert_close(torch.where(along, *likeness).abs(), length)
    assert (along == along[:, :1]).all()  # channels are turned together, but signs are their own
    assert 0.4 < along.double().mean() < 0.6
    assert 0.4 < (likeness[0] > 0).double()[along].mean() < 0.6
    if norm == "L2":
        torch.testing.assert_close(
            attack.threat.distance(x + delta, x), torch.full((20,), eps, dtype=torch.float64))


def test_linf_proposals_are_squares_at_the_edge_of_the_ball():
    x = torch.rand(40, 3, 8, 12, dtype=torch.float64)
    attack = Square(ThreatModel("Linf", 0.1))
    units = units_of(attack, x)
    edges = (x - 0.1).clamp(0, 1), (x + 0.1).clamp(0, 1)
    for query, step in enumerate(advance(attack, Net(worse), units, 60), start=-1):
        if query < 0:
            continue
        best, proposal = units.state["x_adv"], step.candidate
        changed = (proposal != best).any(1)
        side = attack.size(query, 8, 12)
        # A square whose signs are those of the stripes below changes less than all of it.
        assert (changed.any(2).sum(1) <= side).all() and (changed.any(1).sum(1) <= side).all()
        new = proposal != best
        assert torch.where(new, (proposal == edges[0]) | (proposal == edges[1]), True).all()
        up = (new & (proposal > x)).flatten(2).any(2)
        down = (new & (proposal < x)).flatten(2).any(2)
        assert not (up & down).any()  # one sign per channel


@pytest.mark.parametrize(("query", "p"), [
    (0, 0.8), (10, 0.8), (11, 0.4), (50, 0.4), (51, 0.2), (200, 0.2), (201, 0.1), (500, 0.1),
    (501, 0.05), (1000, 0.05), (1001, 0.025), (2000, 0.025), (2001, 0.0125), (4000, 0.0125),
    (4001, 0.00625), (4999, 0.00625), (6001, 0.003125), (8001, 0.0015625),
])
def test_sizes_follow_the_schedule(query, p):
    """The paper's section 3.2, in AutoAttack with p halved at these queries for any budget."""
    for h, w in ((32, 32), (224, 224), (8, 12)):
        side = math.sqrt(p * h * w)
        linf = Square(ThreatModel("Linf", 0.1), queries=100).size(query, h, w)
        assert linf == min(max(round(side), 1), h, w)
        l2 = Square(ThreatModel("L2", 0.1)).size(query, h, w)
        assert l2 == min(h, w) or (l2 % 2 == 1 and l2 >= 3 and 0 <= l2 - round(side) <= 3)


@pytest.mark.parametrize("norm", ["L2", "L1"])
@pytest.mark.parametrize("side", [1, 2, 3, 6, 7, 29])
def test_pattern(norm, side):
    eta = pattern(side, norm)
    assert eta.shape == (side, side)
    assert float(torch.linalg.vector_norm(eta, 2 if norm == "L2" else 1)) == pytest.approx(1)
    assert (eta[: side // 2] > 0).all() and (eta[side // 2 :] < 0).all()
    half = eta[side // 2 :].abs()
    assert half.max() == half[len(half) // 2, side // 2]
    if side == 3:  # written out: rectangles 1 x 1 and 3 x 3 in two rows, their weights 1 and 1/4
        order = 2 if norm == "L2" else 4
        peak, rest = 1 + 2.0**-order, 2.0**-order
        lower = torch.tensor([[rest, rest, rest], [rest, peak, rest]], dtype=torch.float64)
        torch.testing.assert_close(half / half.max(), lower / peak)


# The search


@settings(max_examples=25)
@given(
    norm=st.sampled_from(NORMS), shape=st.sampled_from([(1, 8, 8), (3, 7, 5), (2, 1, 1)]),
    log_eps=st.floats(-3, 0), dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_candidates_are_allowed_and_the_margin_never_falls(norm, shape, log_eps, dtype, seed):
    torch.manual_seed(seed)
    x = torch.rand(4, *shape, dtype=dtype)
    x[0] = x[0].round()  # an image in the corner of the box
    threat = ThreatModel(norm, 10**log_eps * {"Linf": 1, "L2": 3, "L1": 30}[norm])
    attack = Square(threat, queries=600)
    weights = torch.randn(x[0].numel(), 4, dtype=dtype)
    net, y = Net(lambda z: z.flatten(1) @ weights), torch.randint(4, (4,))
    units = units_of(attack, x, y, seed=seed)
    units.step += torch.tensor([0, 0, 30, 590])
    margin = units.state["margin"]
    for step in advance(attack, net, units, 10):
        assert step.candidate.dtype == dtype
        assert not verify(net.function, x, step.candidate, y, threat).outside.any()
        now = units.state["margin"]
        assert torch.equal(now, torch.maximum(margin, step.margin))
        taken = (step.margin > margin)[:, None, None, None]
        assert (taken <= (units.state["x_adv"] == step.candidate)).all()
        margin = now
    assert len(net.seen) == 10  # one pass per step
    best = net.function(units.state["x_adv"])
    others = best.scatter(1, y[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(others - best.gather(1, y[:, None])[:, 0], margin)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_without_a_number_changes_nothing(norm):
    """NaN logits are not accepted, not even those of the start, and the search goes on."""
    x = torch.rand(2, 1, 8, 8)
    attack = Square(ThreatModel(norm, 0.3))
    units = units_of(attack, x)
    start = units.state["x_adv"]
    attack.step(Net(lambda z: worse(z) * torch.nan), units)
    assert torch.equal(units.state["x_adv"], start)
    units.step += 1
    step = attack.step(Net(worse), units)
    assert torch.equal(units.state["x_adv"], step.candidate)


def test_the_first_step_looks_at_the_start():
    for norm, eps in (("Linf", 0.1), ("L2", 0.5), ("L1", 5.0)):
        x = torch.rand(3, 3, 8, 8)
        attack = Square(ThreatModel(norm, eps))
        units = units_of(attack, x)
        start = units.state["x_adv"]
        torch.testing.assert_close(
            attack.step(Net(worse), units).candidate, start, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_unit_does_not_depend_on_its_neighbors(norm):
    """Alone, and among units at other steps that come and go."""
    torch.manual_seed(0)
    x = torch.rand(5, 3, 8, 8, dtype=torch.float64)
    net = Net(conv_net(3))
    attack = Square(ThreatModel(norm, {"Linf": 0.05, "L2": 0.5, "L1": 5.0}[norm]), queries=300)

    def fresh(rows):
        return units_of(attack, x[rows], ids=torch.arange(5)[rows])

    alone = fresh([2])
    expected = [step.candidate for step in advance(attack, net, alone, 40)]
    flying = fresh([0, 1])
    list(advance(attack, net, flying, 100))
    flying = Units.join([flying, fresh([2, 3])])
    got = [step.candidate[2:3] for step in advance(attack, net, flying, 20)]
    flying = Units.join([fresh([4]), flying.take(torch.tensor([3, 2]))])
    got += [step.candidate[2:3] for step in advance(attack, net, flying, 20)]
    torch.testing.assert_close(torch.cat(got), torch.cat(expected))
    torch.testing.assert_close(flying.state["x_adv"][2:], alone.state["x_adv"])
    assert not torch.allclose(flying.state["x_adv"][2], flying.state["x_adv"][1])


def test_copies_of_an_image_with_other_labels_do_not_share_what_is_known():
    names = []

    class Names:
        batch = 1

        def near(self, change, proposals):
            names.append(change.key)
            return torch.zeros(2, 3)

    x = torch.rand(1, 1, 8, 8).repeat(2, 1, 1, 1)
    images = Images(x, torch.tensor([0, 1]), torch.ones(2, 2, dtype=torch.int64), torch.zeros(
        2, dtype=torch.int64))
    attack = Square(ThreatModel("Linf", 0.1), queries=3)
    units = new_units(attack, images, [(0, 0), (1, 0)], 0)
    attack.step(Names(), units)
    assert names[0][0] != names[0][1]


@pytest.mark.parametrize("norm", NORMS)
def test_looking_ahead_takes_the_path_of_one_by_one(norm):
    """The same images are accepted after the same queries, in fewer passes."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    function = conv_net(3)
    y = function(x).argmax(1)
    attack = Square(ThreatModel(norm, {"Linf": 0.05, "L2": 0.5, "L1": 5.0}[norm]), queries=400)
    paths, passes, looks = [], [], []
    for batch in (0, 7, 64):
        net, units = Net(function, batch), units_of(attack, x, y)
        path = {}
        while (units.step < attack.steps).any():
            units = units.take(units.step < attack.steps)
            step = attack.step(net, units)
            units.step += step.steps
            for row, image in enumerate(units.image.tolist()):
                taken = int(units.state["taken"][row])
                path[image, taken] = units.state["x_adv"][row], float(units.state["margin"][row])
                # A candidate that was not accepted is one of those that were looked at.
                assert (net.seen[-1] == step.candidate[row]).flatten(1).all(1).any()
        assert (units.step == attack.steps).all()
        paths.append(path)
        passes.append(len(net.seen))
        looks.append(sum(map(len, net.seen)))
    for path in paths[1:]:
        assert path.keys() == paths[0].keys() and len(path) > 20
        for key, (x_adv, margin) in path.items():
            torch.testing.assert_close(x_adv, paths[0][key][0])
            assert margin == pytest.approx(paths[0][key][1], abs=1e-9)
    assert passes[0] == attack.steps and passes[0] > 1.2 * passes[1] > 1.2 * passes[2]
    assert looks[0] == 3 * attack.steps <= looks[1] < 1.1 * looks[0]


def test_looking_ahead_uses_few_sizes_of_batches():
    """Kernels, and the memory they keep, are made for each size."""
    torch.manual_seed(0)
    x = torch.rand(11, 3, 8, 8)
    function = conv_net(3)
    attack = Square(ThreatModel("Linf", 0.05), queries=300)
    net, units = Net(function.float(), 40), units_of(attack, x, function(x).argmax(1))
    while (units.step < attack.steps).any():
        units = units.take(units.step < attack.steps)
        units.step += attack.step(net, units).steps
    sizes = [len(images) for images in net.seen]
    assert max(sizes) > 40
    odd = [size for size in sizes if size > 16 and size % 16]
    assert len(odd) < 0.1 * len(sizes)


def test_looking_ahead_does_not_hold_back_the_slowest():
    """Those that wait for it leave it its room, whatever sizes a batch may have."""
    attack = Square(ThreatModel("Linf", 0.1))
    units = units_of(attack, torch.rand(26, 1, 8, 8))
    list(advance(attack, Net(worse), units, 1))
    for ahead in (50, 63, 64, 200):
        units.step = torch.full_like(units.step, 400 + ahead)
        units.step[25] = 400  # the last of the batch, which sizes of batches cut
        net = Net(worse, 64)
        step = attack.step(net, units)
        assert step.steps[25] == 4 and len(net.seen[0]) % 16 == 0


def test_looking_ahead_ends_at_an_answer_that_is_no_number():
    x = torch.rand(2, 1, 8, 8)
    attack = Square(ThreatModel("Linf", 0.3))
    units = units_of(attack, x)
    list(advance(attack, Net(worse), units, 100))
    start = units.state["x_adv"].clone()

    def silent(z):  # about the third proposal of the second image
        logits = worse(z)
        logits[len(z) // 2 + 2] = torch.nan
        return logits

    step = attack.step(Net(silent, 8), units)
    assert step.steps.tolist() == [8, 3] and step.margin.isnan().tolist() == [False, True]
    assert torch.equal(units.state["x_adv"], start)


DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}


@pytest.mark.parametrize("norm", NORMS)
def test_budget_decides_on_a_linear_model(norm):
    """A little more than the margin flips every label, a little less flips none.

    In L2 the proposals are smooth bumps of at least 3 x 3 pixels: no sum of them is near the
    best perturbation of a model whose weights change their sign from pixel to pixel.
    """
    torch.manual_seed(0)
    shape, gap = (1, 6, 6), 0.1
    w = torch.randn(36, dtype=torch.float64).sign() * (0.9 + 0.1 * torch.rand(36))
    if norm == "L2":
        w, gap = nn.functional.pad(pattern(3, "L2").double(), (1, 2, 2, 1)).flatten(), 0.02
    x = 0.5 + 0.02 * torch.randn(6, 36, dtype=torch.float64)
    y = torch.arange(6) % 2
    side = torch.where(y == 0, gap, -gap)
    x = (x + ((side - (x - 0.5) @ w) / (w @ w))[:, None] * w).view(-1, *shape)
    margin = gap / float(torch.linalg.vector_norm(w, DUAL[norm]))  # by Hoelder

    def model(z):
        half = (z.flatten(1) - 0.5) @ w / 2
        return torch.stack([half, -half, torch.full_like(half, -30.0)], 1)

    assert (model(x).argmax(1) == y).all()
    for factor, fooled in ((1.3, 6), (0.95, 0)):
        threat = ThreatModel(norm, margin * factor)
        x_adv = Square(threat, queries=5000 if fooled else 500)(model, x, y)
        assert ((x_adv > 0) & (x_adv < 1)).all()  # the box was never in the way
        verdict = verify(model, x, x_adv, y, threat)
        assert int(verdict.fooled.sum()) == fooled and not verdict.outside.any()


# The reference


def reference(attack):
    square = pytest.importorskip("pyautoattack.square")
    threat = attack.threat
    return square.SquareAttack(
        None, norm=threat.norm, n_queries=attack.queries, eps=threat.eps, p_init=attack.p_init,
        resc_schedule=False, device="cpu",
    )


@pytest.fixture
def double():
    """The reference makes its tensors in torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_the_path_of_the_reference(norm):
    """pyautoattack, fed with the random numbers of one unit, looks at the same images."""
    c, h, w, queries = 3, 10, 10, 300
    attack = Square(ThreatModel(norm, {"Linf": 0.005, "L2": 0.05, "L1": 0.3}[norm]), queries)
    torch.manual_seed(0)
    x, net = torch.rand(1, c, h, w), Net(conv_net(c, dtype=torch.float32))
    y = net.function(x).argmax(1)
    units = units_of(attack, x, y)
    ours = torch.cat([step.candidate for step in advance(attack, net, units, queries + 1)])

    theirs = reference(attack)
    places, signs, turns = [], [], []
    if norm == "Linf":
        signs.append(units.noise(0).uniform(c, 1, w) < 0.5)
    else:
        start = units.noise(0).uniform(1 + c, 25) < 0.5
        turns += (~start[0, 0]).tolist()
        signs += start[:, 1:, :, None, None].unbind(2)
    for query in range(queries):
        known = 2 if norm == "Linf" else 5
        draw = quick_uniform(units.state["seed"], torch.tensor([query + 1]), known + c)[0]
        free = h - attack.size(query, h, w) + 1
        rows_first = [0, 1] if norm == "Linf" else [0, 2, 1, 3]
        places += [(draw[i] * free).long() for i in rows_first]
        turns.append(bool(draw[4] < 0.5))
        signs.append(draw[known:, None, None] < 0.5)
    theirs.predict = net.logits
    theirs.random_int = lambda *_: places.pop(0)
    theirs.random_choice = lambda _: 1 - 2 * signs.pop(0).float()
    def turned(side):
        eta = pattern(side, norm).float()
        return eta.mT if turns.pop(0) else eta

    theirs.eta = turned
    net.seen.clear()
    theirs.init_hyperparam(x)
    theirs.attack_single_run(x, y)
    assert len(net.seen) == queries + 1 and not places and not signs
    same = (torch.cat(net.seen) - ours).abs().amax((1, 2, 3)) < 1e-4
    # Both divide by the norms of windows where nothing but rounding may be left. A proposal may
    # differ then; had the paths parted, all later ones would.
    assert same.double().mean() > (0.99 if norm == "Linf" else 0.8)
    assert same[-5:].any()


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_the_patterns_of_the_reference(norm, double):
    theirs = reference(Square(ThreatModel(norm, 1.0)))
    for side in (1, 2, 3, 4, 7, 12, 29):
        eta = theirs.eta(side)
        turned = not bool((eta[0] > 0).all()) and side > 1
        torch.testing.assert_close(eta.mT if turned else eta, pattern(side, norm))


def test_the_success_of_the_reference():
    """A network that falls to about half of the runs within 200 queries."""
    n, queries = 80, 200
    torch.manual_seed(0)
    x, net = torch.rand(n, 3, 16, 16), conv_net(3, dtype=torch.float32)
    y = net(x).argmax(1)
    attack = Square(ThreatModel("Linf", 0.04), queries)
    theirs = reference(attack)
    theirs.predict = net
    fooled = [0, 0]
    for seed in range(2):
        torch.manual_seed(seed)
        theirs.seed = seed
        for i, x_adv in enumerate((attack(net, x, y), theirs.perturb(x, y))):
            fooled[i] += int((net(x_adv).argmax(1) != y).sum())
    assert 0.2 < fooled[1] / (2 * n) < 0.8
    # The images are the same: the difference is at most that of independent samples.
    table = [[k, 2 * n - k] for k in fooled]
    assert stats.fisher_exact(table).pvalue > 1e-3


# The contract


@pytest.mark.parametrize("threat", [
    ThreatModel("Linf", 0.2), ThreatModel("L2", 2.0), ThreatModel("L1", 15.0)], ids=str)
def test_conformance(threat):
    check_attack("square", threat=threat, queries=200)


def test_restarts_are_units_of_their_own():
    attack = Square(ThreatModel("Linf", 0.1), queries=2, restarts=3)
    assert attack.units(10) == 3 and attack.steps == 3
    x, y = torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    images = Images(x, y, torch.ones(1, 9, dtype=torch.int64), torch.arange(1))
    units = new_units(attack, images, [(0, 0), (0, 1), (0, 2)], 0)
    assert len(units.state["x_adv"].unique(dim=0)) == 3
    assert len(units.state["seed"].unique()) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"queries": -1}, "queries must be >= 0"),
    ({"restarts": 0}, "restarts must be >= 1"),
    ({"p_init": 0.0}, "p_init must be"),
    ({"p_init": float("nan")}, "p_init must be"),
])
def test_errors(options, message):
    with pytest.raises(UsageError, match=message):
        make_attack("square", ThreatModel("Linf", 0.1), **options)
