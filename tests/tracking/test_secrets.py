"""Passwords and tokens of a configuration are shown nowhere, and the names of the variables that held them are."""

import stat

import pytest
from workspaces import QUICKSTART

from lit_opd.cli import main
from lit_opd.config import load_config, to_flat, to_yaml
from lit_opd.errors import RunError, UserError, concealed
from lit_opd.lab.compare import runs
from lit_opd.lab.compare.grid import load_comparison, runs_of

SECRETS = ("hunter22", "pa55word", "tok-en-1234", "ghp_abcdefghijklmnopqrstuvwx")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEST_PASSWORD", "hunter22")
    monkeypatch.setenv("OPD_TEST_N", "24")
    file = tmp_path / "own.yaml"
    file.write_text(
        "tracking: {uri: 'http://me:${oc.env:OPD_TEST_PASSWORD}@127.0.0.1:9', tags: {from: 'http://me:pa55word@host/x'}}\n"
        "data: {kwargs: {token: tok-en-1234, storage_options: {client_secret: '${oc.env:OPD_TEST_PASSWORD}'},\n"
        "       url: 'https://host/f?sig=tok-en-1234', note: ghp_abcdefghijklmnopqrstuvwx, pad_token: '<pad>'},\n"
        "       train_size: '${oc.env:OPD_TEST_N}'}\n"
    )
    return load_config([QUICKSTART, file])


def test_the_program_has_them_and_its_records_do_not(config, tmp_path):
    assert config.tracking.uri == "http://me:hunter22@127.0.0.1:9"
    assert config.data.kwargs["token"] == "tok-en-1234"
    flat, text = to_flat(config), to_yaml(config)
    assert not [secret for secret in SECRETS if secret in text or secret in str(flat)]
    assert flat["tracking.uri"] == "http://me:${oc.env:OPD_TEST_PASSWORD}@127.0.0.1:9"
    assert flat["tracking.tags.from"] == "http://***@host/x"
    assert flat["data.kwargs.token"] == "***"
    assert flat["data.kwargs.pad_token"] == "<pad>"
    (tmp_path / "again.yaml").write_text(text)
    again = load_config([tmp_path / "again.yaml"])
    assert (again.tracking.uri, again.data.train_size) == (config.tracking.uri, 24)
    assert to_flat(again) == flat


def test_errors_do_not_show_them(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = "no way to http://me:hunter22@127.0.0.1:9/api with tok-en-1234"
    for error in (UserError("tracking.uri", "a server", told, "Start it."), RunError(told)):
        assert "no way to http://me:${oc.env:OPD_TEST_PASSWORD}@127.0.0.1:9/api with ***" in str(error)
    assert (
        concealed("postgresql://u:p@ss@host/db, see https://host/a@b")
        == "postgresql://***@host/db, see https://host/a@b"
    )
    assert main(["fit", "--config", str(QUICKSTART), "optim.lr=${oc.env:OPD_TEST_PASSWORD}"]) == 2
    assert main(["fit", "--config", str(QUICKSTART), "tracking.ur=http://me:pa55word@host"]) == 2
    assert main(["fit", "--config", str(QUICKSTART), "tracking.uri=http://me:pa55word@127.0.0.1:9"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert not [line for line in lines if any(secret in line for secret in SECRETS)]


def test_a_run_of_a_comparison_gets_them_in_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TEST_PASSWORD", "hunter22")
    words = [f"output_dir={tmp_path}", "overrides=['data.kwargs.token=tok-en-1234']", "seeds=[1]"]
    comparison = load_comparison([QUICKSTART.parent / "compare" / "quickstart.yaml"], words)
    (run, *_) = runs_of(comparison)
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *_, **__: None)
    runs._start(run, "parent", "#0072B2", 1, 0)
    assert stat.S_IMODE(run.file.stat().st_mode) == 0o600
    assert "tok-en-1234" not in to_yaml(comparison)
    assert load_config([run.file]).data.kwargs["token"] == "tok-en-1234"


def test_a_variant_of_a_comparison_that_is_called_token_is_no_secret():
    words = ["output_dir=out", "variants={token: [estimator.name=token]}", "overrides=[]", "seeds=[1]"]
    load_comparison([QUICKSTART.parent / "compare" / "quickstart.yaml"], words)
    assert concealed("Set estimator.name=token.") == "Set estimator.name=token."
