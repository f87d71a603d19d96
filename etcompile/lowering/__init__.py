"""Lowering: trace programs as pure jax functions."""
