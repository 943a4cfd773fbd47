"""How fast training and inference are on this machine, against its matrix products and against another stack.

`python -m speechjax.bench --what=train|inference` is the command.  Nothing here needs TensorFlow or recordings, except
waiting for real data, which is measured on demand.
"""
