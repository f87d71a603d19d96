"""Learning rules, one per file: a function with :func:`etcompile.pass_api.algorithm` that writes equations."""
