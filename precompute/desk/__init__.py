"""What is done at a desk rather than in a job: look at a dataset before it is scored, take over TRL's cache, check a store against a model."""
