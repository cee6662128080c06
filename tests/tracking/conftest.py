"""Run commands in a workspace of their own."""

from workspaces import database, make_workspace

__all__ = ["database", "make_workspace"]
