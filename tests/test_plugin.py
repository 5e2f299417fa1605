"""Attacks and defenses of other packages, found through entry points in a fresh process."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

USE_THE_SAMPLE = """
from robench.attacks import ATTACKS, ThreatModel
from robench.defenses import DEFENSES
from robench.testing import check_attack, check_defense

assert "sample-noise" in ATTACKS.names() and "pgd" in ATTACKS.names(), ATTACKS.names()
assert "sample-smooth" in DEFENSES.names() and "trades" in DEFENSES.names(), DEFENSES.names()
check_attack("sample-noise", threat=ThreatModel("Linf", 0.5))
check_defense("sample-smooth", smoothing=0.2)
print("conforms")
"""


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run code with folders on sys.path, as if the packages in them were installed."""
    path = os.pathsep.join(map(str, [TESTS.parent / "src", *folders]))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_plugin_is_found_and_conforms():
    done = run(USE_THE_SAMPLE, TESTS / "plugin")
    assert (done.stdout, done.stderr, done.returncode) == ("conforms\n", "", 0)


def test_a_broken_plugin_is_skipped_with_a_warning(tmp_path):
    (tmp_path / "robench_broken.py").write_text("raise RuntimeError('not on my watch')\n")
    info = tmp_path / "robench_broken-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: robench-broken\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[robench.attacks]\nbroken = robench_broken\n")
    done = run(USE_THE_SAMPLE, tmp_path, TESTS / "plugin")
    assert (done.stdout, done.returncode) == ("conforms\n", 0)
    assert "plugin broken of robench.attacks is broken and was skipped" in done.stderr
    assert "RuntimeError: not on my watch" in done.stderr
