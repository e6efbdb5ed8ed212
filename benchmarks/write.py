"""Runs the benchmarks one after the other and puts what each prints into docs/benchmarks.md, under its heading.

    python benchmarks/write.py                    all of them: about an hour on two cores
    python benchmarks/write.py reads batches      these; the other sections stay as they are, with their own dates

A section of the page is `<!-- NAME -->`, then what this program writes, then `<!-- end of NAME -->`; what stands around
it is written by hand: what the numbers mean, and why one falls short.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
COMMANDS = {  # section: what is run for it
    "reads": "reads.py",
    "align": "align.py",
    "store": "store.py",
    "batches": "batches.py",
    "remote": "remote.py",
    "pack": "pack.py",
    "scale": "scale.py",
    "sharing": "sharing.py",
    "engine": "engine.py overhead",
    "memory": "engine.py memory -f log-mel -f f0:dio -f energy -f loudness -f wave -f speaker",
    "planning": "engine.py plan",
    "encoders": "encoders.py speed",
    "pipeline": "encoders.py pipeline --every 8",
    "encoder memory": "encoders.py memory --minutes 10 60",
    "vocoders": "vocoders.py speed --seconds 4 --rounds 3",
    "vocoder training": "vocoders.py train",
    "vocoder learning": "vocoders.py learn",
    "vocoder memory": "vocoders.py memory",
    "acoustic sampling": "acoustic.py sampling",
    "acoustic training": "acoustic.py train",
    "acoustic learning": "acoustic.py learn",
    "evaluation": "evaluate.py --report",
}
LIBRARIES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # where a machine sets them, a current numpy is slowed down


def machine() -> str:
    """Processor, cores, memory and Python, in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        cpu = found[1]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}"


def run(command: str) -> str:
    """What a benchmark prints. SystemExit with the end of its output if it fails."""
    program, *arguments = command.split()
    environment = {name: value for name, value in os.environ.items() if name not in LIBRARIES}
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / program), *arguments], cwd=ROOT, text=True,
                          capture_output=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}; its section stays as it was\n{done.stderr[-2000:]}")
    print(f"{done.stdout}({time.monotonic() - began:.0f} s)", flush=True)
    return done.stdout.strip("\n")


def put(page: Path, name: str, command: str, output: str) -> None:
    """Replace what stands between the section's markers."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    if not found or end not in rest:
        raise SystemExit(f"{page} has no section between {begin.strip()} and {end}")
    block = f"`python benchmarks/{command}`, {machine()}:\n\n```\n{output}\n```\n"
    page.write_text(before + begin + block + end + rest.split(end, 1)[1], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of: {', '.join(COMMANDS)} (default: all)")
    asked = parser.parse_args().sections or list(COMMANDS)
    for name in asked:
        if name not in COMMANDS:
            parser.error(f"no section {name!r}; there are: {', '.join(COMMANDS)}")
    for name in asked:
        print(f"== {name}", flush=True)
        put(PAGE, name, COMMANDS[name], run(COMMANDS[name]))


if __name__ == "__main__":
    main()
