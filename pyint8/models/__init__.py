"""The two kinds of model: transformers' own (`transformers`), and any other torch.nn.Module (`plain`)."""
