"""Files from others, damaged in every way: one line, no traceback, and no code that they name."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robench.attacks.threat import ThreatModel
from robench.benchmark.checkpoints import CellFolder, load_checkpoint, read_weights
from robench.benchmark.data import load_dataset
from robench.benchmark.sources import load_network
from robench.benchmark.spec import parse_value, read_config
from robench.errors import RobenchError, UsageError
from robench.files import pack_arrays
from robench.reports import load, render
from robench.reports.compare import survival

from .hostile import COMMITTED, make_cases, survives

# What JSON and YAML can put in the place of a value.
VALUES = ["null", "true", "-1", "0", "1", "1e308", "-1e308", "1e-320", "1e999", "NaN", "Infinity",
          "-Infinity", ".nan", ".inf", "1" + "0" * 30, "1" + "0" * 5000, '""', '"NaN"', '"x"',
          r'"\ud800"', r'"\u0000"', r'"\u001b[2J"', '"../../../../etc/passwd"', '"/etc/passwd"',
          '"os:abort"', '"' + "x" * 3000 + '"', "[]", "{}", '{"a": []}', "[" * 3000,
          "[" * 200 + "]" * 200, '{"a":' * 500 + "1" + "}" * 500, "2001-99-99", "!!binary aGk=",
          "!!python/object/apply:os.abort []", "*a", "&a [*a, *a]", "'<script>'",
          "9223372036854775807"]

def damage(valid: bytes, rng) -> bytes:
    """A few mutations of a file that was well."""
    blob = bytearray(valid)
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randint(0, len(blob)) for _ in range(2))
        kind = rng.randint(0, 6)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                if blob:
                    blob[rng.randrange(len(blob))] = rng.randrange(256)
        elif kind == 1:
            del blob[a:]
        elif kind == 2:
            del blob[a : min(b, a + 60)]
        elif kind == 3:
            blob[a:a] = blob[a : min(b, a + 200)]
        elif kind == 4:
            blob[a:a] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 12)))
        else:  # another value after one of the colons or commas
            places = [i for i, c in enumerate(blob) if c in b":,["]
            if places:
                at = rng.choice(places) + 1
                end = at
                while end < len(blob) and blob[end] not in b",}]\n":
                    end += 1
                blob[at:end] = b" " + rng.choice(VALUES).encode()
    return bytes(blob)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return make_cases(tmp_path_factory.mktemp("hostile"))


NAMES = ["results.jsonl", "transfer.jsonl", "training.jsonl", "crossing.jsonl", "steps.jsonl",
         "gallery.jsonl", "landscape.jsonl", "corruptions.jsonl", "baseline.json", "config.yaml",
         "model.json", "flags.npz", "net.safetensors", "net.pt", "state.pt", "examples",
         "spec.json", "done.json", "kept.json", "speed.csv", "speed-train.csv", "part.npz",
         "batches.partial", "search.partial", "lines.partial", "counts.partial",
         "leaderboard.csv", "leaderboard.json", "README.md", "option", "labels.npy", "fog.npy",
         "wnids.txt", "words.txt", "val_annotations.txt", "t10k-images-idx3-ubyte",
         "t10k-labels-idx1-ubyte", "image.png", "zoo.pt", "page.html", "METADATA"]


def test_every_kind_of_file_is_tried(cases):
    assert set(NAMES) == set(cases)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_well_are_read(cases, name, tmp_path):
    valid, read = cases[name]
    (tmp_path / name).write_bytes(valid)
    read(tmp_path / name)


INPUTS = int(os.environ.get("ROBENCH_FUZZ", 8))  # for each kind of file


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_end_in_one_line(cases, name, tmp_path):
    @settings(max_examples=INPUTS, database=None, derandomize=INPUTS == 8,
              suppress_health_check=list(HealthCheck))
    @given(rng=st.randoms(use_true_random=INPUTS != 8))
    def fuzz(rng):
        valid, read = cases[name]
        survives(read, tmp_path / "in" / name, damage(valid, rng))

    fuzz()


# What must not happen, one by one


def test_yaml_that_unfolds_to_billions_of_values_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="holds more than 10000 values"):
        read_config(tmp_path / "c.yaml")
    assert yaml.safe_load("a: &a [1]\nb: *a") == {"a": [1], "b": [1]}
    assert parse_value("[&a 1, *a]", "x") == [1, 1]


@pytest.mark.parametrize("text", ["2001-99-99", "2001-01-01", "[" * 5000, "1" * 5000, "!!set {a}",
                                  "!!python/name:os.system", r'"\ud800"', r'"\0"'])
def test_yaml_that_is_no_setting_is_one_line(text):
    with pytest.raises(UsageError, match="cannot read the value"):
        parse_value(text, "--set x")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "state.pt"])
@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, name, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if legacy:
        path.write_bytes(pickle.dumps({"w": Evil()}))
    else:
        torch.save({"w": Evil()}, path)
    with pytest.raises(UsageError, match="does not unpickle code|is damaged"):
        if name == "state.pt":
            CellFolder(tmp_path, None, torch.device("cpu")).load_state()
        else:
            read_weights(path)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_cannot_name_code_to_run(tmp_path, monkeypatch, make_network, make_header):
    """The header says package.module:factory; only the caller's own word has it imported."""
    from robench.benchmark.checkpoints import save_checkpoint
    from robench.benchmark.recipe import ModelSpec

    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('owned')\n"
                                      "from robench.benchmark.models import smallcnn as net\n")
    path = tmp_path / "net.safetensors"
    save_checkpoint(path, make_network(), make_header(model=ModelSpec(name="evil:net")))
    digits, threat = load_dataset("digits"), ThreatModel("Linf", 0.1)
    for refused in (lambda: load_checkpoint(path), lambda: load_network(str(path), digits, threat)):
        with pytest.raises(UsageError, match="made with code, 'evil:net', .* with --model"):
            refused()
    assert not (tmp_path / "owned").exists()
    named = load_network(str(path), digits, threat, model="evil:net")
    assert named.header is not None and (tmp_path / "owned").exists()


