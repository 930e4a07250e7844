"""What was read against what was held: counters, log lines, metrics."""
