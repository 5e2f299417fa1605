"""Coverage-guided fuzzing of a kind of file that robench reads (needs `pip install atheris`).

    PYTHONPATH=src python tests/benchmark/fuzz.py results.jsonl -max_total_time=60

Ends with an error, and keeps the input, at the first traceback that is not a line for the user.
The further arguments are libFuzzer's.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["robench", "yaml", "json"]):
    from hostile import make_cases, survives


def main() -> None:
    name, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (folder / "cases").mkdir()
    valid, read = make_cases(folder / "cases")[name]
    (folder / "corpus").mkdir()
    (folder / "corpus" / "valid").write_bytes(valid)
    atheris.Setup([sys.argv[0], str(folder / "corpus"), *options],
                  lambda content: survives(read, folder / "in" / name, content))
    atheris.Fuzz()


main()
