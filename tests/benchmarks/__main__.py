"""Measures, writes JSON and prints tables.

Every part runs in a process of its own, one after the other (with --quick all in one,
on a CPU). Figures are only as good as the machine is idle. Without an accelerator
`accelerator` runs at tiny sizes.
"""

import argparse
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# All parts, and those that only compile, for devices that need not be there.
PARTS = (
    "masks",
    "steps",
    "training",
    "memory",
    "compiling",
    "traffic",
    "growth",
    "accelerator",
)
ON_CPU = ("memory", "traffic")


def main() -> None:
    """Reads the command line and does as it says."""
    parser = argparse.ArgumentParser("python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"parts: {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"))
    parser.add_argument("--readme", metavar="JSON", help="print the README's section")
    parser.add_argument("--tables", metavar="JSON", help="print the tables again")
    parser.add_argument("--child", metavar="JSON", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.names) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}; there are: {', '.join(PARTS)}")
    if args.readme:
        from . import readme

        print(readme.section(json.loads(pathlib.Path(args.readme).read_text())))
    elif args.tables:
        show(json.loads(pathlib.Path(args.tables).read_text()))
    elif args.child:
        _measure(args.names, args.quick, pathlib.Path(args.child))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        results = run(args.names or PARTS, args.quick, args.out)
        show(results)
        if results["failed"]:
            sys.exit(f"failed: {', '.join(results['failed'])}")


def run(names: Any, quick: bool, out: pathlib.Path) -> dict[str, Any]:
    """All parts named, with what they ran on; also written as they come."""
    results: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    seconds, failed = {}, []
    path = out / ("benchmarks-quick.json" if quick else "benchmarks.json")
    for group in [names] if quick else [[name] for name in names]:
        found = _child(group, quick)
        failed += [name for name in group if name not in found]
        for name, one in found.items():
            # A part on a CPU does not say what the accelerator is.
            if not results or name not in ON_CPU:
                results = one["where"]
            parts[name], seconds[name] = one["part"], one["seconds"]
        asked = [] if tuple(names) == PARTS else names
        words = ["python -m tests.benchmarks", *asked, *(["--quick"] * quick)]
        results |= {"command": " ".join(words), "quick": quick, "seconds": seconds}
        results |= {"failed": failed, "parts": parts}
        path.write_text(json.dumps(results, indent=1))
    print(f"{path}: {sum(seconds.values()):.0f} s", file=sys.stderr)
    return results | {"failed": failed, "parts": parts}


def show(results: dict[str, Any]) -> None:
    """Prints all tables, and which bars were kept."""
    from . import bars

    machine, versions = results.get("machine", {}), results.get("versions", {})
    print(f"# Benchmarks, {results.get('date')}\n")
    print(f"`{results.get('command')}`\n")
    print(", ".join(f"{k} {v}" for k, v in {**machine, **versions}.items()))
    for name, found in results["parts"].items():
        part = importlib.import_module(f"{__package__}.{name}")
        print(f"\n## {part.TITLE} ({results['seconds'][name]} s)\n")
        print("\n\n".join(part.report(found)))
    print(f"\n## {bars.TITLE}\n\n{bars.report(results['parts'])}")


def _child(names: Any, quick: bool) -> dict[str, Any]:
    """Measures parts in a process of their own."""
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "3"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if quick or set(names) <= set(ON_CPU):
        devices = "--xla_force_host_platform_device_count=8"
        flags = f"{environment.get('XLA_FLAGS', '')} {devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "part.json")
        command = [sys.executable, "-m", "tests.benchmarks", *names]
        command += ["--child", str(path), *(["--quick"] * quick)]
        code = subprocess.run(
            command, cwd=ROOT, env=environment, check=False
        ).returncode
        if code:
            print(f"{', '.join(names)}: ended with {code}", file=sys.stderr)
        return json.loads(path.read_text()) if path.exists() else {}


def _measure(names: Any, quick: bool, path: pathlib.Path) -> None:
    from . import machine

    found: dict[str, Any] = {}
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        part = importlib.import_module(f"{__package__}.{name}")
        where = machine.describe()  # the load, before there is any of our own
        begin = time.perf_counter()
        part = part.measure(quick)
        seconds = round(time.perf_counter() - begin, 1)
        found[name] = {"where": where, "seconds": seconds, "part": part}
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
