"""The toy world: its scenes and oracle, the base model, the studies and their results."""
