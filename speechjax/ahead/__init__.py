"""What `speechjax.aot` knows before anything runs: batches without data, hardware that is not here, its programs."""
