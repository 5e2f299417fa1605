"""The shape of the package: who imports whom, what a folder holds, what no line may contain."""

import ast
import os
import re
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("attacks", "defenses", "benchmark", "reports")
BASE = {"errors", "registry", "randomness", "files", "options", "signals"}
MAY_IMPORT = {  # attacks <- defenses <- benchmark -> reports
    **{f"src/robench/{name}.py": BASE for name in BASE},
    "src/robench/testing.py": BASE | {"attacks", "defenses"},
    "src/robench/pytest_plugin.py": BASE | {"attacks", "benchmark", "reports"},
    "src/robench/__init__.py": set(PACKAGES),  # on first use: see test_import_is_light
    "src/robench/__main__.py": {"benchmark"},
    "attacks": BASE | {"attacks", ""},  # "" is robench.__version__
    "defenses": BASE | {"attacks", "defenses"},
    "reports": BASE - {"randomness"} | {"reports"},  # randomness imports torch
    "benchmark": BASE | {*PACKAGES, "", "__version__", "watchers"},  # of which one names a group
}
MAX_LINES = 400
CARD = ["Use", "Method", "In detail", "Hyper-parameters", "Paper and code differ", "Caveats",
        "Published numbers", "Source"]
# Written so that this file does not match: what is true on one machine only.
MACHINE = re.compile(
    r"(?<![\w.])/(?:work|root|home/\w+)/|/tmp/v[e]nv|index[-]url"
    r"|pypi\.org/simple|pythonhosted\.org|download\.pytorch\.org"
)
DATA_OF_CI = re.compile(r"shared[/]data")

SOURCES = sorted([
    *(ROOT / "src" / "robench").glob("*.py"),
    *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")),
])
FOLDERS = sorted({path.parent for path in SOURCES})
METHODS = sorted(path.parent for path in (ROOT / "defenses").glob("*/__init__.py"))


def place(path: Path, node: ast.AST | None = None) -> str:
    return path.relative_to(ROOT).as_posix() + (f":{node.lineno}" if node else "")


def nodes(paths: list[Path] = SOURCES) -> Iterator[tuple[Path, ast.AST]]:
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path, node


def imported(node: ast.AST) -> list[str]:
    """The modules that a node imports; strings like "robench.attacks.gradient" count."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level or node.module == "robench":
            return ["." * node.level + f"{node.module or ''}.{a.name}" for a in node.names]
        return [str(node.module)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.findall(r"^robench(?:\.\w+)+$", node.value)
    return []


IMPORTS = [(path, node, name) for path, node in nodes() for name in imported(node)]


def repository_files() -> Iterator[Path]:
    """All files but those that .gitignore names; its patterns are plain names."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if not any(fnmatch(f, pattern) for pattern in ignored)]
        for name in files:
            if not any(fnmatch(name, pattern) for pattern in ignored):
                yield Path(folder, name)


# Imports


def test_import_direction():
    wrong = []
    for path, node, name in IMPORTS:
        first, _, rest = name.partition(".")
        owner = path.relative_to(ROOT).parts[0]
        allowed = MAY_IMPORT[owner if owner in PACKAGES else place(path)]
        if first == "robench" and rest.split(".")[0] not in allowed:
            wrong.append(f"{place(path, node)} imports {name}")
    assert not wrong


def test_imports_are_absolute():
    short = (*PACKAGES, "")  # "" is relative
    wrong = [f"{place(p, node)} imports {n}" for p, node, n in IMPORTS if n.split(".")[0] in short]
    assert not wrong


def test_reports_never_name_torch():
    wrong = [f"{place(p, node)} imports {name}" for p, node, name in IMPORTS
             if p.is_relative_to(ROOT / "reports") and "torch" in name]
    assert not wrong


ALL_OF = """
import importlib, pkgutil, sys
def import_all(name):
    for module in pkgutil.walk_packages(importlib.import_module(name).__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def test_reports_run_without_torch(python, tmp_path):
    done = python("-c", f"""{ALL_OF}
from pathlib import Path
import robench.reports
assert "torch" not in sys.modules, "imported with robench.reports"
import_all("robench.reports")
robench.reports.render(robench.reports.Results(), Path({str(tmp_path)!r}))
assert "torch" not in sys.modules, "imported for rendering"
""")
    assert (done.stderr, done.returncode) == ("", 0)
    assert any(tmp_path.iterdir())


def test_no_module_is_imported_twice_and_no_extra_at_all(python):
    done = python("-c", f"""{ALL_OF}
