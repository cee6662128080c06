"""Run commands in a workspace of their own."""

from workspaces import ctrl_c_works

__all__ = ["ctrl_c_works"]
