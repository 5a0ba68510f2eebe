"""transformers models: the lifecycle stays transformers', entered through its registered extension points."""

from pyint8.models.transformers.loading import load_pretrained
from pyint8.models.transformers.session import LoadSession

__all__ = ["LoadSession", "load_pretrained"]
