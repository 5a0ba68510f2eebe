"""From requests to tensors on their device. The only importer of the compiled extension."""
