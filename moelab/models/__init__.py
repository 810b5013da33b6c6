"""What a Mixture-of-Experts model of transformers is: families, adapter, routing, checkpoint."""
