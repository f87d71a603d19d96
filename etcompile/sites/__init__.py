"""Weight operations: one file for each, which says everything about it, and :mod:`etcompile.sites.table`, their order."""
