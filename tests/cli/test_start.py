"""Help, version, configuration and errors answer at once, without torch, from `dpo-train` and `python -m dpo_cli`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from dpo_cli.cli.heavy_imports import heavy_imports
from dpo_cli.cli.help import help_text
from dpo_cli.cli.train import main
from dpo_cli.config.shipped import GROUPS, choices, shipped_files

REAL = "model=qwen2-0.5b"
REPOSITORY = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "pyarrow", "numpy", "peft", "tensorboard")
# Generous for a loaded machine; with nothing else running these take 0.1 to 0.5 s.
SECONDS = 15.0

_ANSWER_AND_LIST_MODULES = """
import sys
from dpo_cli.cli.train import main
code = main(sys.argv[1:])
print(code, *sorted(set(sys.modules) & set({heavy!r})), sep=",", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--help"], 0),
        (["show=loss"], 0),
        (["--completion", "bash"], 0),
        (["--version"], 0),
        ([REAL, "--cfg", "job"], 0),
        ([REAL, "loss.beat=1"], 2),
        (["resume=x"], 2),
    ],
)
def test_a_quick_answer_imports_nothing_heavy(words: list[str], code: int, folder: Path) -> None:
    script = _ANSWER_AND_LIST_MODULES.format(heavy=HEAVY)
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    assert done.stderr.splitlines()[-1] == str(code)
    assert seconds < SECONDS


_IMPORT_HEAVILY = """
import gc, importlib.util, json, sys
from dpo_cli.cli.heavy_imports import heavy_imports
with heavy_imports(deepspeed=False):
    during = gc.isenabled(), importlib.util.find_spec("deepspeed") is None
    import dpo_cli.train.run
frozen = gc.get_freeze_count()
left_over = [object() for _ in range(1000)], {}
with heavy_imports(deepspeed=False):
    again = gc.isenabled(), importlib.util.find_spec("deepspeed") is None
print(json.dumps([*during, gc.isenabled(), "deepspeed" in sys.modules, frozen, *again, gc.get_freeze_count() - frozen]))
import deepspeed
"""


def test_training_in_one_process_imports_no_deepspeed_and_collects_no_garbage_meanwhile() -> None:
    told = subprocess.run([sys.executable, "-c", _IMPORT_HEAVILY], capture_output=True, text=True, check=True)
    collecting, hidden, collects, imported, frozen, *again = json.loads(told.stdout.splitlines()[0])
    assert not collecting and hidden
    assert collects and not imported and frozen > 100_000
    # Once more in the same process, as a sweep does: what an earlier job left must still be collected.
    assert again == [True, False, 0]


_TELL_WHAT_TRANSFORMERS_HAS = """
import json, sys
from contextlib import nullcontext
from dpo_cli.cli.heavy_imports import heavy_imports
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
with heavy_imports(deepspeed=False) if sys.argv[1] == "quickly" else nullcontext():
    import transformers
    import transformers.models
reads = [path for path in opened if path.endswith("modeling_qwen2.py")]
modules = {name: sorted(defined) for name, defined in transformers._import_structure.items()}
print(json.dumps([len(reads), dir(transformers), dir(transformers.models), modules]))
"""


def test_transformers_reads_its_models_once_and_knows_as_much() -> None:
    def told(how: str) -> list[object]:
        command = [sys.executable, "-c", _TELL_WHAT_TRANSFORMERS_HAS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: list[object] = json.loads(done.stdout.splitlines()[-1])
        return found

    reads, *quickly = told("quickly")
    reads_else, *else_ = told("plainly")
    assert (reads, reads_else) == (1, 2)
    assert quickly == else_


def test_what_is_imported_already_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = ModuleType("deepspeed")
    monkeypatch.setitem(sys.modules, "deepspeed", imported)
    with heavy_imports(deepspeed=False):
        assert sys.modules["deepspeed"] is imported
    assert sys.modules["deepspeed"] is imported


@pytest.mark.parametrize("command", [["dpo-train"], ["-m", "dpo_cli"]])
def test_both_commands_are_the_same_program(command: list[str], folder: Path) -> None:
    program = [sys.executable, *command] if command[0] == "-m" else [str(Path(sys.executable).parent / command[0])]
    if not Path(program[0]).exists():
        pytest.skip("the package is not installed, so there is no dpo-train")
    helped = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert helped.stdout == help_text()
    wrong = subprocess.run([*program, REAL, "loss.beat=1"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "did you mean beta?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_reader_who_leaves_early_is_not_complained_to(folder: Path) -> None:
    piped = subprocess.run(
        f"'{sys.executable}' -m dpo_cli --help | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert piped.stdout.startswith("dpo-train: ")
    assert piped.stderr == ""


@pytest.mark.parametrize("words", [["--help-all"], ["show=keys"]])
def test_the_long_help_lists_every_choice_and_every_key(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    for group in GROUPS:
        for choice in choices(group):
            assert choice in text
    for key in (
        "run_dir=",
        "epochs=1",
        "model.lora.rank=null",
        "data.eval_fraction=0",
        "loss.beta=0.1",
        "optimizer.lr=",
    ):
        assert f"  {key}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_cfg_job_prints_the_resolved_configuration_and_makes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([REAL, "loss.beta=0.3", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["loss"]["beta"] == 0.3
    assert shown["run_dir"].startswith("outputs/")
    assert not list(folder.iterdir())


def test_a_loss_beside_the_user_is_found(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "conf/loss").mkdir(parents=True)
    (folder / "conf/loss/mine.yaml").write_text("_target_: loss_beside_me.soft_loss\n_partial_: true\ntau: 1.0\n")
    (folder / "loss_beside_me.py").write_text("def soft_loss(pair, *, tau: float): ...\n")
    assert main(["--config-dir", "conf", REAL, "loss=mine", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["loss"]["tau"] == 1.0


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation, so that no network is needed: hatchling is one of the pinned tools.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = out.glob("*.whl")
    return file


def test_configuration_recipes_and_the_embedded_example_travel_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in shipped_files().values():
        assert file.relative_to(REPOSITORY).as_posix() in names
    example = REPOSITORY / "dpo_cli" / "example"
    for file in example.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert file.relative_to(REPOSITORY).as_posix() in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]


@pytest.mark.slow
def test_an_installed_wheel_configures_from_any_folder(wheel: Path, folder: Path) -> None:
    target = folder / "installed"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    program = f"import sys; sys.path.insert(0, {str(target)!r}); import dpo_cli; from dpo_cli.cli.train import main; "
    program += "print(dpo_cli.__file__); raise SystemExit(main(['--cfg', 'job']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))
