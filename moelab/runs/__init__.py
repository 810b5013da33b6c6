"""What a run leaves: events, tokens, recordings, comparisons."""
