"""The five decisions and the scheduler that takes them: pure Python, no torch, no threads, no clock."""
