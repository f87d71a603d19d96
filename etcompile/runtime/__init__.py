"""Runtime: the compiled step and its drivers."""
