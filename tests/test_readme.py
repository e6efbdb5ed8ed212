"""The README is true: its commands and its Python run as they stand, in an empty folder beside the examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
INSTALL = ("make ", "pip install ")  # run by continuous integration itself
FAILS = ("featstore why ",)          # it is asked about something stale, which is exit status 1


def test_readme_blocks_run_in_order(tmp_path: Path) -> None:
    if not BLOCKS:
        pytest.fail("the README has no code blocks")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    for language, text in BLOCKS:
        if language == "python":
            lines = [[sys.executable, "-c", text]]
        else:
            lines = [["bash", "-c", line] for line in text.splitlines() if line and not line.startswith(INSTALL)]
        for words in lines:
            done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
            expected = 1 if words[-1].startswith(FAILS) else 0
            assert done.returncode == expected, f"{words[-1]}\n{done.stdout}{done.stderr}"
            ran += 1
    assert ran >= 7
    assert (tmp_path / "aa_A4.png").stat().st_size > 10_000


def test_every_extra_of_the_readme_exists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    rows = re.findall(r"^\| (`[^|]+) \|", (ROOT / "README.md").read_text(), re.M)
    named = {name for row in rows for name in re.findall(r"`([a-z0-9]+)`", row)}
    assert named | {"all", "dev"} == set(extras)


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
