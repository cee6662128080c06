"""The commands of `python -m lit_opd`, a function each: run it and print what came of it."""
