"""Schedules: how a sequence of steps is run, one file for each; :mod:`.base` says what one is, :mod:`.choose` takes one."""
