"""What a worker can be asked, by what it is about; `pipeline.cluster.worker` joins all of it."""