from collections import Counter
from pathlib import Path
import_all("robench")
files = [getattr(module, "__file__", None) for name, module in sys.modules.items()
         if name.split(".")[0] in {("robench", *PACKAGES)!r}]
count = Counter(Path(file).resolve() for file in files if file)
assert len(count) == {len(SOURCES) - 1}, sorted(count)  # all but __main__
assert max(count.values()) == 1, count.most_common(1)
extras = set(sys.modules) & {{"torchattacks", "pyautoattack", "autoattack", "robustbench", "ray",
                             "lightning_fabric"}}
assert not extras, extras
""")
    assert (done.stderr, done.returncode) == ("", 0)


def test_import_is_light(python):
    done = python("-c", "import robench, sys\n"
                  "print(*[m for m in sys.modules if m == 'torch' or m.startswith('robench.')])")
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("command", [[], ["run"], ["eval"], ["report"], ["check"]])
def test_help_is_light(python, command):
    done = python("-X", "importtime", "-m", "robench", *command, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: robench")
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "click" in modules and not modules & {"torch", "pandas", "matplotlib", "sklearn"}


# Files


def test_links_lead_to_the_packages():
    links = {p.name: p.resolve() for p in (ROOT / "src/robench").iterdir() if p.is_symlink()}
    assert links == {package: ROOT.resolve() / package for package in PACKAGES}


def test_setuptools_finds_every_folder():
    missing = [place(folder) for folder in FOLDERS if not (folder / "__init__.py").is_file()]
    assert not missing


def test_package_data_is_covered():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    covered = {path for folder in FOLDERS for pattern in patterns for path in folder.glob(pattern)}
    ours = [p for p in repository_files() if p.is_relative_to(ROOT / "src" / "robench")
            or p.relative_to(ROOT).parts[0] in PACKAGES]
    data = [p for p in ours if p.is_file() and p.suffix != ".py"]
    assert {ROOT / "src/robench/py.typed", ROOT / "benchmark/recipes/unified.yaml",
            ROOT / "reports/html/style.css", ROOT / "defenses/trades/README.md"} <= set(data)
    assert [place(path) for path in data if path not in covered] == []


@pytest.mark.parametrize("folder", METHODS, ids=lambda folder: folder.name)
def test_a_defense_is_a_folder_with_a_card(folder):
    files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert files == {"__init__.py", f"{folder.name}.py", "README.md"}
    text = re.sub(r"^```.*?^```", "", (folder / "README.md").read_text(), flags=re.S | re.M)
    title, *headings = re.findall(r"^#+ .*$", text, flags=re.M)
    assert title.startswith("# ") and headings == [f"## {heading}" for heading in CARD]


def test_files_are_short():
    lengths = {place(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


# Lines


def forbidden(node: ast.AST) -> bool:
    """Calls that print, run strings or pickles, or tie a tensor to CUDA."""
    if not isinstance(node, ast.Call):
        return False
    function = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    return (
        function in {"print", "eval", "exec", "breakpoint"}
        or function.endswith((".cuda", "pickle.load", "pickle.loads", "Unpickler", "read_pickle"))
        or (function == "torch.load" and options.get("weights_only") != "True")
        or options.get("weights_only") == "False"
        or options.get("allow_pickle") == "True"
    )


@pytest.mark.parametrize(("code", "found"), [
    ("print(1)", True), ("eval('1')", True), ("x.cuda()", True), ("pickle.load(f)", True),
    ("torch.load(f)", True), ("torch.load(f, weights_only=False)", True),
    ("torch.load(f, weights_only=True)", False), ("net.eval()", False),
    ("torch.cuda.is_available()", False), ("'print(1)'", False),
])
def test_the_search_for_forbidden_calls(code, found):
    assert any(map(forbidden, ast.walk(ast.parse(code)))) is found


def test_no_forbidden_calls():
    assert [f"{place(p, n)}: {ast.unparse(n)}" for p, n in nodes() if forbidden(n)] == []


def test_nothing_is_tied_to_one_machine():
    found = []
    for path in repository_files():
        if path.is_symlink() or path.stat().st_size > 1_000_000:
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        found += [f"{place(path)}: {match[0]}" for match in MACHINE.finditer(text)]
        if place(path) != ".ci/run" and DATA_OF_CI.search(text):
            found.append(f"{place(path)}: only .ci/run may name the data's folder")
    assert not found
