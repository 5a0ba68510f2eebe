"""Which device holds what, from names, sizes and dtypes alone: it knows neither the quantizer nor transformers."""
