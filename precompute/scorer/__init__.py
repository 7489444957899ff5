"""A causal language model + sequences -> the log-prob of every completion token: what both phases share."""
