"""Run commands in a workspace of their own."""

from workspaces import ctrl_c_works, database, make_workspace, workspace

__all__ = ["ctrl_c_works", "database", "make_workspace", "workspace"]
