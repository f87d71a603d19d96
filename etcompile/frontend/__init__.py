"""Frontends: brainstate modules and plain functions, traced to one flat graph per time step."""
