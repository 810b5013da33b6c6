"""moelab beside llama.cpp and accelerate: one checkpoint, forced tokens, equal caps on memory."""
