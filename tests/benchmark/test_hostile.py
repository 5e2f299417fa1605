"""Files from others, damaged in every way: one line, no traceback, and no code that they name."""

import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robench.attacks.state import read_state
from robench.attacks.threat import ThreatModel
from robench.benchmark.cells import Cell
from robench.benchmark.checkpoints import CellFolder, load_checkpoint, read_weights
from robench.benchmark.data import load_dataset
from robench.benchmark.examples import Examples
from robench.benchmark.kept import kept_record, kept_survey, kept_transfers
from robench.benchmark.sources import load_network
from robench.benchmark.spec import AttackSpec, RunSpec, check_attacks, parse_value, read_config
from robench.errors import RobenchError, UsageError
from robench.files import pack_arrays
from robench.reports import load, render
from robench.reports.compare import survival
from robench.reports.embed import embed
from robench.reports.jsonfile import from_json
from robench.reports.record import Landscape
from robench.reports.tables import from_csv

COMMITTED = Path(__file__).parents[2] / "results" / "cifar10-small-resnet"
CONFIG = """\
defense: [peeraid, trades]
baseline: pgd-at
dataset: digits
threat: Linf:8/255
seeds: [0, 1]
epochs: 3
attacks: [fgsm, {name: pgd, options: {steps: 5, step_size: 2/255}, limit: 10}]
train: {lr: 0.1, batch_size: 64, milestones: [0.5, 0.75]}
options: {trades: {beta: 6.0}}
jobs: 2
out: runs/x
"""
ROBUSTBENCH = {
    "link": "https://arxiv.org", "name": "A name", "authors": "A, B", "venue": "V 2020",
    "additional_data": False, "number_forward_passes": 1, "dataset": "cifar10",
    "architecture": "WideResNet-34-10", "eps": "8/255", "clean_acc": "85.34",
    "autoattack_acc": "53.42", "external": "52.9", "footnote": None, "unreliable": False,
}
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
def cases(tmp_path_factory, make_network, make_header):
    """name -> (a file that is well, a function that reads it as a command does)."""
    from robench.benchmark.checkpoints import save_checkpoint

    folder = tmp_path_factory.mktemp("hostile")
    digits, threat = load_dataset("digits"), ThreatModel("Linf", 0.1)
    lines = {name: (COMMITTED / name).read_bytes().splitlines(keepends=True)
             for name in ("results.jsonl", "transfer.jsonl", "training.jsonl")}
    few = {name: b"".join(rows[::len(rows) // 4 or 1][:5]) for name, rows in lines.items()}
    record = load([COMMITTED]).records[0]
    net, place = make_network(), folder / "net.safetensors"
    save_checkpoint(place, net, make_header())
    torch.save(net.state_dict(), folder / "net.pt")
    torch.save({"nets": {}, "optimizers": {}, "memory": {}, "averages": {}, "history": []},
               folder / "state.pt")
    Examples(torch.arange(3), torch.rand(3, 1, 8, 8), "Linf:0.1", "0").save(folder / "examples")
    landscape = json.dumps({
        **{name: "x" for name in ("run", "created", "robench", "torch", "device", "commit",
                                  "dataset", "data_sha256", "model", "source", "weights_sha256",
                                  "defense", "recipe", "selection", "checkpoint", "attack")},
        "threat": "Linf:0.1", "seed": 0, "threads": 1, "split": "test", "n": 3,
        "fingerprint": [1.0], "defense_config": {}, "kind": "weight", "attack_config": {},
        "direction_seed": 0, "alphas": [-1, 0, 1], "losses": [[1, 2, 3]], "seconds": 1}).encode()

    def run_folder(path):
        home = path.parent
        for name, text in few.items():
            if name != path.name:
                (home / name).write_bytes(text)
        render(load([home]), home / "out", ["csv", "md", "tex", "json", "html", "robustbench"])

    def config(path):
        spec = RunSpec.create(read_config(path))
        check_attacks(spec.attacks, ThreatModel.parse(spec.threat or "Linf:0.1"))

    def texts(path):
        text = path.read_bytes().decode(errors="replace")
        for read in (ThreatModel.parse, AttackSpec.parse, lambda t: parse_value(t, "--set")):
            try:
                read(text)
            except RobenchError:
                pass

    def embedding(path):
        (path.parent / "results.jsonl").write_bytes(few["results.jsonl"])
        embed(path)

    def published(path):
        target = path.parent / "Linf" / "Name.json"
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        render(load([target]), path.parent / "out", ["csv", "md", "html"])

    return {
        **{name: (text, run_folder) for name, text in few.items()},
        "landscape.jsonl": (landscape, run_folder),
        "config.yaml": (CONFIG.encode(), config),
        "model.json": (json.dumps(ROBUSTBENCH).encode(), published),
        "flags.npz": (pack_arrays({"correct": np.ones(record.n, bool),
                                   "robust": np.arange(record.n) < record.n_robust}),
                      lambda path: survival(record.model_copy(update={"flags": str(path)}))),
        "net.safetensors": (place.read_bytes(),
                            lambda path: load_network(str(path), digits, threat)),
        "net.pt": ((folder / "net.pt").read_bytes(), read_weights),
        "state.pt": ((folder / "state.pt").read_bytes(),
                     lambda path: CellFolder(path.parent, None, "cpu").load_state()),
        "examples": ((folder / "examples").read_bytes(), Examples.load),
        "done.json": (json.dumps({"seconds": 1.5, "history": [], "devices": 1}).encode(),
                      lambda path: Cell.result(SimpleNamespace(folder=path.parent))),
        "kept.json": (lines["results.jsonl"][0], lambda path: [
            read(path, *more) for read, more in ((kept_record, (record.fingerprint,)),
                                                 (kept_transfers, ()),
                                                 (kept_survey, (Landscape, record.fingerprint)))]),
        "search.partial": (pack_arrays({"identity": np.array("x"), "fingerprint": np.ones(3)}),
                           lambda path: read_state(path, "x", np.ones(3))),
        "leaderboard.csv": ((COMMITTED / "leaderboard.csv").read_bytes(), lambda path: from_csv(
            path.read_bytes().decode(errors="surrogateescape"))),
        "leaderboard.json": ((COMMITTED / "leaderboard.json").read_bytes(), lambda path: from_json(
            path.read_bytes().decode(errors="surrogateescape"))),
        "README.md": (b"<!-- robench: . leaderboard -->\n<!-- /robench -->\n", embedding),
        "option": (b"pgd,steps=50,restarts=5", texts),
    }


NAMES = ["results.jsonl", "transfer.jsonl", "training.jsonl", "landscape.jsonl", "config.yaml",
         "model.json", "flags.npz", "net.safetensors", "net.pt", "state.pt", "examples",
         "done.json", "kept.json", "search.partial", "leaderboard.csv", "leaderboard.json",
         "README.md", "option"]


def survives(case, name, folder, rng):
    """Whatever is wrong with it, a RobenchError of one line says so."""
    valid, read = case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / name
    path.write_bytes(damage(valid, rng))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflows in a table are no tracebacks
        try:
            read(path)
        except RobenchError as error:
            assert str(error)
            assert len(str(error)) < 5000


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
        survives(cases[name], name, tmp_path / "in", rng)

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
