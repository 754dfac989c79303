"""What the model is: configuration, the transformer, Hugging Face interchange."""
