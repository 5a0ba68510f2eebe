"""transformers models: the lifecycle stays transformers', entered through its registered extension points."""
