"""What is public is documented: what `__all__` names, or where a file has none, what no underscore hides."""

import importlib
import inspect
import pkgutil

import pytest

import lit_opd

FOUND = [module.name for module in pkgutil.walk_packages(lit_opd.__path__, "lit_opd.")]
MODULES = ["lit_opd", *(name for name in FOUND if "__main__" not in name)]


def room_of(name):
    return name.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("room", sorted({room_of(name) for name in MODULES}))
def test_what_is_public_exists_and_is_documented(room):
    for name in MODULES:
        if room_of(name) == room:
            look_at(importlib.import_module(name))


def look_at(module):
    where = module.__name__
    assert module.__doc__, where
    own = [n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", None) == where]
    public = getattr(module, "__all__", own)
    assert len(set(public)) == len(public), where
    for name in {*public, *(name for name in own if inspect.isclass(vars(module)[name]))}:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)) or not value.__module__.startswith("lit_opd"):
            continue
        assert value.__doc__, f"{where}.{name}"
        if inspect.isclass(value) and name in public:
            for method, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{where}.{name}.{method}"
