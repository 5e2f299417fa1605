"""robench speed scale: what it runs, and what it leaves behind. No test asserts a time."""

import csv

import pytest

from robench.benchmark import speed_scale


@pytest.fixture
def scale(robench, tmp_path, monkeypatch):
    monkeypatch.setitem(speed_scale.TRAINING, "epochs", 1)
    return lambda *arguments: robench(
        "speed", "scale", "--attack", "pgd-3", "--limit", 21, "--repeats", 1, "--device", "cpu",
        "--quiet", "--out", tmp_path / "out", *arguments)


def test_every_executor_and_every_number_of_shards_is_timed(scale, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_scale.importlib.util, "find_spec", lambda name: None)  # of Ray
    done = scale("--tasks", 2, "--shards", "2,4")
    assert done.code == 0, done.err
    assert "warning: Ray is not installed and not measured" in " ".join(done.err.split())
    lines = list(csv.DictReader((tmp_path / "out" / "speed-scale.csv").read_text().splitlines()))
    assert [(line["part"], line["contender"], line["number"]) for line in lines] == [
        *(("tasks", name, n) for name in ("this process", "local") for n in "12"),
        *(("shards", "pgd-3", n) for n in "124")]
    assert len({line["robust"] for line in lines[4:]}) == 1 and int(lines[4]["robust"]) > 0
    for one, *more in (lines[:2], lines[2:4], lines[4:]):
        assert one["each"] == ""
        for line in more:
            others = int(line["number"]) - 1
            assert float(line["each"]) * others == pytest.approx(
                float(line["seconds"]) - float(one["seconds"]))
    assert done.out == (tmp_path / "out" / "speed-scale.md").read_text()
    drawn = (tmp_path / "out" / "speed-scale.svg").read_text()
    assert all(text in drawn for text in ("number of tasks", "number of shards", "this process"))


def test_times_of_real_work_are_refused(scale, tmp_path, monkeypatch):
    """Were the tasks not done, the work would be taken for what an executor costs."""
    collect = speed_scale.Matrix.collect

    def lost(matrix, cells, rows):
        found = collect(matrix, cells, rows)
        tasks = matrix.tasks(cells, rows)
        monkeypatch.setattr(speed_scale.Matrix, "tasks", lambda self, *more: tasks)
        for path in (cells[0].folder / "eval").glob("*.json"):
            path.unlink()
        return found

    monkeypatch.setattr(speed_scale.Matrix, "collect", lost)
    done = scale("--tasks", 2)
    assert done.code == 1 and "an executor did work that was done" in done.err


@pytest.mark.parametrize("shards", ["0", "1,x", "-3"])
def test_wrong_numbers(scale, shards):
    done = scale("--shards", shards)
    assert done.code == 2 and "--shards" in done.err
