"""The command as its user meets it: what it prints, what it refuses and how it ends."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import typer

from probdefense import files
from probdefense.study import cli, job, pool, request
from tests.worlds import import_torchvision

SMALL = {
    "epochs": 1,
    "gradients": 16,
    "images": 12,
    "adaptive_images": 6,
    "checked": 12,
    "check_gradients": 16,
    "votes": 20,
}


def run(monkeypatch, *arguments: str) -> int:
    """The exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["probdefense", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(request, "QUICK", SMALL)
    monkeypatch.setattr(pool, "cores", lambda: 1)


def test_compare_prints_the_table_and_writes(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none,rse", "--attacks", "pgd", "--num-samples", "4"]
    assert run(monkeypatch, "compare", *options, "--out", str(tmp_path)) == 0
    printed = capsys.readouterr()
    for text in (
        "accuracy in %",
        "suite",
        "at most 1000 evaluations for the suite",
        "rse",
        "mean_prob",
        "certified",
        "checks, none",
        "pairs under",
        "report.html",
    ):
        assert text in printed.out
    assert "[2/2] rse" in printed.err
    assert (tmp_path / "report.json").exists()


def test_compare_prints_json(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none", "--attacks", "fgsm", "--json", "--out", str(tmp_path)]
    assert run(monkeypatch, "compare", *options) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "report.json").read_text()
    assert [row["attack"] for row in json.loads(printed)["rows"]][::2] == ["clean", "fgsm", "suite", "worst"]


def test_no_posterior_is_said(small, monkeypatch, capsys, tmp_path):
    options = ["--quick", "--defenses", "none", "--attacks", "clean", "--out", str(tmp_path)]
    assert run(monkeypatch, "compare", *options) == 0
    assert "no posterior.nc" in capsys.readouterr().out


def test_list_names_everything(monkeypatch, capsys):
    assert run(monkeypatch, "list") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("adv_bnn", "adversarial", "eot_pgd", "fashion-mnist"))
    assert run(monkeypatch, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == job.catalog()


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "version") == 0
    assert "pyro-ppl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["compare", "--defenses", "nun"], "unknown defense 'nun'"),
        (["compare", "--attacks", "pdg"], "unknown attack 'pdg'"),
        (["compare", "--data", "digitz"], "unknown data set"),
        *(
            (["compare", "--eps", eps], "expected --eps in (0, 1]")
            for eps in ("0", "-1", "nan", "255", "1.01")
        ),
        (["compare", "--eps", "8/255"], "--eps"),
        (["compare", "--num-samples", "0"], "--num-samples"),
        (["compare", "--num-samples", "many"], "--num-samples"),
        (["compare", "--epochs", "0"], "--epochs"),
        (["compare", "--epochs", "-3"], "--epochs"),
        (["compare", "--epochs", "1.5"], "--epochs"),
        (["compare", "--seed", "-1"], "--seed"),
        (["compare", "--seed", "x"], "--seed"),
        (["compare", "--defenses", ""], "at least one defense"),
        (["compare", "--defenses", "all,nun"], "unknown defense 'nun'"),
        (["compare", "--nonsense"], "nonsense"),
        (["comprae"], "comprae"),
    ],
)
def test_bad_requests_are_one_sentence_and_exit_2(arguments, match, monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = [*arguments, "--out", str(out)] if arguments[0] == "compare" else arguments
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert match in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("probdefense:")
    assert printed.out == ""
    assert not out.exists()


def test_data_that_are_not_there(monkeypatch, capsys, tmp_path):
    import_torchvision()
    options = ["--data", "cifar10", "--data-root", "/nonexistent", "--out", str(tmp_path / "out")]
    assert run(monkeypatch, "compare", *options) == 2
    printed = capsys.readouterr().err
    assert "cifar10 is not in /nonexistent" in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_out_that_cannot_be_written(place, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("here")
    assert run(monkeypatch, "compare", "--out", str(tmp_path / place)) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.slow
def test_running_on_digits_loads_neither_torchvision_nor_numpyro():
    code = (
        "import sys, pathlib\n"
        "from probdefense.study import job, request\n"
        f"request.QUICK.update({SMALL!r})\n"
        "asked, data = job.prepare(job.Request(('none',), ('pgd',), quick=True))\n"
        "job.run(asked, data)\n"
        "print([name for name in ('torchvision', 'numpyro', 'jax') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_no_work_begins_without_room_for_its_files(monkeypatch, capsys, tmp_path):
    def full(folder, size):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "reserve", full)
    monkeypatch.setattr(job, "run", None)
    assert run(monkeypatch, "compare", "--out", str(tmp_path)) == 2
    assert "(No space left on device)" in capsys.readouterr().err


def test_a_disk_that_fills_up_during_the_work_costs_the_files_not_the_table(
    small, monkeypatch, capsys, tmp_path
):
    def write(result, folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(job, "write", write)
    options = ["--quick", "--defenses", "none", "--attacks", "fgsm", "--out", str(tmp_path)]
    assert run(monkeypatch, "compare", *options) == 2
    printed = capsys.readouterr()
    assert "accuracy in %" in printed.out and "wrote" not in printed.out
    assert printed.err.splitlines()[-1] == (
        f"probdefense: Invalid value: cannot write to --out {tmp_path} (Read-only file system); nothing there "
        "was changed: make room there, or choose another folder"
    )
    assert list(tmp_path.iterdir()) == []


COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from probdefense.study.cli import main; main()"
)


@contextmanager
def training(defenses, tmp_path):
    """The command in the middle of a training without end."""
    options = ["--quick", "--epochs", "100000", "--defenses", defenses, "--out", str(tmp_path)]
    command = [sys.executable, "-c", COMMAND, "compare", *options]
    # a pipe ends when the last process that writes to it has ended: whoever reads it waits for all
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        for _ in defenses.split(","):
            assert process.stderr.readline().startswith("[")
        time.sleep(1)
        yield process
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("defenses", ["none", pytest.param("none,rse", marks=pytest.mark.slow)])
def test_an_interruption_in_the_middle_of_training_ends_with_130(defenses, tmp_path):
    if pool.cores() < len(defenses.split(",")):
        pytest.skip("one core trains one defense after the other")
    with training(defenses, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "probdefense: interrupted\n")


@pytest.mark.slow
def test_no_process_outlives_the_command(tmp_path):
    if pool.cores() < 2:
        pytest.skip("one core trains one defense after the other")
    with training("none,rse", tmp_path) as process:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("error", [KeyboardInterrupt, typer.Abort])
def test_an_interruption_is_one_word_and_130(error, monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise error

    monkeypatch.setattr(job, "run", interrupted)
    assert run(monkeypatch, "compare", "--out", str(tmp_path)) == 130
    assert capsys.readouterr().err == "probdefense: interrupted\n"


def test_output_that_cannot_be_printed_is_one_sentence():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with open("/dev/full", "w") as full:
        answer = subprocess.run([sys.executable, "-c", COMMAND, "list"], stdout=full, stderr=-1, text=True)
    assert answer.returncode == 2
    assert answer.stderr == (
        "probdefense: reading or writing failed: [Errno 28] No space left on device; check where the output "
        "goes\n"
    )
