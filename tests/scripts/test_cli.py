import subprocess
import sys
from pathlib import Path

import pytest

from scripts import cli

ROOT = Path(cli.__file__).resolve().parents[1]


def test_a_command_is_the_file_of_its_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ccrl", "methods", "--format", "markdown"])
    cli.main()
    assert capsys.readouterr().out.startswith("| method | paper |")


def test_unknown_commands_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ccrl", "trian"])
    with pytest.raises(SystemExit, match="expected one of these commands, got trian"):
        cli.main()


def test_under_the_name_that_the_wheel_gives_it(tmp_path):
    """The folder as ccrl_scripts, beside the packages, in a place without a folder called scripts."""
    for name in ("ccrl", "agents", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "ccrl_scripts").mkdir()
    for path in (ROOT / "scripts").glob("*.py"):
        (tmp_path / "ccrl_scripts" / path.name).write_bytes(path.read_bytes())
    # a worker process of `ccrl tune` runs its file under this name, without cli.py before
    code = f"import runpy; runpy.run_path({str(tmp_path / 'ccrl_scripts' / 'tune.py')!r}, run_name='__mp_main__'); "
    code += "import ccrl_scripts.cli, scripts.benchmark_study as s; print(s.__file__)"
    done = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
                          cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""})  # fmt: skip
    assert "ccrl_scripts" in done.stdout, done.stderr
