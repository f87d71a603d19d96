"""Watching a run while it learns: what is measured, the observers that are told, and those that are ready to use."""
