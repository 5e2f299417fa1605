"""The project's tests. The fixture `robench` comes with robench's pytest plugin."""

from net import held_out, trained


def test_seven_of_ten_digits_withstand_pgd(robench):
    images, labels = held_out(100)
    robench.assert_robust(trained(), images, labels, attack="pgd-20", threat="Linf:0.1",
                          min_accuracy=0.7)
