"""Names that always stand for something whole, and folders for one process at a time."""

import os

import pytest

from lit_opd.errors import UserError
from lit_opd.files import only_one, replacing, write_file


class Killed(BaseException):
    pass


def test_a_file_is_the_old_one_or_the_new_one_whenever_the_process_dies(tmp_path, monkeypatch):
    place = tmp_path / "new" / "file"
    write_file(place, "old")

    def die(*_):
        raise Killed

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, die)
            with pytest.raises(Killed):
                write_file(place, "new")
        assert place.read_text() == "old"
        assert list(place.parent.iterdir()) == [place]
    place.with_name("file.part").write_text("of a process that was killed")
    write_file(place, b"new")
    assert place.read_text() == "new"
    assert list(place.parent.iterdir()) == [place]


def test_a_folder_is_replaced_as_a_whole_and_put_back_where_the_process_died_between_the_moves(tmp_path, monkeypatch):
    place, moves, replace = tmp_path / "folder", [], os.replace

    def write(content):
        with replacing(place) as part:
            part.mkdir()
            (part / content).write_text(content)

    def second_dies(*names):
        moves.append(names)
        if len(moves) == 2:
            raise Killed
        replace(*names)

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_dies)
        with pytest.raises(Killed):
            write("new")
    assert not place.exists()
    with pytest.raises(ZeroDivisionError), replacing(place):
        _ = 1 / 0
    assert [file.name for file in place.iterdir()] == ["old"]
    write("new")
    assert [file.name for file in place.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [place]


def test_only_one_process_is_let_into_a_folder(tmp_path):
    with only_one("output_dir", tmp_path / "run"), pytest.raises(UserError, match="that nobody is at work in"):
        only_one("output_dir", tmp_path / "run").__enter__()
    with only_one("output_dir", tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: expected a folder that can be written to"):
        only_one("output_dir", tmp_path / "file").__enter__()
