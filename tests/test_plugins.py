import sys

import pytest

from lit_opd.errors import UserError
from lit_opd.plugins import call_object, calling_parts, import_object


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("runs = []\nvalue = 3\n\ndef function():\n    return 'mine'\n\ndef _private():\n    pass\n")
    return path


def test_function_of_a_module():
    assert import_object("key", "json:dumps")([1]) == "[1]"


def test_function_of_a_file(file):
    assert import_object("key", f"{file}:function")() == "mine"


def test_file_relative_to_the_current_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert import_object("key", "mine.py:function") is import_object("key", f"{file}:function")


def test_files_of_one_name_in_two_folders_are_two_modules(file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.py").write_text("def function():\n    return 'other'\n")
    assert import_object("key", f"{file}:function")() == "mine"
    assert import_object("key", f"{other / 'mine.py'}:function")() == "other"


def test_colon_in_a_folder(tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "mine.py").write_text("def function():\n    return 'colon'\n")
    assert import_object("key", f"{folder / 'mine.py'}:function")() == "colon"


@pytest.mark.parametrize(("reference", "said"), [
    ("function", "package.module:name"),
    (":function", "package.module:name"),
    ("json:", "package.module:name"),
    ("no_such_package.module:f", "No module named 'no_such_package'"),
    ("no/such/file.py:f", "no file 'no/such/file.py'"),
    ("json:dump_s", "Did you mean 'dump"),
    ("{file}:function_", "Did you mean 'function'?"),
    ("{file}:value", "a function or class 'value'"),
    ("{file}:xxx", "Known: function."),
])  # fmt: skip
def test_mistakes(file, reference, said):
    with pytest.raises(UserError) as caught:
        import_object("estimator.name", reference.format(file=file))
    assert caught.value.key == "estimator.name"
    assert said in str(caught.value)


BROKEN = [
    ("def f(:", "SyntaxError"), ("1 / 0", r"ZeroDivisionError: division by zero \(.*broken.py, line 1\)"),
    ("import nope", "nope"), ("import sys; sys.exit()", "SystemExit"), ("raise SystemExit(0)", "SystemExit: 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_file_that_does_not_import_leaves_nothing_behind(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    before = set(sys.modules)
    with pytest.raises(UserError, match=said):
        import_object("key", f"{path}:f")
    assert set(sys.modules) == before
    path.write_text("def f():\n    return 1\n")
    assert import_object("key", f"{path}:f")() == 1


def test_module_that_raises_while_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "raises_at_import.py").write_text("raise ValueError('at import')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="at import"):
        import_object("key", "raises_at_import:f")


def test_what_a_call_raises_names_the_line(file):
    file.write_text("def boom():\n    return {}['x']\n\ndef leave():\n    raise SystemExit\n")
    with pytest.raises(
        UserError, match=rf"^key: expected .*mine.py:boom to run, found KeyError: 'x' \({file}, line 2\)"
    ):
        call_object("key", f"{file}:boom")
    with pytest.raises(UserError, match=r"leave to run, found SystemExit"):
        call_object("key", f"{file}:leave")


def test_a_part_that_another_library_calls_is_found_by_its_module(file):
    file.write_text("def boom(x):\n    raise SystemExit(0)\n\ndef stop(x):\n    raise KeyboardInterrupt\n")
    boom, stop = (import_object("callbacks[0]", f"{file}:{name}") for name in ("boom", "stop"))
    told = r"^callbacks\[0\]: expected .*mine.py:\w+ to run, found SystemExit: 0 \(.*line 2"
    with pytest.raises(UserError, match=told), calling_parts():
        max([1], key=boom)
    with pytest.raises(KeyboardInterrupt), calling_parts():
        max([1], key=stop)
    with pytest.raises(ZeroDivisionError), calling_parts():
        raise ZeroDivisionError
