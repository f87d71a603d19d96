"""Agents that learn while they act: temporal-difference learning with eligibility traces, for any compiled step."""
