"""What a compiled program takes: operations, memory traffic and memory, from its jaxpr, without allocating anything."""
