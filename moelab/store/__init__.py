"""The store: every expert on disk at every tier, and the way there from a checkpoint."""
