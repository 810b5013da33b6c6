"""The engine: real loads, real memory, real logits. It obeys the scheduler and never decides."""
