"""dpo-export writes what training would have written, from any checkpoint, merged or not."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_cli.cli.export import main
from dpo_cli.cli.run_folder import create_run_folder
from dpo_cli.config.check import check
from dpo_cli.config.compose.composition import Request, compose
from dpo_cli.errors import ModelError
from dpo_cli.policy.publish import publish
from dpo_cli.train.export_run import _ROUNDING

from .conftest import Workplace, assert_same_weights, made_workplace


def exported(*words: str | Path) -> int:
    return main([str(word) for word in words])


def test_the_last_checkpoint_exports_as_the_final_model(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    run = workplace.folder / "run"
    assert exported(run, "--to", workplace.folder / "mine") == 0
    assert_same_weights(load_file(workplace.folder / "mine" / "model.safetensors"), workplace.final_weights("run"))
    assert "beta" in (workplace.folder / "mine" / "README.md").read_text()
    assert exported(run, "--step", "8") == 0
    # As of a run that was stopped before its first line.
    (run / "metrics.jsonl").unlink()
    assert exported(run, "--to", workplace.folder / "untold") == 0
    earlier = load_file(run / "export-step-00000008" / "model.safetensors")
    assert any(not torch.equal(tensor, earlier[name]) for name, tensor in workplace.final_weights("run").items())


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    done = made_workplace(folder, tiny_model).train("run_dir=run", "model.lora.rank=4")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_the_screen_shows_what_was_written_and_nothing_of_libraries(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    done = subprocess.run(
        [Path(sys.executable).parent / "dpo-export", "run", "--to", "mine"], cwd=workplace.folder, capture_output=True,
        text=True, check=True, env=workplace.environment,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "mine"
    assert all(line.startswith(("opened again", "mine")) for line in done.stdout.splitlines())


def test_weights_are_cast_and_opened_again(lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    assert exported(lora_run, "--to", small, "--dtype", "bfloat16") == 0
    assert "log-probs of" in capsys.readouterr().out
    final = load_file(lora_run / "final" / "model.safetensors")
    written = load_file(small / "model.safetensors")
    assert_same_weights(written, {name: tensor.to(torch.bfloat16) for name, tensor in final.items()})
    assert json.loads((small / "config.json").read_text())["dtype"] == "bfloat16"
    card = (small / "README.md").read_text()
    for told in ("96 training (of 96 rows)", "32 held out", "of 32 held-out pairs", "**Step**: 12", "2305.18290"):
        assert told in card


def test_a_model_that_reads_back_otherwise_is_not_left_there(
    lora_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.train.export_run._ROUNDING", dict.fromkeys(_ROUNDING, -1.0))
    assert exported(lora_run, "--to", tmp_path / "mine") == 2
    assert "other log-probs than the policy" in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


TOKEN = "hf_" + "a1B2" * 8


class Hub(BaseHTTPRequestHandler):
    """Refuses all but what is there already: me/public, empty and for everyone to see."""

    asked: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        self.asked.append((self.path, body))
        self.send_response(409 if json.loads(body)["name"] == "public" else 403)
        self.end_headers()
        self.wfile.write(json.dumps({"url": "http://127.0.0.1/me/public"}).encode())

    def do_GET(self) -> None:
        listed = self.path.startswith("/api/models/me/public/tree/main")
        self.send_response(200 if self.path.startswith("/api/models/me/public") else 403)
        self.end_headers()
        self.wfile.write(json.dumps([] if listed else {"id": "me/public", "private": False}).encode())

    def log_message(self, *args: object) -> None:
        """Not on the screen."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, bytes]]]:
    """A hub on this machine; what it was asked to make or take, with the body."""
    asked: list[tuple[str, bytes]] = []
    server = HTTPServer(("127.0.0.1", 0), type("ThisHub", (Hub,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield asked
    server.shutdown()
    server.server_close()


def test_a_refusal_of_the_hub_is_told_and_the_folder_stays(
    lora_run: Path, tmp_path: Path, hub: list[tuple[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    words = ["--adapter-only", "--max-shard-size", "500MB", "--push", "me/mine"]
    assert exported(lora_run, "--to", mine, *words) == 2
    said = capsys.readouterr()
    assert "refuses (403)" in said.err
    assert f"hf upload me/mine {mine}" in said.err
    assert TOKEN not in said.err + said.out + (mine / "README.md").read_text()
    ((path, body),) = hub
    assert path == "/api/repos/create"
    assert json.loads(body)["visibility"] == "private"


def test_a_public_repository_takes_nothing_that_was_to_be_private(tmp_path: Path, hub: list[tuple[str, bytes]]) -> None:
    with pytest.raises(ModelError, match="is there already and public") as refused:
        publish(tmp_path, "me/public", private=True)
    assert "--public" in str(refused.value)
    assert [path for path, _ in hub] == ["/api/repos/create"], "nothing was sent"


@pytest.mark.parametrize(
    ("words", "token", "offline", "message"),
    [
        (["--push", "mine"], TOKEN, False, "not a name on the hub"),
        (["--push", "me/mine"], None, False, "hf auth login"),
        (["--push", "me/mine"], TOKEN, True, "unset HF_HUB_OFFLINE"),
        (["--public"], TOKEN, False, "--push OWNER/NAME"),
    ],
)
def test_nothing_is_written_where_nothing_can_be_sent(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    token: str | None,
    offline: bool,
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", token or "")
    config = check(compose(Request(("run_dir=run",))))
    monkeypatch.chdir(tmp_path)
    create_run_folder(config, Request(()))
    assert exported("run", "--to", "mine", *words) == 2
    assert message in capsys.readouterr().err
    assert not Path("mine").exists()


def test_an_adapter_is_saved_as_one_and_merged_when_asked(workplace: Workplace) -> None:
    assert workplace.train("run_dir=run", "model.lora.rank=4", "model.lora.merge=false").returncode == 0
    run = workplace.folder / "run"
    final = run / "final"
    assert not (final / "model.safetensors").exists()
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in final.iterdir()}
    assert exported(run, "--merge", "--to", workplace.folder / "whole") == 0
    base = next(word for word in workplace.defaults if word.startswith("model.path=")).removeprefix("model.path=")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), final).merge_and_unload()
    whole = load_file(workplace.folder / "whole" / "model.safetensors")
    for name, tensor in merged.state_dict().items():
        if name in whole:
            torch.testing.assert_close(whole[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--step", "5"], "no whole checkpoint of step 5"), (["--to", "run"], "exists already")],
)
def test_what_cannot_be_exported_is_told(
    workplace: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    assert workplace.train("run_dir=run").returncode == 0
    monkeypatch.chdir(workplace.folder)
    assert exported("run", *words) == 2
    assert message in capsys.readouterr().err
