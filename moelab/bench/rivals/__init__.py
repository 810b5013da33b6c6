"""moelab beside llama.cpp and accelerate: one checkpoint, forced tokens, capped memory."""