@pytest.mark.parametrize("changes", [{"classes": 10**6}, {"size": 10**5}, {"channels": 10**30}])
def test_a_header_that_asks_for_much_memory_gets_none(tmp_path, make_network, make_header, changes):
    from robench.benchmark.checkpoints import save_checkpoint

    path = tmp_path / "net.safetensors"
    save_checkpoint(path, make_network(), make_header(**changes))
    with pytest.raises(UsageError, match="does not fit|could not be built"):
        load_checkpoint(path)


@pytest.fixture
def one(tmp_path):
    """(a run folder with a record, its flags, a function that changes the path of the flags)."""
    record = json.loads((COMMITTED / "results.jsonl").read_text().splitlines()[0])
    folder = tmp_path / "runs"
    folder.mkdir()
    flags = pack_arrays({"correct": np.ones(record["n"], bool),
                         "robust": np.arange(record["n"]) < record["n_robust"]})

    def lead_to(path):
        (folder / "results.jsonl").write_text(json.dumps({**record, "flags": str(path)}) + "\n")
        return load([folder]).records[0]

    return folder, flags, lead_to


def test_flags_lead_to_no_file_that_a_run_has_not_written(one, tmp_path):
    folder, flags, lead_to = one
    (tmp_path / "secret.npz").write_bytes(flags)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.npz").write_bytes(flags)
    for path in ("../secret.npz", tmp_path / "secret.npz", "a/../../secret.npz",
                 "../../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "x\x1b.npz"):
        with pytest.raises(UsageError, match="are not those of a run") as caught:
            lead_to(path)
        assert str(caught.value).isprintable()
    (tmp_path / "other" / "results.jsonl").touch()  # a run that was merged into this folder
    assert survival(lead_to("../other/x.npz")) is not None
    assert survival(lead_to("../gone/x.npz")) is None
    (folder / "x.npz").write_bytes(flags)
    assert survival(lead_to("x.npz")) is not None


def test_flags_that_unpack_to_gigabytes_are_refused(one):
    folder, _, lead_to = one
    path = folder / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("correct.npy", "w", force_zip64=True) as entry:
        np.lib.format.write_array_header_1_0(
            entry, {"descr": "|b1", "fortran_order": False, "shape": (10**8,)})
        for _ in range(100):
            entry.write(bytes(10**6))
    assert path.stat().st_size < 10**6
    with pytest.raises(RobenchError, match="cannot read the survival flags .*larger than"):
        survival(lead_to("x.npz"))


@pytest.mark.parametrize("shape", ["(10**15,)", "(1000000000000000,)", "(-1,)", "((" * 3000])
def test_flags_with_an_impossible_shape_are_refused(one, shape):
    folder, _, lead_to = one
    head = f"{{'descr': '|b1', 'fortran_order': False, 'shape': {shape}}}".ljust(8000).encode()
    array = b"\x93NUMPY\x02\x00" + len(head).to_bytes(4, "little") + head
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("correct.npy", array)
        archive.writestr("robust.npy", array)
    with pytest.raises(RobenchError, match="cannot read the survival flags"):
        survival(lead_to("x.npz"))


def test_flags_with_pickles_are_refused(one, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder, _, lead_to = one
    with open(folder / "x.npz", "wb") as file:
        np.savez(file, correct=np.array([Evil()], dtype=object), robust=np.ones(3, bool))
    with pytest.raises(RobenchError, match="cannot read the survival flags"):
        survival(lead_to("x.npz"))
    assert not (tmp_path / "owned").exists()


def test_names_in_records_stay_in_their_folder(one, tmp_path):
    """Data set, defense and attack become parts of file names."""
    folder, _, _ = one
    name = "../../../escaped/<b>\x1b[2J"
    record = json.loads((COMMITTED / "results.jsonl").read_text().splitlines()[0])
    records = [{**record, "dataset": dataset, "defense": name, "attack": name, "model": name,
                "checkpoint": name, "source": name, "n": 10_000, "n_correct": 9000,
                "n_robust": 5000, "flags": ""} for dataset in (name, "cifar10")]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "deep" / "er" / "out"
    paths = render(load([folder]), out, ["csv", "md", "html", "figures", "robustbench"])
    assert all(path.resolve().is_relative_to(out.resolve()) for path in paths)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "deep"}


def test_an_error_moves_no_cursor(robench, tmp_path):
    done = robench("report", tmp_path / "\x1b[2Jx")
    assert done.code == 2
    assert "\x1b" not in done.err and r"\x1b[2Jx" in done.err


def test_a_defense_whose_ranked_rows_are_of_one_config_is_drawn(tmp_path):
    """Found by mutation: among all rows it has two configs, and is named by them."""
    rows = [json.loads(line) for line in (COMMITTED / "results.jsonl").read_text().splitlines()]
    ranked = next(row for row in rows if row["ranked"] and row["role"] == "table")
    other = {**ranked, "ranked": False, "checkpoint": "last", "run": "other", "flags": "",
             "defense_config": {**ranked["defense_config"], "threat": "Linf:4/255"}}
    (tmp_path / "results.jsonl").write_text(
        json.dumps({**ranked, "flags": ""}) + "\n" + json.dumps(other) + "\n")
    assert render(load([tmp_path]), tmp_path, ["figures"])
