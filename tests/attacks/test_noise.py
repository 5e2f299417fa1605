"""The random numbers of an image: Philox itself, and what they do not depend on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from robench.attacks.noise import StreamNoise, image_ids, philox, stream_keys, words


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # known answers of philox4x32-10, published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2,
         (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_its_known_answers(counter, key, wanted):
    found = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(word) for word in found) == wanted


def keys(n=64, seed=0, *names):
    return stream_keys(image_ids(images(n)), seed, *(names or ("pgd", 0)))


def images(n):
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(n))


@given(st.permutations(range(8)), st.integers(0, 2**40))
def test_the_numbers_of_an_image_do_not_depend_on_its_place(order, draw):
    one, other = keys(8), keys(8)[order]
    assert torch.equal(words(one, draw, 7)[order], words(other, draw, 7))
    assert torch.equal(words(one[:1], draw, 7), words(one, draw, 7)[:1])


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(words(keys(), 3, 100)[:, :10], words(keys(), 3, 10))


def test_seed_name_restart_draw_and_image_all_change_the_numbers():
    base = words(keys(4), 0, 4)
    others = [words(keys(4, 1), 0, 4), words(keys(4, 0, "apgd", 0), 0, 4),
              words(keys(4, 0, "pgd", 1), 0, 4), words(keys(4), 1, 4), base.roll(1, 0)]
    assert all(not (base == other).any() for other in others)


def test_ids_are_of_the_pixels_whatever_their_type():
    x = images(8)
    assert torch.equal(image_ids(x), image_ids(x.double()))
    assert len(set(image_ids(x).tolist())) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_have_their_distributions(dtype):
    noise = StreamNoise(keys(), 5)
    uniform, normal = noise.uniform(3, 50, dtype=dtype), noise.normal(151, dtype=dtype)
    assert uniform.shape == (64, 3, 50) and normal.shape == (64, 151)
    assert uniform.dtype == normal.dtype == dtype
    assert uniform.min() >= 0 and uniform.max() < 1
    assert kstest(uniform.flatten().numpy(), "uniform").pvalue > 0.001
    assert kstest(normal.flatten().numpy(), "norm").pvalue > 0.001
