"""What a run came to: answers to a task, the run's folder read again, figures, the report."""
