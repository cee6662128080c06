"""Exports that others load: adapters alone, other dtypes, the card, and a hub that is a server of the test's own."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lit_opd
from lit_opd.cli import main
from lit_opd.config import load_config, to_yaml
from lit_opd.models import load_student
from lit_opd.runs import model_card
from lit_opd.runs.folder import RunFolder

LORA = "student.lora={r: 2, target_modules: [q_proj, v_proj]}"
IDS = torch.arange(3, 17)[None]


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the folder of a run with a checkpoint of a student that has moved, and returns the words that name it."""
    monkeypatch.chdir(tmp_path)

    def make(*own, dataset="0123"):
        words = ["student.path=${lit_opd:tiny/student}", "teacher.path=org/teacher", "output_dir=run",
                 "estimator.name=clipped_log_ratio", "data.path=a/prompts.jsonl", *own]  # fmt: skip
        student = load_student(load_config([], words).student)
        torch.manual_seed(0)
        for weight in student.model.parameters():
            if weight.requires_grad:
                weight.data += 0.1 * torch.randn_like(weight)
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        state = {f"model.{name}": value for name, value in student.model.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 7}, tmp_path / "run" / "checkpoints" / "last.ckpt")
        (tmp_path / "run" / "run.json").write_text(json.dumps({"mlflow_run_id": "abc", "dataset_sha256": dataset}))
        with torch.no_grad():
            return words, student.model.eval()(input_ids=IDS).logits

    return make


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_adapters_alone_are_what_peft_loads_over_the_students_own_weights(made, capsys, init):
    words, expected = made(f"student.lora={{r: 2, target_modules: [q_proj, v_proj], init_lora_weights: {init}}}")
    assert main(["export", "--adapter-only", *words]) == 0
    assert capsys.readouterr().out.strip() == "run/adapter"
    base = AutoModelForCausalLM.from_pretrained(load_config([], words).student.path)
    loaded = peft.PeftModel.from_pretrained(base, "run/adapter").eval()
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
    assert all("lora_" in name for name in load_file("run/adapter/adapter_model.safetensors"))
    assert ModelCard.load("run/adapter/README.md").data.library_name == "peft"


def test_adapters_that_are_not_the_students_are_no_export(made, capsys, monkeypatch):
    words, _ = made(LORA)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda base, folder: base)  # as if it had read none
    assert main(["export", "--adapter-only", *words]) == 1
    assert "run/adapter.part' is not the trained student, but " in capsys.readouterr().err
    assert not Path("run/adapter").exists()


def test_another_dtype_is_that_of_the_file_and_of_what_is_loaded(made):
    words, expected = made()
    assert main(["export", "--dtype", "bfloat16", "--out", "narrow", *words]) == 0
    assert {value.dtype for value in load_file("narrow/model.safetensors").values()} == {torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained("narrow")
    assert loaded.dtype == torch.bfloat16
    torch.testing.assert_close(loaded(input_ids=IDS).logits.float(), expected, rtol=0.05, atol=0.3)


def test_a_card_tells_the_run_and_its_head_is_what_the_hub_reads(made):
    words, _ = made()
    own = [*words, "estimator.kwargs.max_log_ratio=3", "data.source=hub", "data.path=org/prompts"]
    Path("run/config.yaml").write_text(to_yaml(load_config([], own)))  # which the command is not given
    folder = RunFolder(Path("run"))
    found = {"mean": 0.5, "low": 0.25, "high": 0.75}
    folder.summary.write_text(json.dumps({"steps": 7, "before": {"reverse_kl": found}, "after": {}, "teacher": {}}))
    assert main(["export", *words]) == 0
    card = ModelCard.load("run/student/README.md")
    assert (card.data.library_name, card.data.datasets, card.data.base_model) == ("transformers", ["org/prompts"], None)
    assert "on-policy-distillation" in card.data.tags
    for row in (
        "| estimator | `clipped_log_ratio` (max_log_ratio=3) |",
        "| its contract | aims at the gradient of reverse_kl, biased; arXiv:2603.25562",
        "| teacher | org/teacher |", "| student | student |", "| optimizer steps | 7 |", "| MLflow run | abc |",
        "| sha256 of the prompts | 0123 |", "| reverse KL (nats/token) | 0.5 [0.25, 0.75] |", lit_opd.__version__,
        "add `license:`",
    ):  # fmt: skip
        assert row in card.text
    config = load_config([], [*own, "student.path=org/student"])
    assert model_card.model_card(config, folder, 7).data.base_model == "org/student"
    assert "Not measured at this step" in model_card.model_card(config, folder, 6).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter-only"], "--adapter-only: expected a student with adapters (student.lora), found one all of whose"),
        (["--adapter-only", "--dtype", "float32", LORA], "--dtype: expected nothing beside --adapter-only"),
        (["--dtype", "bf16"], "--dtype: expected one of float32, bfloat16, float16, float64, found 'bf16'."),
        (["--push-to-hub", "a b/c"], "--push-to-hub: expected ORGANISATION/NAME, found 'a b/c'"),
        (["--push-to-hub", "name"], "--push-to-hub: expected ORGANISATION/NAME, found 'name'. Put your name"),
        (["--push-to-hub", "org/name"], "--push-to-hub: expected a token of the hub, found none. Run `hf auth login`"),
    ],
)
def test_what_cannot_be_exported_is_told_before_weights_load(options, message, made, capsys, monkeypatch):
    monkeypatch.setattr("lit_opd.commands.hub.get_token", lambda: None)
    monkeypatch.setattr("lit_opd.commands.export.load_student", lambda *_: pytest.fail("loaded"))
    words, _ = made()
    assert main(["export", *options, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: {message}")


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes whatever it is sent, or answers with a status of its own."""
    seen = SimpleNamespace(requests=[], status=200)

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            seen.requests.append((self.path, body))
            place = f"http://{self.headers['Host']}/org/name"
            answer = {"url": place, "commitUrl": f"{place}/commit/1", "commitOid": "1"}
            if "/preupload/" in self.path:
                answer = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                    for file in json.loads(body)["files"]]}  # fmt: skip
            sent = json.dumps(answer).encode()
            self.send_response(seen.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("lit_opd.commands.hub.HfApi", lambda **words: HfApi(endpoint=address, token="hf_x", **words))
    monkeypatch.setattr("lit_opd.commands.hub.get_token", lambda: "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield seen
    server.shutdown()
    server.server_close()


def test_a_student_is_uploaded_to_a_private_repository(made, hub, capsys):
    words, _ = made()
    assert main(["export", "--push-to-hub", "org/name", "--out", "out", *words]) == 0
    folder, address = capsys.readouterr().out.splitlines()
    assert folder == "out"
    assert address.endswith("/org/name")
    (created,) = [json.loads(body) for path, body in hub.requests if path == "/api/repos/create"]
    assert (created["name"], created["organization"]) == ("name", "org")
    assert created.get("private") or created.get("visibility") == "private"  # as huggingface_hub of 1.x and of 2.x say
    (commit,) = [body for path, body in hub.requests if path == "/api/models/org/name/commit/main"]
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} >= {"README.md", "model.safetensors"}


def test_a_hub_that_refuses_leaves_the_folder(made, hub, capsys):
    words, _ = made()
    hub.status = 403
    assert main(["export", "--push-to-hub", "org/name", "--out", "out", *words]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed")]
    assert line.startswith("failed: --push-to-hub: 'org/name' was not uploaded (")
    assert line.endswith("'out' holds it.")
    assert (AutoModelForCausalLM.from_pretrained("out")).dtype == torch.float32
