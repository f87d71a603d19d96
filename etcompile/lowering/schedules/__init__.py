"""Schedules: how a sequence of steps is run, one file for each."""
