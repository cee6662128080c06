"""Run a command of `python -m lit_opd` and print what came of it, a function each.

`lit_opd.cli` calls them, with the configuration it has read.
"""
