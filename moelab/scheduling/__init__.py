"""The five decisions and the scheduler that takes them: no torch, no threads, no clock."""
