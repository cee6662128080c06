"""What is public is documented: what `__all__` names, or where a file has none, what no underscore hides."""

import importlib
import inspect
import pkgutil

import pytest

import lit_opd

FOUND = [module.name for module in pkgutil.walk_packages(lit_opd.__path__, "lit_opd.")]
MODULES = ["lit_opd", *(name for name in FOUND if "__main__" not in name)]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    own = [n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", None) == name]
    for public in getattr(module, "__all__", own):
        value = getattr(module, public)
        if not (inspect.isclass(value) or inspect.isfunction(value)) or not value.__module__.startswith("lit_opd"):
            continue
        assert value.__doc__, public
        if inspect.isclass(value):
            for method, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{public}.{method}"


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_in_all(name):
    module = importlib.import_module(name)
    if not hasattr(module, "__all__"):
        return
    assert len(set(module.__all__)) == len(module.__all__)
    own = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == name and not n.startswith("_")]
    for class_name in own:
        assert vars(module)[class_name].__doc__, class_name
