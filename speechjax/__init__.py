"""speechjax: self-supervised pretraining of speech encoders in JAX and Flax."""

__version__ = "0.1.0"
