"""The command line answers at once where it needs no torch, and never with a traceback."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from nestseg.cli import main


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["recipes"], 0),
        (["recipes", "show", "demo"], 0),
        (["train", "--help"], 0),
        (["trane"], 2),
        (["train", "demo"], 2),
        (["train", "demo", "--run", "nowhere", "--max-steps", "many"], 2),
        (["train", "no-such-recipe", "--run", "nowhere"], 1),
        (["train", "demo", "--run", "nowhere", "--set", "data.batchsize=1"], 1),
    ],
)
def test_answers_within_a_second_without_torch(arguments, code):
    script = (
        "import sys; from nestseg.cli import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)"
    )
    seconds = []
    for _ in range(3):  # the fastest of three, in processor time: others may be using the machine
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if seconds[-1] < 1:
            break
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert min(seconds) < 1


def test_module_is_the_same_command_line():
    result = subprocess.run([sys.executable, "-m", "nestseg", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("nestseg ")


def test_list_is_plain_aligned_and_complete(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["NAME", "SEGMENTOR", "BACKBONE"]
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert rows["fcn_resnest101-d8_voc"][-1] == "77.41"
    assert rows["pspnet_resnest50-d16_ade20k"][-1] == "-"
    assert len([row for row in rows.values() if row[-1] != "-"]) == 12
    assert not any("\x1b" in line for line in lines)


def test_errors_are_one_line_with_code_reason_and_fix(capsys, tmp_path):
    assert main(["evaluate", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: E-RUN-001 | ")
    assert " | fix: " in error


def test_debug_shows_the_traceback(tmp_path):
    from nestseg.core.errors import RunError

    with pytest.raises(RunError):
        main(["evaluate", str(tmp_path / "absent"), "--debug"])
    with pytest.raises(RunError):
        main(["--debug", "evaluate", str(tmp_path / "absent")])


def test_errors_of_the_system_are_one_line_too(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    arguments = ["train", "demo", "--run", str(tmp_path / "file" / "run"), "--device", "cpu"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: E-SYSTEM-001 | {tmp_path}/file/run | Not a directory | fix: ")
    with pytest.raises(NotADirectoryError):
        main([*arguments, "--debug"])


def test_closed_pipe_is_silent():
    command = f"{sys.executable} -m nestseg recipes show demo | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "name: demo\n"
    assert result.stderr == ""
