"""Audio in: sources, records, the plan of batches, and the tf.data pipeline (the only TensorFlow here)."""
