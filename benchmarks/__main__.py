"""List and run the benchmarks, gather results: ``python -m benchmarks [NAME|report] [options]``."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from pathlib import Path

from benchmarks.measure import COMMAND
from benchmarks.results import write_results
from featcache import InputError

HELP = """
python -m benchmarks NAME [--quick] runs one; NAME --help says the rest
python -m benchmarks report         writes benchmarks/RESULTS.md from what was measured"""
HERE = Path(__file__).parent
TOOLS = {
    "__init__",
    "__main__",
    "decision_domains",
    "blending_chain",
    "blending_transfer",
    "heads_peers",
    "measure",
    "pictures",
    "problems",
    "results",
    "transfer_domains",
    "transfer_methods",
    "transfer_peers",
}


def questions() -> dict[str, str]:
    """Name of each benchmark and the question in the first line of its docstring."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        if path.stem not in TOOLS:
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = doc.split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Run the benchmark that is named first, or list all."""
    known = questions()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, known), default=0)
        print("\n".join(f"{name:{width}}  {question}" for name, question in known.items()))
        print(HELP)
        return 0
    if arguments[0] == "report":
        if arguments[1:]:
            print(f"report {' '.join(arguments[1:])}: report takes no options")
            return 2
        out = HERE / "RESULTS.md"
        count = write_results(HERE / "results", out, known)
        print(f"{os.path.relpath(out)}: {count} tables")
        return 0
    if arguments[0] not in known:
        print(f"there is no benchmark {arguments[0]!r}; there are {', '.join(known)}, and report")
        return 2
    sys.argv = [f"{COMMAND}{arguments[0]}", *arguments[1:]]  # also what `--help` says
    try:
        # Under its own name, by which processes that it starts find what they are to run.
        return importlib.import_module(f"benchmarks.{arguments[0]}").main() or 0
    except InputError as error:
        print(f"{arguments[0]}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
